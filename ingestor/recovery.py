"""The log folded into the stored state, from where that is up to our fence, before a tenure begins."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from ingestor.domain.judgement import relearn, relearn_note
from ingestor.domain.state import Overlay
from ingestor.reading import SILENCE_SECONDS, next_records
from ingestor.snapshots import Snapshots
from ingestor.state import Checkpoint, StateStore
from shared.codec import decode_record
from shared.errors import PoisonRecord, RecordsLost
from shared.events import LoggedFence, WriterFenced
from shared.kafka import open_partition
from shared.log import Commit, Cursor, LogReader
from shared.receipts import Receipt
from shared.settings import EVENTS, KafkaSettings
from shared.threads import in_thread

_FETCH_RECORDS = 2_000
_CHUNK_RECORDS = 20_000
_CHUNK_BYTES = 64 * 1024 * 1024
"""What is folded in memory before it goes to the stored state."""
_CALLERS_WAIT = timedelta(seconds=15)
"""Nobody waits longer for an answer."""
_MOST_UNANSWERED = 2_000
_REPORT_SECONDS = 5.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_log = structlog.get_logger(__name__)


async def recover(
    kafka: KafkaSettings,
    store: StateStore,
    partition: int,
    *,
    fence: WriterFenced,
    fence_offset: int,
    askable_since: datetime,
    report: Callable[[str], None],
    snapshots: Snapshots | None = None,
) -> "Recovery":
    """Fold the log from the stored state's checkpoint, or a snapshot's, up to our fence, into the stored state.

    Args:
        kafka: where the log is.
        store: the state, of this log or of none.
        partition: of the events topic.
        fence: ours.
        fence_offset: where it stands.
        askable_since: receipts of before need not be kept: no command will ask for them.
        report: is told how far it is, in words.
        snapshots: may have a later state than ours.

    Raises:
        PoisonRecord: the log holds what this version cannot read.
        RecordsLost: our fence, or what was before it, is gone.
        Unavailable: Kafka is away, or the state cannot be written.
    """
    async with open_partition(kafka, EVENTS, partition) as events:
        tp = TopicPartition(EVENTS, partition)
        checkpoint = await _trusted_checkpoint(store, events, tp, fence_offset)
        if snapshots is not None:
            report("looking for a snapshot")
            restored = await snapshots.restore(
                store,
                partition,
                local=checkpoint,
                fence_offset=fence_offset,
                is_of_this_log=partial(_is_of_this_log, events, tp),
            )
            checkpoint = restored or checkpoint
        if checkpoint is None:
            store.clear()
        recovery = Recovery(store, checkpoint or Checkpoint(Cursor(), "", -1), askable_since)
        began_at = recovery.checkpoint.cursor.offset
        events.seek(tp, began_at)
        reader = LogReader(recovery.checkpoint.cursor)
        progress = _Progress(partition, began_at, fence_offset + 1, report)
        next_offset, unflushed_records, unflushed_bytes = began_at, 0, 0
        while next_offset <= fence_offset:
            for record in await next_records(
                events, f"recovering {EVENTS}/{partition}", most=_FETCH_RECORDS, give_up_after=SILENCE_SECONDS
            ):
                try:
                    commit = reader.read(record.offset, record.value)
                except PoisonRecord as error:
                    raise PoisonRecord(f"{EVENTS}/{partition} offset {record.offset}: {error}") from error
                if commit is not None:
                    recovery.take(commit)
                unflushed_records += 1
                unflushed_bytes += len(record.value)
                next_offset = record.offset + 1
                if record.offset == fence_offset:
                    break
            progress.at(next_offset, recovery.events)
            if unflushed_records >= _CHUNK_RECORDS or unflushed_bytes >= _CHUNK_BYTES:
                await in_thread(None, recovery.flush)
                unflushed_records, unflushed_bytes = 0, 0
        await in_thread(None, recovery.flush)
    if recovery.checkpoint.nonce != fence.nonce:
        raise RecordsLost(f"{EVENTS}/{partition} lost the fence that was written at offset {fence_offset}")
    progress.end(next_offset, recovery.events)
    return recovery


class Recovery:
    """Folds commits into the stored state, some thousand events at a time."""

    def __init__(self, store: StateStore, checkpoint: Checkpoint, askable_since: datetime = _EPOCH) -> None:
        self.unanswered: dict[int, Receipt] = {}
        """Command offset → receipt, of commands decided just now by a tenure that may not have lived to answer them."""
        self.events = 0
        """How many were folded."""
        self._store = store
        self._askable_since = askable_since
        self._cursor, self._nonce, self._command_offset = checkpoint.cursor, checkpoint.nonce, checkpoint.command_offset
        self._recent_since = datetime.now(UTC) - _CALLERS_WAIT
        self._overlay = Overlay(store.get)

    @property
    def checkpoint(self) -> Checkpoint:
        """How far it has come."""
        return Checkpoint(self._cursor, self._nonce, self._command_offset)

    def take(self, commit: Commit) -> None:
        """Fold one commit."""
        if commit.events:
            last = commit.events[-1]
            recent = last.at > self._recent_since
            receipt = relearn(self._overlay, commit.events, askable=last.at >= self._askable_since, with_receipt=recent)
            if recent and receipt is not None:
                self.unanswered[last.command_offset] = receipt
                if len(self.unanswered) > _MOST_UNANSWERED:
                    del self.unanswered[next(iter(self.unanswered))]
            self._command_offset = last.command_offset
            self.events += len(commit.events)
        elif commit.note is not None:
            for noted in commit.note.note.refusals:
                self._overlay.update(relearn_note(noted))
            self._command_offset = commit.note.command_offset
        elif commit.fence is not None:
            self._nonce = commit.fence.nonce
        self._cursor = commit.cursor

    def flush(self) -> None:
        """Move what was folded into the stored state."""
        self._store.apply(self._overlay, self.checkpoint)
        self._overlay = Overlay(self._store.get)


class _Progress:
    """Says every now and then how far a recovery is, how fast, and how long it will take."""

    def __init__(self, partition: int, began_at: int, end: int, report: Callable[[str], None]) -> None:
        self._partition = partition
        self._began_at = began_at
        self._end = end
        self._report = report
        self._began = self._logged = time.monotonic()

    def at(self, offset: int, events: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._began, 1e-3)
        eta = (self._end - offset) * seconds / max(offset - self._began_at, 1)
        self._report(
            f"recovering: offset {offset} of {self._end}, began at {self._began_at}; "
            f"{events} events, {events / seconds:.0f} events/s, {eta:.0f} s to go"
        )
        if now - self._logged >= _REPORT_SECONDS:
            self._logged = now
            self._log("recovering", offset, events, seconds, eta_seconds=round(eta))

    def end(self, offset: int, events: int) -> None:
        self._log("recovered", offset, events, time.monotonic() - self._began)

    def _log(self, what: str, offset: int, events: int, seconds: float, **more: int) -> None:
        _log.info(
            what,
            partition=self._partition,
            began_at=self._began_at,
            offset=offset,
            of=self._end,
            events=events,
            events_per_second=round(events / max(seconds, 1e-3)),
            **more,
        )


async def _trusted_checkpoint(
    store: StateStore, events: AIOKafkaConsumer, tp: TopicPartition, fence_offset: int
) -> Checkpoint | None:
    """The stored state's checkpoint, if it is one of this very log."""
    checkpoint = store.checkpoint()
    if checkpoint is None:
        return None
    if checkpoint.cursor.offset <= fence_offset and await _is_of_this_log(events, tp, checkpoint):
        return checkpoint
    _log.warning("state thrown away: it belongs to another log", partition=tp.partition)
    return None


async def _is_of_this_log(events: AIOKafkaConsumer, tp: TopicPartition, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's fence is in the log, with the same nonce."""
    fence = checkpoint.cursor.fence
    events.seek(tp, fence)
    try:
        [record, *_] = await next_records(events, "checking the stored state", give_up_after=SILENCE_SECONDS)
        found = decode_record(record.value)
    except (RecordsLost, PoisonRecord):
        return False
    return isinstance(found, LoggedFence) and record.offset == fence and found.fence.nonce == checkpoint.nonce
