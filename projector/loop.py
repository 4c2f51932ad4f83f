"""One partition of the log, folded into the documents batch by batch: `run`."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, Never, TypeVar

import structlog
from msgspec import Struct

from projector.commits import CommitSource, End, Portion
from projector.documents import Checkpoint, DocumentRefused, DocumentStore, Overtaken, Stopped, TooMuch
from projector.fold import Inapplicable, Memory, Writes, blame, fold, found, missing, touched_by, weight
from shared.errors import EpisodesError, PoisonRecord, RecordsLost, Unavailable
from shared.kafka import open_partition
from shared.log import Commit, Cursor
from shared.probes import Status
from shared.settings import EVENTS, KafkaSettings
from shared.supervisor import gravest

MAX_BATCH_BYTES = 12 * 1024 * 1024
"""Of records and of loaded documents in one transaction. A single command may exceed it."""

_FEW = 500
"""Where fewer records than these wait, a partition takes them when the documents have had their rest."""

OpenDocuments = Callable[[int], AbstractAsyncContextManager[DocumentStore]]

T = TypeVar("T")

_log = structlog.get_logger(__name__)


async def run(
    partition: int, *, kafka: KafkaSettings, open_documents: OpenDocuments, status: Status, max_events: int
) -> Never:
    """Apply the partition's events as they come, each exactly once, until cancelled.

    Raises:
        PoisonRecord: a record that cannot be read or applied. All before it is applied, and the checkpoint says why.
        RecordsLost: records that were not read yet are gone from the log. The checkpoint says so.
        Unavailable: Kafka or MongoDB does not answer.
    """
    size = _BatchSize(max_events)
    async with open_partition(kafka, EVENTS, partition) as consumer:
        while True:
            try:
                async with open_documents(partition) as documents:
                    checkpoint = await documents.checkpoint()
                    source = CommitSource(consumer, partition, checkpoint.cursor)
                    await source.check()
                    status.partitions[partition] = Status.RUNNING
                    _log.info("partition runs", partition=partition, position=checkpoint.cursor.position)
                    await _follow(partition, source, documents, checkpoint.cursor, size)
            except Overtaken as error:
                _log.warning("beginning anew from what is stored", partition=partition, reason=str(error))
            except _Smaller as error:
                size.shrink(error.commits)
                _log.info("going on in smaller batches", partition=partition, commits=size.most, reason=str(error))


class _BatchSize:
    """How much goes into a batch: halved when one is refused, to find the command to blame, then doubled again."""

    def __init__(self, most: int) -> None:
        self.most = self._limit = most

    def shrink(self, refused: int) -> None:
        self.most = max(1, refused // 2)

    def grow(self) -> None:
        self.most = min(self._limit, 2 * self.most)


class _Smaller(EpisodesError):
    """A batch of several commands that cannot be applied as a whole."""

    def __init__(self, commits: int, reason: str) -> None:
        super().__init__(reason)
        self.commits = commits


class _Batch(Struct, frozen=True):
    """Commands from ``before`` to ``after`` in the log, and what to write for them."""

    before: Cursor
    after: Cursor
    commits: tuple[Commit, ...] = ()
    writes: Writes = Writes({}, {})
    end: End | None = None
    """Why there is nothing after it."""


async def _follow(
    partition: int, source: CommitSource, documents: DocumentStore, cursor: Cursor, size: _BatchSize
) -> Never:
    """Apply batch after batch; if much is there, each is prepared while the one before it is being applied.

    A transaction costs almost as much for one command as for twenty. So where little is there, and more than one
    command came, the next are taken only after a rest: transactions become larger instead of more frequent (ADR 18).
    """
    memory = Memory()

    async def prepare(previous: _Batch) -> _Batch:
        portion = await source.take(max_events=size.most, max_bytes=MAX_BATCH_BYTES)
        return await _fold(partition, portion, previous, documents, memory)

    batch = await prepare(_Batch(cursor, cursor))
    while batch.end is None:
        if source.behind < _FEW:
            await _apply(partition, batch, documents)
            await documents.rest(len(batch.commits))
            batch = await prepare(batch)
        else:
            batch = await _both(_apply(partition, batch, documents), prepare(batch))
        size.grow()
    await _apply(partition, batch, documents)
    raise batch.end.error


async def _fold(partition: int, portion: Portion, previous: _Batch, documents: DocumentStore, memory: Memory) -> _Batch:
    """What the portion comes to. ``previous`` may still be on its way into the store."""
    before, commits = previous.after, portion.commits
    touches = touched_by(commits)
    known = memory.beside(previous.writes, touches)
    budget = MAX_BATCH_BYTES - portion.size - weight(touches, known) if len(commits) > 1 else None
    try:
        loaded = await documents.load(missing(touches, known), max_bytes=budget)
    except TooMuch as error:
        return _Batch(before, before, end=End(before.offset, _Smaller(len(commits), str(error))))
    except Unavailable as error:
        return _Batch(before, before, end=End(before.offset, error))
    try:
        writes = fold(found(touches, known, loaded), commits)
    except Inapplicable as error:
        fitting = commits[: error.index]
        return _Batch(
            before,
            fitting[-1].cursor if fitting else before,
            fitting,
            fold(found(touched_by(fitting), known, loaded), fitting),
            _poison(partition, error.offset, str(error)),
        )
    memory.note(writes)
    return _Batch(before, portion.cursor, commits, writes, portion.end)


async def _apply(partition: int, batch: _Batch, documents: DocumentStore) -> None:
    stopped = _stopped(batch.end)
    if batch.after == batch.before and stopped is None:
        if batch.end is not None:
            return
        if await documents.checkpoint() == Checkpoint(batch.before):
            return  # idle, with the database there, nobody ahead, and no stop to be cleared
    try:
        await documents.apply(batch.before, Checkpoint(batch.after, stopped), batch.writes)
    except (DocumentRefused, TooMuch) as error:
        if len(batch.commits) > 1:
            raise _Smaller(len(batch.commits), str(error)) from error
        if isinstance(error, TooMuch):
            raise Unavailable(str(error)) from error
        [commit] = batch.commits
        offset, reason = blame(commit, error.collection, error.key, str(error))
        end = _poison(partition, offset, reason)
        await documents.apply(batch.before, Checkpoint(batch.before, _stopped(end)), Writes({}, {}))
        raise end.error from error


def _poison(partition: int, offset: int, reason: str) -> End:
    return End(offset, PoisonRecord(f"{EVENTS}/{partition}, offset {offset}: {reason}"))


def _stopped(end: End | None) -> Stopped | None:
    if end is None or not isinstance(end.error, PoisonRecord | RecordsLost):
        return None
    return Stopped(end.offset, str(end.error), datetime.now(UTC))


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, T]) -> T:
    """Give the result of ``second`` when both are done. The first error ends the other and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(first)
            result = tasks.create_task(second)
    except ExceptionGroup as group:
        raise gravest(group) from group
    return result.result()
