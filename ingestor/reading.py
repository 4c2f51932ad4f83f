"""Records of a topic, some at a time."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import CorruptRecordException, KafkaError, OffsetOutOfRangeError

from ingestor.lending import Lent
from shared.errors import Unavailable
from shared.kafka import Pulse, describe_topic, open_consumer, translated
from shared.settings import KafkaSettings

SILENCE_SECONDS = 10.0
"""Where records are known to be, Kafka that gives none for so long is away."""
_MOST_AT_ONCE = 1_000
_ROOM_RECORDS, _ROOM_BYTES = 2_000, 4 * 1024 * 1024
"""Whoever has as much waiting is given no more until half of it is taken."""
_LOOK_SECONDS = 1.0
_LONGEST_POLL_MS = 100
"""Kafka is asked again after so long at the latest. Who begins to read waits until then to be asked for."""


async def next_records(
    consumer: AIOKafkaConsumer, what: str, *, most: int = _MOST_AT_ONCE, give_up_after: float = float("inf")
) -> Sequence[ConsumerRecord]:
    """The next records, at least one.

    Raises:
        Unavailable: none came for ``give_up_after`` seconds.
    """
    began = time.monotonic()
    with translated(what):
        while True:
            taken = await consumer.getmany(timeout_ms=500, max_records=most)
            for records in taken.values():
                return records  # type: ignore[no-any-return]  # there is one partition
            if time.monotonic() - began > give_up_after:
                raise Unavailable(f"{what}: nothing came for {give_up_after} s")


class TopicReader:
    """All partitions of a topic that a process reads, by one consumer.

    What one partition suffers is told to its reader alone: the others read on.
    """

    def __init__(self, settings: KafkaSettings, topic: str) -> None:
        self._settings = settings
        self._topic = topic
        self._consumers = Lent(self._open)

    @asynccontextmanager
    async def read(self, partition: int, offset: int) -> "AsyncIterator[PartitionReader]":
        """Read one partition from ``offset`` on.

        Raises:
            Unavailable: Kafka does not answer, or the topic has no such partition.
        """
        async with self._consumers.borrow() as handing_out:
            with handing_out.begin(TopicPartition(self._topic, partition), offset) as reader:
                yield reader

    @asynccontextmanager
    async def _open(self) -> "AsyncIterator[_HandingOut]":
        _, count = await describe_topic(self._settings, self._topic)
        async with open_consumer(self._settings, self._topic, longest_poll_ms=_LONGEST_POLL_MS) as consumer:
            # All are assigned from the beginning: with another assignment aiokafka forgets what it has fetched.
            partitions = [TopicPartition(self._topic, number) for number in range(count)]
            consumer.assign(partitions)
            handing_out = _HandingOut(consumer)
            for tp in partitions:
                handing_out.rest(tp)
            tasks = [asyncio.create_task(work) for work in (handing_out.run(), handing_out.look_on())]
            try:
                yield handing_out
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)


class _HandingOut:
    """Gives each reader what comes for it."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._readers: dict[TopicPartition, PartitionReader] = {}
        self._pulses: dict[TopicPartition, Pulse] = {}
        self._ended_with: Exception | None = None

    @contextmanager
    def begin(self, tp: TopicPartition, offset: int) -> "Iterator[PartitionReader]":
        """Give a reader what the partition has from ``offset`` on."""
        if self._ended_with is not None:
            raise Unavailable(f"reading {tp.topic}: {self._ended_with}") from self._ended_with
        if tp not in self._consumer.assignment():
            raise Unavailable(f"{tp.topic} has no partition {tp.partition}")
        if tp in self._readers:
            raise RuntimeError(f"{tp.topic}/{tp.partition} is being read already")
        reader = self._readers[tp] = PartitionReader(
            rest=partial(self._consumer.pause, tp), go_on=partial(self._consumer.resume, tp)
        )
        self._pulses[tp] = Pulse(self._consumer, tp.topic, tp.partition)
        self._consumer.seek(tp, offset)
        self._consumer.resume(tp)
        try:
            yield reader
        finally:
            del self._readers[tp]
            self.rest(tp)

    def rest(self, tp: TopicPartition) -> None:
        """Ask for nothing of this partition, and forget what came."""
        self._consumer.pause(tp)
        self._consumer.seek(tp, 0)  # without a position aiokafka would look for one

    async def run(self) -> None:
        """Hand out until cancelled, or until all readers have been told of an error."""
        fetching: asyncio.Task[None] = self._consumer._fetcher.error_future  # noqa: SLF001 - getone() does not look at it
        fetching.add_done_callback(lambda _: self._end(Unavailable("aiokafka has stopped fetching")))
        try:
            while True:
                await self._wait()
                await self._take_all()
        except Exception as error:  # noqa: BLE001 - the readers raise it
            self._end(error)

    async def look_on(self) -> None:
        """Tell readers for whom Kafka answers nothing any more, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for tp in self._readers.keys() - self._consumer.paused():
                try:
                    self._pulses[tp].look()
                except Exception as error:  # noqa: BLE001 - its reader raises it
                    self._fail(tp, error)

    def _end(self, error: Exception) -> None:
        self._ended_with = self._ended_with or error
        for reader in self._readers.values():
            reader.fail(error)

    async def _wait(self) -> None:
        """Wait for records, or for an error.

        Raises:
            KafkaError: it concerns no partition in particular.
        """
        try:
            first = await self._consumer.getone()
        except OffsetOutOfRangeError as error:
            for tp in error.args[0]:
                self._fail(tp, error)
        except CorruptRecordException as error:
            # It does not say where. aiokafka takes what it holds in order, and has not let go of what it stumbled over.
            self._fail(next(iter(self._consumer._fetcher._records)), error)  # noqa: SLF001
        else:
            self._give(TopicPartition(first.topic, first.partition), [first])

    async def _take_all(self) -> None:
        """Take what there is, one by one: an error makes aiokafka forget what the same call has taken of others."""
        for tp in list(self._readers):
            try:
                taken = await self._consumer.getmany(tp, timeout_ms=0)
            except KafkaError as error:
                self._fail(tp, error)
            else:
                for records in taken.values():
                    self._give(tp, records)

    def _give(self, tp: TopicPartition, records: Sequence[ConsumerRecord]) -> None:
        if reader := self._readers.get(tp):
            reader.give(records)

    def _fail(self, tp: TopicPartition, error: Exception) -> None:
        self.rest(tp)
        if reader := self._readers.get(tp):
            reader.fail(error)


class PartitionReader:
    """The records of one partition, in order and without a gap."""

    def __init__(self, *, rest: Callable[[], None], go_on: Callable[[], None]) -> None:
        self._rest = rest
        self._go_on = go_on
        self._resting = False
        self._waiting: deque[ConsumerRecord] = deque()
        self._bytes = 0
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    async def next_records(self, most: int = _MOST_AT_ONCE) -> Sequence[ConsumerRecord]:
        """The next records, at least one.

        Raises:
            KafkaError, Unavailable: reading this partition failed. It is not read any more.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        self._bytes -= _bytes_in(taken)
        has_room = len(self._waiting) <= _ROOM_RECORDS // 2 and self._bytes <= _ROOM_BYTES // 2
        if self._resting and has_room and self._error is None:
            self._resting = False
            self._go_on()
        return taken

    def give(self, records: Sequence[ConsumerRecord]) -> None:
        """Put these behind those that wait."""
        self._waiting.extend(records)
        self._bytes += _bytes_in(records)
        if not self._resting and (len(self._waiting) >= _ROOM_RECORDS or self._bytes >= _ROOM_BYTES):
            self._resting = True
            self._rest()
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Raise this when what came before it is read."""
        self._error = error
        self._arrived.set()


def _bytes_in(records: Iterable[ConsumerRecord]) -> int:
    return sum(len(record.value or b"") for record in records)
