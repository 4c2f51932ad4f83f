"""`ingestor.reading`: one consumer for the partitions of a process, without Kafka."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CorruptRecordException, KafkaError, OffsetOutOfRangeError, TopicAuthorizationFailedError

import ingestor.reading
import shared.kafka
from ingestor.reading import _ROOM_BYTES, _ROOM_RECORDS, PartitionReader, _HandingOut
from shared.errors import Unavailable

ONE, TWO = TopicPartition("commands", 0), TopicPartition("commands", 1)


def record(tp: TopicPartition, offset: int, size: int = 1) -> Any:
    return SimpleNamespace(topic=tp.topic, partition=tp.partition, offset=offset, value=b"." * size)


def records(tp: TopicPartition, *offsets: int) -> list[Any]:
    return [record(tp, offset) for offset in offsets]


class Consumer:
    """Behaves as aiokafka's does with errors of partitions."""

    def __init__(self) -> None:
        self.has: dict[TopicPartition, list[Any] | KafkaError] = {}
        self.resting: set[TopicPartition] = set()
        self.sought: dict[TopicPartition, int] = {}
        self.error: KafkaError | None = None
        self.silent: set[TopicPartition] = set()
        """Those for which Kafka answers nothing any more."""
        self.answers = 0
        self.fetching: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fetcher = SimpleNamespace(_records=self.has, error_future=self.fetching)
        self._arrived = asyncio.Event()

    def assignment(self) -> set[TopicPartition]:
        return {ONE, TWO}

    def paused(self) -> set[TopicPartition]:
        return set(self.resting)

    def last_poll_timestamp(self, tp: TopicPartition) -> int:
        self.answers += tp not in self.silent
        return self.answers if tp not in self.silent else 0

    def pause(self, tp: TopicPartition) -> None:
        self.resting.add(tp)

    def resume(self, tp: TopicPartition) -> None:
        self.resting.discard(tp)

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self.sought[tp] = offset
        self.has.pop(tp, None)

    def bring(self, tp: TopicPartition, what: list[Any] | KafkaError) -> None:
        if tp not in self.resting:
            self.has[tp] = what if isinstance(what, KafkaError) else [*what]
            self._arrived.set()

    def break_off(self, error: KafkaError) -> None:
        self.error = error
        self._arrived.set()

    def _met(self, tp: TopicPartition, error: KafkaError) -> KafkaError:
        """Give an error, once. What is damaged is held until it is asked for again, and has nothing to give then."""
        if isinstance(error, OffsetOutOfRangeError):
            del self.has[tp]
        else:
            self.has[tp] = []
        return error

    async def getone(self) -> Any:
        while True:
            for tp, what in [*self.has.items()]:
                if isinstance(what, KafkaError):
                    raise self._met(tp, what)
                if what:
                    return self.has[tp].pop(0)
            if self.error:
                raise self.error
            self._arrived.clear()
            await self._arrived.wait()

    async def getmany(self, tp: TopicPartition, *, timeout_ms: int) -> dict[TopicPartition, Sequence[Any]]:
        assert timeout_ms == 0
        what = self.has.get(tp, [])
        if isinstance(what, KafkaError):
            raise self._met(tp, what)
        self.has.pop(tp, None)
        return {tp: what} if what else {}


@asynccontextmanager
async def handing_out(consumer: Consumer) -> AsyncIterator[_HandingOut]:
    it = _HandingOut(consumer)
    tasks = [asyncio.create_task(work) for work in (it.run(), it.look_on())]
    try:
        yield it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def next_offsets(reader: PartitionReader) -> list[int]:
    async with asyncio.timeout(5):
        return [each.offset for each in await reader.next_records()]


async def test_each_gets_its_own_records_in_order() -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 7) as one, it.begin(TWO, 3) as two:
            assert consumer.sought == {ONE: 7, TWO: 3}
            consumer.bring(ONE, records(ONE, 7, 8, 9))
            consumer.bring(TWO, records(TWO, 3))
            assert await next_offsets(one) == [7, 8, 9]
            assert await next_offsets(two) == [3]


async def test_at_most_so_many_at_a_time() -> None:
    reader = PartitionReader(rest=lambda: None, go_on=lambda: None)
    reader.give(records(ONE, *range(5)))
    assert [each.offset for each in await reader.next_records(3)] == [0, 1, 2]
    assert [each.offset for each in await reader.next_records(3)] == [3, 4]


@pytest.mark.parametrize("error", [OffsetOutOfRangeError({ONE: 7}), CorruptRecordException("damaged")])
@pytest.mark.parametrize("order", [(ONE, TWO), (TWO, ONE)])
async def test_the_error_of_one_partition_is_told_to_its_reader_alone(
    error: KafkaError, order: Sequence[TopicPartition]
) -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 7) as one, it.begin(TWO, 3) as two:
            for tp in order:  # both are there when the error is met
                consumer.bring(tp, error if tp == ONE else records(TWO, 3))
            with pytest.raises(type(error)):
                await next_offsets(one)
            assert await next_offsets(two) == [3]
            assert ONE in consumer.resting
            assert TWO not in consumer.resting
            consumer.bring(TWO, records(TWO, 4))
            assert await next_offsets(two) == [4]
        with it.begin(ONE, 8) as one:
            consumer.bring(ONE, records(ONE, 8))
            assert await next_offsets(one) == [8]


@pytest.mark.parametrize("error", [TopicAuthorizationFailedError("commands"), KafkaError("no more")])
async def test_what_concerns_no_partition_in_particular_is_told_to_all(error: KafkaError) -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 0) as one, it.begin(TWO, 0) as two:
            consumer.break_off(error)
            for reader in (one, two):
                with pytest.raises(type(error)):
                    await next_offsets(reader)
        with pytest.raises(Unavailable, match="reading commands: "), it.begin(ONE, 0):
            pass


async def test_nobody_waits_for_a_consumer_that_has_stopped_fetching() -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 0) as one:
            await asyncio.sleep(0)
            consumer.fetching.set_result(None)
            with pytest.raises(Unavailable, match="has stopped fetching"):
                await next_offsets(one)
        with pytest.raises(Unavailable, match="has stopped fetching"), it.begin(ONE, 0):
            pass


async def test_records_that_came_before_an_error_are_read_first() -> None:
    reader = PartitionReader(rest=lambda: None, go_on=lambda: None)
    reader.give(records(ONE, 0))
    reader.fail(KafkaError("no more"))
    assert await next_offsets(reader) == [0]
    for _ in range(2):
        with pytest.raises(KafkaError, match="no more"):
            await next_offsets(reader)


@pytest.mark.parametrize("waiting", [records(ONE, *range(_ROOM_RECORDS)), [record(ONE, 0, _ROOM_BYTES)] * 2])
async def test_whoever_does_not_take_its_records_is_given_no_more(waiting: list[Any]) -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 0) as one:
            consumer.bring(ONE, waiting)
            await asyncio.sleep(0.01)
            assert ONE in consumer.resting
            await one.next_records(len(waiting) // 2 - 1)
            assert ONE in consumer.resting
            await one.next_records(len(waiting))
            assert ONE not in consumer.resting


async def test_a_partition_that_failed_is_not_asked_for_again_when_its_records_are_taken() -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 0) as one:
            consumer.bring(ONE, records(ONE, *range(_ROOM_RECORDS)))
            await asyncio.sleep(0.01)
            one.fail(KafkaError("no more"))
            assert len(await one.next_records(_ROOM_RECORDS)) == _ROOM_RECORDS
            assert ONE in consumer.resting


async def test_who_leaves_is_given_nothing_and_may_come_again() -> None:
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 7), pytest.raises(RuntimeError, match="is being read already"), it.begin(ONE, 7):
            pass
        assert ONE in consumer.resting
        with it.begin(ONE, 9) as again:
            assert ONE not in consumer.resting
            consumer.bring(ONE, records(ONE, 9))
            assert await next_offsets(again) == [9]


async def test_a_partition_that_is_not_there() -> None:
    async with handing_out(Consumer()) as it:
        with (
            pytest.raises(Unavailable, match="commands has no partition 2"),
            it.begin(TopicPartition("commands", 2), 0),
        ):
            pass


async def test_a_partition_for_which_kafka_answers_nothing_any_more_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestor.reading, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(shared.kafka, "_UNANSWERED_SECONDS", 0.05)
    consumer = Consumer()
    consumer.silent = {TWO}
    async with handing_out(consumer) as it:
        with it.begin(ONE, 0) as one, it.begin(TWO, 0) as two:
            with pytest.raises(Unavailable, match="reading commands/1: Kafka does not answer"):
                await next_offsets(two)
            assert TWO in consumer.resting
            consumer.bring(ONE, records(ONE, 0))
            assert await next_offsets(one) == [0]


async def test_a_reader_that_has_no_room_waits_for_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingestor.reading, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(ingestor.reading, "_ROOM_RECORDS", 2)
    consumer = Consumer()
    async with handing_out(consumer) as it:
        with it.begin(ONE, 0) as one:
            consumer.bring(ONE, records(ONE, 0, 1, 2, 3, 4))
            consumer.silent = {ONE}
            for _ in range(20):
                await asyncio.sleep(0)
            assert ONE in consumer.resting
            monkeypatch.setattr(shared.kafka, "_UNANSWERED_SECONDS", 1e-9)
            for _ in range(20):
                await asyncio.sleep(0)
            consumer.silent = set()
            assert await next_offsets(one) == [0, 1, 2, 3, 4]
            consumer.bring(ONE, records(ONE, 5))
            assert await next_offsets(one) == [5]
