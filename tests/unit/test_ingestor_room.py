"""Room for the batches of all partitions that are on their way."""

import asyncio
from types import SimpleNamespace
from typing import Any

from ingestor.tenure import Batch
from ingestor.writer import _Pipeline, _Room
from shared.ids import Position


class Producer:
    """Never acknowledges anything."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    def create_batch(self) -> Any:
        return SimpleNamespace(append=lambda **_: object(), close=lambda: None)

    async def send_batch(self, *_: Any, **__: Any) -> "asyncio.Future[None]":
        self.waiting.append(asyncio.get_running_loop().create_future())
        return asyncio.shield(self.waiting[-1])


async def test_a_tenure_that_ends_takes_no_room_from_others_whatever_becomes_of_its_batches() -> None:
    room, producer = _Room(100), Producer()
    pipeline = _Pipeline(None, producer, None, 8, room, 0)  # type: ignore[arg-type]
    for number in range(2):
        await pipeline.send(Batch(number, Position(0), size=40))
    pipeline.leave()
    async with asyncio.timeout(5):
        await room.take(100)
    assert not any(future.cancelled() for future in producer.waiting)
    producer.waiting[0].set_result(None)
    producer.waiting[1].set_exception(OSError("not acknowledged"))
    await asyncio.sleep(0)
    assert room._taken == 100


async def test_what_does_not_fit_waits_until_enough_is_given_back() -> None:
    room = _Room(100)
    await room.take(60)
    await room.take(40)
    waiting = [asyncio.create_task(room.take(50)) for _ in range(2)]
    await asyncio.sleep(0.01)
    room.give_back(40)
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    room.give_back(60)
    await asyncio.sleep(0.01)
    assert all(task.done() for task in waiting)


async def test_what_is_larger_than_all_of_it_goes_alone() -> None:
    room = _Room(100)
    await room.take(1)
    large = asyncio.create_task(room.take(1_000))
    await asyncio.sleep(0.01)
    assert not large.done()
    room.give_back(1)
    await large
    small = asyncio.create_task(room.take(1))
    await asyncio.sleep(0.01)
    assert not small.done()
    room.give_back(1_000)
    await small


async def test_nobody_overtakes_a_large_batch() -> None:
    room = _Room(100)
    await room.take(60)
    large = asyncio.create_task(room.take(90))
    await asyncio.sleep(0.01)
    small = asyncio.create_task(room.take(10))
    await asyncio.sleep(0.01)
    assert not small.done()
    room.give_back(60)
    await large
    await small


async def test_what_is_acknowledged_or_failed_is_given_back() -> None:
    room = _Room(100)
    for outcome in ("acknowledged", "failed", "cancelled"):
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(5):
            await room.take(100)
        sent.add_done_callback(lambda done: room.give_back_after(100, done))
        if outcome == "acknowledged":
            sent.set_result(None)
        elif outcome == "failed":
            sent.set_exception(OSError("not acknowledged"))
        else:
            sent.cancel()
        await asyncio.sleep(0)
