"""What must hold of our use of Kafka's client, without Kafka."""

import asyncio
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from shared.kafka import ends


class Answering:
    """A consumer whose answer comes when the test says so."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[dict[TopicPartition, int]] = asyncio.get_running_loop().create_future()

    async def end_offsets(self, _: Any) -> dict[TopicPartition, int]:
        return await self.answer


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_cancellation_is_not_lost_when_the_answer_comes_at_the_same_moment(turns: int) -> None:
    consumer = Answering()
    asking = asyncio.create_task(ends(cast(AIOKafkaConsumer, consumer), "events", [0]))
    await asyncio.sleep(0.01)
    consumer.answer.set_result({TopicPartition("events", 0): 7})
    for _ in range(turns):
        await asyncio.sleep(0)
    if asking.cancel():
        with pytest.raises(asyncio.CancelledError):
            await asking
