"""Topics of tests on Kafka alone: made anew, and read as a whole."""

import asyncio
from collections.abc import Awaitable, Callable

from aiokafka import ConsumerRecord

from shared.kafka import ends, open_admin, open_partition, read_to, starts
from shared.settings import KafkaSettings
from shared.topics import TopicSettings, create_topics


async def remake_topics(kafka: KafkaSettings, partitions: int) -> None:
    """Empty topics: every test begins with a log of its own."""
    async with open_admin(kafka) as admin:
        while names := [name for name in await admin.list_topics() if name.startswith("episodes.")]:
            await admin.delete_topics(names)
            await asyncio.sleep(0.1)
    await create_topics(kafka, TopicSettings(partitions=partitions))


async def everything(kafka: KafkaSettings, topic: str, partition: int) -> list[ConsumerRecord]:
    """All records of a partition."""
    async with open_partition(kafka, topic, partition) as consumer:
        first = (await starts(consumer, topic, [partition]))[partition]
        end = (await ends(consumer, topic, [partition]))[partition]
        read = read_to(consumer, topic, partition, first, end)
        return [record async for records in read for record in records]


async def until(condition: Callable[[], Awaitable[bool]], *, within: float = 30) -> None:
    """Wait for something to be true."""
    async with asyncio.timeout(within):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.05)
