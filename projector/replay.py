"""The log read from its start and folded into final documents, by ranges of streams so that memory stays bounded.

First every partition is *spilled*: the events that happened go, as they stand in the log, into one file per range of
streams. Then each range is *folded* by itself, one that is too large in several passes. A range holds whole streams, so
its documents are final, and a fold needs no database. A spill goes on after a crash from its last mark; a fold begins
its range anew.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import msgspec
from msgspec import Struct

from projector.gaps import GapFinder
from projector.views import Document, Documents, no_documents, project
from shared.codec import decode_record
from shared.errors import PoisonRecord
from shared.events import LoggedEvent
from shared.ids import StreamId
from shared.kafka import open_partition, read_to
from shared.log import Cursor, LogReader
from shared.read_models import FOLDERS, NAMESPACES, TENANT_EPISODES
from shared.settings import EVENTS, KafkaSettings

_MARK_EVERY = 50_000
"""Records between two marks of a spill,"""
_MARKS = 40
"""or fewer, so that there are so many of them: what is after the last one is done twice after a kill."""
_FINAL_AT_ONCE = (TENANT_EPISODES, FOLDERS, NAMESPACES)
"""Collections whose documents never change once they are made: a fold hands them on as it goes."""
_HAND_ON = 4_000
"""Documents that a fold hands on together,"""
_HAND_ON_BYTES = 16 * 1024 * 1024
"""or those that so many bytes of events made."""
_PASS_BYTES = 64 * 1024 * 1024
"""Of events whose documents are held at once, unless a single stream has more: what bounds the memory of a fold."""
_LENGTH = struct.Struct("<I")

Progress = Callable[[int], None]
"""Told the offset up to which a spill is done."""
FoldProgress = Callable[[int, int], None]
"""Told the place of a partition among those that are folded, and how many of its events are done."""


class Plan(Struct, frozen=True):
    """What is replayed, and how it is cut up."""

    ends: dict[int, int]
    """Partition → Kafka offset behind its last record."""
    ranges: int

    def range_of(self, stream: StreamId) -> int:
        """The range that the stream belongs to, whatever its partition."""
        return crc32(stream.encode()) % self.ranges

    @property
    def slots(self) -> int:
        """How many slots its workers need: one for the spill of each partition, then as many for each range."""
        return self.slots_of(self.ranges)

    def slots_of(self, number: int) -> int:
        """The first slot of a range."""
        return len(self.ends) * (1 + number)

    def pass_of(self, stream: StreamId, passes: int) -> int:
        """Which pass over its range the stream belongs to."""
        return crc32(stream.encode()) // self.ranges % passes


class Spilled(Struct, frozen=True):
    """How far the spill of one partition is."""

    cursor: Cursor
    sizes: tuple[int, ...]
    """Bytes in the file of each range."""
    events: tuple[int, ...]
    """Events in the file of each range."""
    dropped: int = 0
    """Records that did not happen."""
    findings: tuple[str, ...] = ()
    """Where the log looks as if it had lost records. Complete once the spill is."""


async def spill(kafka: KafkaSettings, plan: Plan, partition: int, folder: Path, progress: Progress) -> Spilled:
    """Spill one partition up to its end in the plan, or go on where an earlier call broke off.

    Raises:
        PoisonRecord: a record cannot be read.
        RecordsLost: the log does not begin at its start any more.
        Unavailable: Kafka does not answer.
    """
    with ExitStack() as files:
        spill = _Spill(plan, partition, folder, files)
        async with open_partition(kafka, EVENTS, partition) as consumer:
            async for records in read_to(consumer, EVENTS, partition, spill.next_offset, plan.ends[partition]):
                for record in records:
                    spill.take(record.offset, record.value)
                progress(spill.next_offset)
        return spill.finish()


def fold_range(
    plan: Plan, folder: Path, number: int, progress: FoldProgress
) -> Iterator[tuple[str, Sequence[Document]]]:
    """The final documents of one range, some at a time, with their collection.

    Raises:
        PoisonRecord: an event does not fit what was before it.
    """
    size = sum(_range_file(folder, partition, number).stat().st_size for partition in plan.ends)
    passes = 1 + size // _PASS_BYTES
    done = [0] * len(plan.ends)
    for turn in range(passes):
        yield from _fold_pass(plan, folder, number, turn, passes, done, progress)


def _fold_pass(
    plan: Plan, folder: Path, number: int, turn: int, passes: int, done: list[int], progress: FoldProgress
) -> Iterator[tuple[str, Sequence[Document]]]:
    documents = no_documents()
    waiting = size = 0
    for place, partition in enumerate(sorted(plan.ends)):
        for value in _values(_range_file(folder, partition, number)):
            logged = decode_record(value)
            assert isinstance(logged, LoggedEvent)  # noqa: S101 - nothing else is spilled
            if passes > 1 and plan.pass_of(logged.stream, passes) != turn:
                continue
            try:
                project(documents, logged)
            except PoisonRecord as error:
                raise PoisonRecord(
                    f"{EVENTS}/{partition}, position {logged.position}, "
                    f"event {logged.event_id} of {logged.stream}: {error}"
                ) from error
            done[place] += 1
            waiting += 1
            size += len(value)
            if waiting == _HAND_ON or size > _HAND_ON_BYTES:
                yield from _handed_on(documents, _FINAL_AT_ONCE)
                progress(place, done[place])
                waiting = size = 0
        progress(place, done[place])
    yield from _handed_on(documents, tuple(documents))


def _handed_on(documents: Documents, collections: Sequence[str]) -> Iterator[tuple[str, Sequence[Document]]]:
    for collection in collections:
        there = list(documents[collection].values())
        documents[collection] = {}
        for start in range(0, len(there), _HAND_ON):
            yield collection, there[start : start + _HAND_ON]


def _values(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=1024 * 1024) as file:
        while head := file.read(_LENGTH.size):
            yield file.read(_LENGTH.unpack(head)[0])


def _range_file(folder: Path, partition: int, number: int) -> Path:
    return folder / f"{partition}-{number}.events"


class _Spill:
    """The open files of one partition's spill, and its mark."""

    def __init__(self, plan: Plan, partition: int, folder: Path, files: ExitStack) -> None:
        self._plan = plan
        self._partition = partition
        self._mark = folder / f"{partition}.mark"
        self._done = Spilled(Cursor(), (0,) * plan.ranges, (0,) * plan.ranges)
        self._gaps = GapFinder()
        if self._mark.exists():
            self._done, self._gaps = msgspec.json.decode(self._mark.read_bytes(), type=tuple[Spilled, GapFinder])
        self._events = list(self._done.events)
        self._reader = LogReader(self._done.cursor)
        self._command: list[bytes] = []
        """The records of the command that is not complete yet, each behind its length."""
        self._since_mark = 0
        self._mark_every = min(_MARK_EVERY, max(1, plan.ends[partition] // _MARKS))
        self._files: list[BinaryIO] = []
        for number, size in enumerate(self._done.sizes):
            path = _range_file(folder, partition, number)
            path.touch()
            file = files.enter_context(path.open("r+b", buffering=256 * 1024))
            file.truncate(size)
            file.seek(size)
            self._files.append(file)

    @property
    def next_offset(self) -> int:
        return self._reader.cursor.offset

    def take(self, offset: int, value: bytes | None) -> None:
        """Take the record at ``offset``."""
        before, dropped = self._reader.cursor, self._reader.fenced_events
        try:
            record = decode_record(value)
            commit = self._reader.take(offset, record)
        except PoisonRecord as error:
            raise PoisonRecord(f"{EVENTS}/{self._partition}, offset {offset}: {error}") from error
        happened = self._reader.fenced_events == dropped
        self._gaps.look(before, offset, record, happened=happened)
        if happened and isinstance(record, LoggedEvent):
            self._command += (_LENGTH.pack(len(value or b"")), value or b"")
        if commit is None:
            return
        if commit.events:
            number = self._plan.range_of(commit.events[0].stream)
            self._files[number].writelines(self._command)
            self._events[number] += len(commit.events)
            self._command = []
        self._since_mark += 1 + len(commit.events)
        if self._since_mark >= self._mark_every:
            self._note()

    def finish(self) -> Spilled:
        """Note that all is done."""
        self._note(self._gaps.at_the_end())
        return self._done

    def _note(self, findings: tuple[str, ...] = ()) -> None:
        for file in self._files:
            file.flush()
        self._done = Spilled(
            self._reader.cursor,
            tuple(file.tell() for file in self._files),
            tuple(self._events),
            self._done.dropped + self._reader.fenced_events,
            findings,
        )
        self._reader = LogReader(self._reader.cursor)
        self._since_mark = 0
        fresh = self._mark.with_suffix(".fresh")
        fresh.write_bytes(msgspec.json.encode((self._done, self._gaps)))
        fresh.replace(self._mark)
