"""An archive → an empty log, with the same streams, ids, times, actors and idempotency keys.

The importer is a log-fenced writer like the ingestor (ARCHITECTURE.md). Into every partition it first appends, as one
record batch, its fence and a note that says *unfinished*; that batch must land at offset 0, which proves that the
partition was empty. Every further batch holds whole commands, ends with the same note, and must land at its exact
offset. When all is in, each partition gets a last note that says *finished*. So whatever stops an import, what it left
ends with *unfinished*, and an ingestor refuses to start on it instead of going on from half a log.
"""

import asyncio
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from shared.archive.export import Report, stream_of
from shared.archive.files import Archived, Manifest, read_file, read_manifest
from shared.codec import encode_record, relocate_event
from shared.errors import EpisodesError, Fenced
from shared.events import (
    BEFORE_ALL_COMMANDS,
    IMPORT_UNFINISHED,
    CommandsRefused,
    LoggedFence,
    LoggedNote,
    NotedCommand,
    WriterFenced,
)
from shared.ids import Position
from shared.kafka import append_together, describe_topic, ends, open_partition, open_producer, partition_of, translated
from shared.log import check_place
from shared.settings import EVENTS, KafkaSettings

_FENCE = 0
"""The importer's writer number: its fence is at offset 0, or the partition was not empty."""
_BATCH_BYTES = 512 * 1024
"""A batch is sent when it holds this much. One command may be larger, alone."""
_LARGEST_BATCH_BYTES = 31 * 1024 * 1024 + 64 * 1024
_ON_THEIR_WAY_BYTES = 32 * 1024 * 1024
_ACK_SECONDS = 30.0


class ImportRefused(EpisodesError):
    """The log is not empty. Nothing was changed that matters, or the message says what to do."""


def check_archive(folder: Path, report: Report) -> Manifest:
    """Read all of an archive.

    Raises:
        ArchiveRefused: something is missing, too much, altered or moved. The message names the line.
    """
    manifest = read_manifest(folder)
    for entry in manifest.files:
        done = 0
        report(entry.name, 0, entry.records)
        for archived in read_file(folder, manifest.source, entry):
            done += len(archived.values)
            report(entry.name, done, entry.records)
    return manifest


async def import_archive(kafka: KafkaSettings, folder: Path, report: Report) -> Manifest:
    """Bring an archive into the log, which must be empty and have no other writer meanwhile. It is checked first.

    Raises:
        ArchiveRefused: something is missing, too much, altered or moved. The message names the line.
        ImportRefused: the log is not empty.
        Fenced: another writer came.
        Unavailable: Kafka does not answer.
    """
    _, partitions = await describe_topic(kafka, EVENTS)
    await _require_empty(kafka, partitions)
    manifest = check_archive(folder, report)
    async with open_producer(kafka, batch_bytes=_LARGEST_BATCH_BYTES) as producer:
        log = _NewLog(producer, partitions)
        with _spoiling():
            await log.begin()
            for entry in manifest.files:
                done = 0
                what = f"{entry.name} → {EVENTS}"
                for archived in read_file(folder, manifest.source, entry):
                    await log.add(archived)
                    done += len(archived.values)
                    report(what, done, entry.records)
            await log.finish()
    return manifest


async def _require_empty(kafka: KafkaSettings, partitions: int) -> None:
    async with open_partition(kafka, EVENTS, 0) as consumer:
        found = await ends(consumer, EVENTS, range(partitions))
    for partition, end in sorted(found.items()):
        if end:
            raise ImportRefused(
                f"{EVENTS}/{partition} is not empty, its next offset is {end}: an archive goes into an empty log only. "
                "Delete the topics, create them with python -m shared.topics, and import again"
            )


@contextmanager
def _spoiling() -> Iterator[None]:
    try:
        yield
    except EpisodesError as error:
        raise type(error)(
            f"{error}. The import is not finished and the log not usable: delete the topics, create them with "
            "python -m shared.topics, and import again, while no ingestor runs"
        ) from error


@dataclass
class _Batch:
    """Records for one partition that are appended together."""

    before: Position
    """Position of the last record before it."""
    records: list[tuple[bytes | None, bytes, datetime]] = field(default_factory=list)
    size: int = 0

    @property
    def next_position(self) -> Position:
        return Position(self.before + len(self.records) + 1)

    def add(self, key: bytes | None, value: bytes, at: datetime) -> None:
        self.records.append((key, value, at))
        self.size += len(value)

    def note(self, command_offset: int, at: datetime, refusals: tuple[NotedCommand, ...] = ()) -> None:
        note = LoggedNote(self.next_position, _FENCE, at, CommandsRefused(command_offset, refusals))
        self.add(None, encode_record(note), at)


class _NewLog:
    """The writer of all partitions. Batches are sent in order and checked in order, a bounded number of bytes ahead."""

    def __init__(self, producer: AIOKafkaProducer, partitions: int) -> None:
        self._producer = producer
        self._open = [_Batch(Position(0)) for _ in range(partitions)]
        self._on_their_way: deque[tuple[int, _Batch, asyncio.Future[Any]]] = deque()
        self._bytes = 0

    async def begin(self) -> None:
        """Fence every partition.

        Raises:
            ImportRefused: one was not empty.
        """
        now = datetime.now(UTC)
        for partition, batch in enumerate(self._open):
            note = LoggedNote(batch.next_position, _FENCE, now, CommandsRefused(IMPORT_UNFINISHED, ()))
            fence = LoggedFence(WriterFenced(owner="import", nonce=str(uuid.uuid4())))
            first = [(None, encode_record(fence, at=now), now), (None, encode_record(note), now)]
            offset = await _acknowledged(partition, await append_together(self._producer, EVENTS, partition, first))
            if offset != _FENCE:
                raise ImportRefused(f"{EVENTS}/{partition} is not empty: the import's fence landed at offset {offset}")
            self._open[partition] = _Batch(note.position)

    async def add(self, archived: Archived) -> None:
        """Append the events of a command, or what a note keeps, each to the partition of its stream."""
        if isinstance(archived.records, LoggedNote):
            kept: dict[int, list[NotedCommand]] = defaultdict(list)
            refusals = archived.records.note.refusals
            for stream, noted in [(stream, noted) for noted in refusals if (stream := stream_of(noted))]:
                kept[partition_of(stream.encode(), len(self._open))].append(noted)
            for partition, its_own in kept.items():
                self._open[partition].note(BEFORE_ALL_COMMANDS, archived.records.at, tuple(its_own))
                await self._send_full(partition)
            return
        key = archived.records[0].stream.encode()
        partition = partition_of(key, len(self._open))
        batch = self._open[partition]
        for logged, value in zip(archived.records, archived.values, strict=True):
            moved = relocate_event(
                value, position=batch.next_position, writer=_FENCE, command_offset=BEFORE_ALL_COMMANDS
            )
            batch.add(key, moved, logged.at)
        await self._send_full(partition)

    async def finish(self) -> None:
        """Send what is left; when all of it is in, say so in every partition."""
        for partition, batch in enumerate(self._open):
            if batch.records:
                await self._send(partition, IMPORT_UNFINISHED)
        await self._settle(0)
        for partition in range(len(self._open)):
            await self._send(partition, BEFORE_ALL_COMMANDS)
        await self._settle(0)

    async def _send_full(self, partition: int) -> None:
        if self._open[partition].size >= _BATCH_BYTES:
            await self._send(partition, IMPORT_UNFINISHED)

    async def _send(self, partition: int, command_offset: int) -> None:
        batch = self._open[partition]
        batch.note(command_offset, datetime.now(UTC))
        self._open[partition] = _Batch(Position(batch.next_position - 1))
        await self._settle(_ON_THEIR_WAY_BYTES)
        sent = await append_together(self._producer, EVENTS, partition, batch.records)
        self._on_their_way.append((partition, batch, sent))
        self._bytes += batch.size
        await asyncio.sleep(0)  # the producer's turn

    async def _settle(self, most_bytes: int) -> None:
        while self._on_their_way and self._bytes >= most_bytes:
            partition, batch, sent = self._on_their_way.popleft()
            offset = await _acknowledged(partition, sent)
            try:
                check_place(offset, batch.before, fence=_FENCE, position_at_fence=Position(0))
            except Fenced as error:
                raise Fenced(f"{EVENTS}/{partition}: {error}") from error
            self._bytes -= batch.size


async def _acknowledged(partition: int, sent: "asyncio.Future[Any]") -> int:
    with translated(f"appending to {EVENTS}/{partition}"):
        async with asyncio.timeout(_ACK_SECONDS):
            appended = await sent
    return int(appended.offset)
