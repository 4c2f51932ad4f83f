"""The commits of one events partition as Kafka delivers them, taken in portions of what is there."""

import asyncio
from collections import deque
from collections.abc import Iterable

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from shared.errors import EpisodesError, PoisonRecord, RecordsLost, Unavailable
from shared.kafka import REQUEST_TIMEOUT_MS, Pulse, translated
from shared.log import Commit, Cursor, LogReader
from shared.settings import EVENTS

_IDLE_MS = 1_000
_READ_AT_ONCE = 100
"""Records decoded before others have a turn: the batch before is on its way into the database."""


class End(msgspec.Struct, frozen=True):
    """Why the partition cannot be read any further."""

    offset: int
    """Of the record that stands in the way."""
    error: EpisodesError


class Portion(msgspec.Struct, frozen=True):
    """Whole commands, in order; none if only dropped records or an end were found."""

    commits: tuple[Commit, ...]
    cursor: Cursor
    """Where to go on after them, and after the dropped records behind them."""
    size: int
    """Bytes of their records."""
    end: End | None
    """Why there is nothing after them."""


class CommitSource:
    """Reads ahead no further than a portion and what Kafka sends at once."""

    def __init__(self, consumer: AIOKafkaConsumer, partition: int, cursor: Cursor) -> None:
        self.fenced_events = 0
        """How many records were dropped: a writer wrote them that another one had already replaced."""
        self._consumer = consumer
        self._partition = TopicPartition(EVENTS, partition)
        self._pulse = Pulse(consumer, EVENTS, partition)
        self._reader = LogReader(cursor)
        self._unfinished = 0
        """Bytes of the records of a command that is not complete yet."""
        self._ready: deque[tuple[Commit, int]] = deque()
        """Commits that were read and not taken, each with its records' bytes, and what they come to:"""
        self._events = self._bytes = 0
        self._read_to = self._taken_to = cursor
        self._end: End | None = None
        consumer.seek(self._partition, cursor.offset)

    @property
    def behind(self) -> int:
        """Records that were not taken yet, as far as Kafka has told."""
        end: int | None = self._consumer.highwater(self._partition)
        return 0 if end is None else end - self._taken_to.offset

    async def check(self) -> None:
        """Ask Kafka for the partition.

        Raises:
            Unavailable: Kafka does not answer.
        """
        with translated(f"reading {EVENTS}/{self._partition.partition}"):
            async with asyncio.timeout(REQUEST_TIMEOUT_MS / 1000):
                await self._consumer.end_offsets([self._partition])

    async def take(self, *, max_events: int, max_bytes: int) -> Portion:
        """What is there up to about ``max_events`` and ``max_bytes``, at least one command. Nothing after a second."""
        while self._end is None and self._events < max_events and self._bytes < max_bytes:
            timeout_ms = _IDLE_MS if self._read_to == self._taken_to else 0
            if not await self._fetch(timeout_ms, max_events - self._events):
                break
        return self._portion(max_events, max_bytes)

    def _portion(self, max_events: int, max_bytes: int) -> Portion:
        taken: list[Commit] = []
        events = size = 0
        while self._ready:
            commit, commit_bytes = self._ready[0]
            if taken and (events + _weight(commit) > max_events or size + commit_bytes > max_bytes):
                break
            self._ready.popleft()
            taken.append(commit)
            events += _weight(commit)
            size += commit_bytes
        self._events -= events
        self._bytes -= size
        self._taken_to = taken[-1].cursor if self._ready else self._read_to
        return Portion(tuple(taken), self._taken_to, size, None if self._ready else self._end)

    async def _fetch(self, timeout_ms: int, max_records: int) -> bool:
        try:
            with translated(f"reading {EVENTS}/{self._partition.partition}"):
                fetched = await self._consumer.getmany(self._partition, timeout_ms=timeout_ms, max_records=max_records)
            records: list[ConsumerRecord[bytes, bytes]] = fetched.get(self._partition, [])
            if not records and timeout_ms:
                await self.check()
                self._pulse.look()
        except (RecordsLost, Unavailable) as error:
            self._end = End(self._read_to.offset, error)
            return False
        for start in range(0, len(records), _READ_AT_ONCE):
            if self._end is not None:
                break  # nothing behind what cannot be read
            self._read(records[start : start + _READ_AT_ONCE])
            await asyncio.sleep(0)
        return bool(records)

    def _read(self, records: Iterable["ConsumerRecord[bytes, bytes]"]) -> None:
        for record in records:
            size = len(record.value or b"")
            try:
                commit = self._reader.read(record.offset, record.value)
            except (PoisonRecord, RecordsLost) as error:
                where = f"{EVENTS}/{self._partition.partition}, offset {record.offset}"
                self._end = End(record.offset, type(error)(f"{where}: {error}"))
                return
            if commit is not None:
                self._ready.append((commit, self._unfinished + size))
                self._events += _weight(commit)
                self._bytes += self._unfinished + size
                self._read_to, self._unfinished = commit.cursor, 0
            elif self._reader.fenced_events == self.fenced_events:
                self._unfinished += size
            elif not self._unfinished:
                self._read_to = msgspec.structs.replace(self._read_to, offset=record.offset + 1)
            self.fenced_events = self._reader.fenced_events


def _weight(commit: Commit) -> int:
    return max(1, len(commit.events))
