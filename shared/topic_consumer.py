"""One consumer for all partitions of a topic that a process works on, read one by one.

With a consumer for each partition Kafka is asked for each by itself, and asking costs more than what comes: with eight
partitions more than half of what reading costs (ADR 19).
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError

from shared.errors import Unavailable
from shared.kafka import describe_topic, open_consumer
from shared.settings import KafkaSettings

_READ_AT_ONCE = 1_000
_ROOM_RECORDS, _ROOM_BYTES = 1_000, 4 * 1024 * 1024
"""A reader that holds as much is given no more."""
_LONGEST_WAIT_MS = 1_000
_WAIT_FOR_ROOM_MS = 20
_WAIT_FOR_ROOM_SECONDS = _WAIT_FOR_ROOM_MS / 1000

Records = Mapping[TopicPartition, list[ConsumerRecord]]


class TopicConsumer:
    """The partitions of one topic. Connected as long as somebody reads one of them."""

    def __init__(self, settings: KafkaSettings, topic: str) -> None:
        self._settings = settings
        self._topic = topic
        self._readers: dict[TopicPartition, PartitionReader] = {}
        self._users = 0
        self._changing = asyncio.Lock()
        self._consumer: AIOKafkaConsumer | None = None
        self._opened = contextlib.AsyncExitStack()

    @contextlib.asynccontextmanager
    async def partition(self, number: int) -> "AsyncIterator[PartitionReader]":
        """A reader of one partition, without a group. The caller seeks before the first read.

        Raises:
            Unavailable: Kafka does not answer, or the topic has no such partition.
        """
        tp = TopicPartition(self._topic, number)
        if tp in self._readers:
            raise RuntimeError(f"{self._topic}/{number} is being read already")
        self._users += 1
        try:
            async with self._changing:
                if self._consumer is None:
                    self._consumer = await self._opened.enter_async_context(self._connected())
                consumer: AIOKafkaConsumer = self._consumer
            if tp not in consumer.assignment():
                raise Unavailable(f"{self._topic} has no partition {number}")
            reader = self._readers[tp] = PartitionReader(consumer, tp)
            try:
                yield reader
            finally:
                del self._readers[tp]
                consumer.pause(tp)
        finally:
            self._users -= 1
            if self._users == 0:
                await self._disconnect()

    async def _disconnect(self) -> None:
        async with self._changing:
            if self._users == 0:
                self._consumer = None
                await self._opened.aclose()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AIOKafkaConsumer]:
        _, count = await describe_topic(self._settings, self._topic)
        partitions = [TopicPartition(self._topic, number) for number in range(count)]
        async with open_consumer(self._settings, self._topic) as consumer:
            consumer.assign(partitions)
            for tp in partitions:
                consumer.seek(tp, 0)  # without a position aiokafka would look for one
            consumer.pause(*partitions)
            handing_out = asyncio.create_task(self._hand_out(consumer))
            try:
                yield consumer
            finally:
                handing_out.cancel()
                await asyncio.wait([handing_out])

    async def _hand_out(self, consumer: AIOKafkaConsumer) -> None:
        """Give each reader what comes for it, until cancelled."""
        while True:
            wanting = [tp for tp, reader in self._readers.items() if reader.has_room]
            if not wanting:
                await asyncio.sleep(_WAIT_FOR_ROOM_SECONDS)
                continue
            if len(wanting) == len(self._readers):
                wanting, timeout_ms = [], _LONGEST_WAIT_MS  # all, those too that come while it waits
            else:
                timeout_ms = _WAIT_FOR_ROOM_MS
            try:
                taken: Records = await consumer.getmany(*wanting, timeout_ms=timeout_ms, max_records=_READ_AT_ONCE)
            except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
                self._fail(error, error.args[0])
            except KafkaError as error:
                self._fail(error, self._readers)
            else:
                for tp, records in taken.items():
                    if reader := self._readers.get(tp):
                        reader.add(records)
            await asyncio.sleep(0)  # aiokafka does not wait while it has records

    def _fail(self, error: KafkaError, partitions: object) -> None:
        concerned = partitions if isinstance(partitions, Mapping) else self._readers
        for tp, reader in self._readers.items():
            if tp in concerned:
                reader.fail(error)


class PartitionReader:
    """Has the methods of `AIOKafkaConsumer` that are needed for one partition."""

    def __init__(self, consumer: AIOKafkaConsumer, tp: TopicPartition) -> None:
        self._consumer = consumer
        self._tp = tp
        self._waiting: deque[ConsumerRecord] = deque()
        self._bytes = 0
        self._error: KafkaError | None = None
        self._arrived = asyncio.Event()

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < _ROOM_RECORDS and self._bytes < _ROOM_BYTES and self._error is None

    def add(self, records: Sequence[ConsumerRecord]) -> None:
        """Take in what came from Kafka."""
        self._waiting.extend(records)
        self._bytes += sum(map(_size, records))
        self._arrived.set()

    def fail(self, error: KafkaError) -> None:
        """Raise this once, when what came before is read."""
        self._error = error
        self._arrived.set()

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self._waiting.clear()
        self._bytes = 0
        self._error = None
        self._arrived.clear()
        self._consumer.seek(tp, offset)
        self._consumer.resume(tp)

    async def getmany(self, *_: TopicPartition, timeout_ms: int = 0, max_records: int = _READ_AT_ONCE) -> Records:
        if timeout_ms and not self._arrived.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_ms / 1000):
                    await self._arrived.wait()
        if not self._waiting:
            error, self._error = self._error, None
            self._arrived.clear()
            if error is not None:
                raise error
            return {}
        taken = [self._waiting.popleft() for _ in range(min(max_records, len(self._waiting)))]
        self._bytes -= sum(map(_size, taken))
        if not self._waiting and self._error is None:
            self._arrived.clear()
        return {self._tp: taken}

    async def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._consumer.beginning_offsets(partitions)  # type: ignore[no-any-return]

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._consumer.end_offsets(partitions)  # type: ignore[no-any-return]

    def highwater(self, tp: TopicPartition) -> int | None:
        return self._consumer.highwater(tp)  # type: ignore[no-any-return]


def _size(record: ConsumerRecord) -> int:
    return len(record.value or b"")
