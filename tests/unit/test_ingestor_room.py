"""Room for the batches of all partitions that are on their way."""

import asyncio

from ingestor.writer import _Room


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
