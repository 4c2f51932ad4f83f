"""One consumer for all partitions of a topic, on a real Kafka."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.errors import OffsetOutOfRangeError

from shared.errors import Unavailable
from shared.kafka import describe_topic, open_producer
from shared.settings import KafkaSettings
from shared.topic_consumer import PartitionReader, TopicConsumer
from tests.cluster import ThrowAwayServers
from tests.e2e.load import eventually

WITHIN = 30.0


class Topic:
    """A topic of its own with three partitions."""

    def __init__(self, kafka: KafkaSettings, name: str, producer: AIOKafkaProducer, admin: AIOKafkaAdminClient) -> None:
        self.kafka = kafka
        self.name = name
        self.admin = admin
        self._producer = producer

    def tp(self, number: int) -> TopicPartition:
        return TopicPartition(self.name, number)

    async def write(self, number: int, *values: bytes) -> None:
        for sent in [await self._producer.send(self.name, value, partition=number) for value in values]:
            await sent

    async def read(self, reader: PartitionReader, number: int, count: int) -> list[bytes]:
        """So many values, or whatever came in time."""
        values: list[bytes] = []
        async with asyncio.timeout(WITHIN):
            while len(values) < count:
                taken = await reader.getmany(timeout_ms=200, max_records=3)
                assert taken.keys() <= {self.tp(number)}
                values += [record.value for records in taken.values() for record in records]
        return values


async def known(kafka: KafkaSettings, name: str) -> bool:
    with contextlib.suppress(Unavailable):
        await describe_topic(kafka, name)
        return True
    return False


@pytest.fixture
async def topic(servers: ThrowAwayServers) -> AsyncIterator[Topic]:
    kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap)
    name = f"topic-{uuid.uuid4()}"
    admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(name, num_partitions=3, replication_factor=1)])
    await eventually(lambda: known(kafka, name), what="the topic is known to the broker")
    async with open_producer(kafka) as producer:
        yield Topic(kafka, name, producer, admin)
    await admin.delete_topics([name])
    await admin.close()


async def test_each_reader_gets_what_is_in_its_partition_from_where_it_seeks(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    async with consumer.partition(0) as zero, consumer.partition(2) as two:
        await topic.write(0, b"a", b"b", b"c", b"d", b"e")
        await topic.write(1, b"nobody reads this")
        await topic.write(2, b"x", b"y")
        zero.seek(topic.tp(0), 1)
        two.seek(topic.tp(2), 0)
        assert await topic.read(zero, 0, 4) == [b"b", b"c", b"d", b"e"]
        assert await topic.read(two, 2, 2) == [b"x", b"y"]
        assert await zero.getmany(timeout_ms=50) == {}
        assert zero.highwater(topic.tp(0)) == 5
        assert await zero.end_offsets([topic.tp(0)]) == {topic.tp(0): 5}


async def test_a_seek_throws_away_what_was_fetched_before_it(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    await topic.write(0, *(b"%d" % number for number in range(100)))
    async with consumer.partition(0) as reader:
        reader.seek(topic.tp(0), 0)
        assert await topic.read(reader, 0, 3) == [b"0", b"1", b"2"]
        reader.seek(topic.tp(0), 90)
        assert await topic.read(reader, 0, 10) == [b"%d" % number for number in range(90, 100)]


async def test_a_reader_that_comes_later_waits_for_nobody(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    async with consumer.partition(0) as idle:
        idle.seek(topic.tp(0), 0)
        assert await idle.getmany(timeout_ms=300) == {}
        await topic.write(1, b"a")
        async with consumer.partition(1) as late:
            late.seek(topic.tp(1), 0)
            assert await topic.read(late, 1, 1) == [b"a"]
        async with consumer.partition(1) as again:
            again.seek(topic.tp(1), 0)
            assert await topic.read(again, 1, 1) == [b"a"]


async def test_who_does_not_read_holds_nobody_up_and_loses_nothing(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    many = [b"%d" % number + b"x" * 3_000 for number in range(5_000)]
    await topic.write(0, *many)
    async with consumer.partition(0) as slow, consumer.partition(1) as quick:
        slow.seek(topic.tp(0), 0)
        quick.seek(topic.tp(1), 0)
        for number in range(20):
            await topic.write(1, b"%d" % number)
            assert await topic.read(quick, 1, 1) == [b"%d" % number]
        assert not slow.has_room
        assert await topic.read(slow, 0, len(many)) == many


async def test_what_is_gone_from_one_partition_is_an_error_of_its_reader_alone(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    await topic.write(0, b"a", b"b")
    await topic.write(1, b"x")
    await topic.admin.delete_records({topic.tp(0): RecordsToDelete(before_offset=1)})
    async with consumer.partition(0) as gone, consumer.partition(1) as whole:
        gone.seek(topic.tp(0), 0)
        whole.seek(topic.tp(1), 0)
        with pytest.raises(OffsetOutOfRangeError):
            await topic.read(gone, 0, 1)
        assert await topic.read(whole, 1, 1) == [b"x"]
        gone.seek(topic.tp(0), 1)
        assert await topic.read(gone, 0, 1) == [b"b"]


async def test_the_last_reader_disconnects_and_the_next_one_connects_again(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    await topic.write(0, b"a")
    for _ in range(2):
        async with consumer.partition(0) as reader:
            reader.seek(topic.tp(0), 0)
            assert await topic.read(reader, 0, 1) == [b"a"]
        assert not [task for task in asyncio.all_tasks() if "_hand_out" in repr(task)]


async def test_a_partition_that_is_not_there_is_told(topic: Topic) -> None:
    with pytest.raises(Unavailable, match="has no partition 3"):
        async with TopicConsumer(topic.kafka, topic.name).partition(3):
            pass


async def test_two_readers_of_one_partition_are_a_bug(topic: Topic) -> None:
    consumer = TopicConsumer(topic.kafka, topic.name)
    async with consumer.partition(0):
        with pytest.raises(RuntimeError, match="is being read already"):
            async with consumer.partition(0):
                pass
