"""`ingestor.lending`: one resource for all who need it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ingestor.lending import Lent


class Opener:
    """Makes numbers, and notes with what each was left."""

    def __init__(self) -> None:
        self.opened = 0
        self.left_with: dict[int, BaseException | None] = {}
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.fails = False

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[int]:
        self.opened += 1
        number = self.opened
        await self.may_open.wait()
        if self.fails:
            raise OSError("cannot be opened")
        try:
            yield number
        except BaseException as error:
            self.left_with[number] = error
            raise
        self.left_with[number] = None


async def borrow(lent: Lent[int], until: asyncio.Event, error: Exception | None = None) -> int:
    async with lent.borrow() as number:
        await until.wait()
        if error is not None:
            raise error
        return number


async def started(lent: Lent[int], until: asyncio.Event, error: Exception | None = None) -> "asyncio.Task[int]":
    task = asyncio.create_task(borrow(lent, until, error))
    await asyncio.sleep(0.01)
    return task


async def test_all_have_the_same_and_the_last_closes_it() -> None:
    opener, first, second = Opener(), asyncio.Event(), asyncio.Event()
    lent = Lent(opener)
    tasks = [await started(lent, first), await started(lent, second)]
    first.set()
    assert await tasks[0] == 1
    assert not opener.left_with
    assert await (await started(lent, first)) == 1
    second.set()
    assert await tasks[1] == 1
    assert opener.left_with == {1: None}
    assert await (await started(lent, first)) == 2


async def test_after_an_error_others_go_on_and_who_comes_later_gets_a_new_one() -> None:
    opener, now, later = Opener(), asyncio.Event(), asyncio.Event()
    lent = Lent(opener)
    going_on = await started(lent, later)
    broken = await started(lent, now, OSError("broken"))
    now.set()
    with pytest.raises(OSError, match="broken"):
        await broken
    assert not opener.left_with  # one goes on with it
    assert await (await started(lent, now)) == 2
    assert opener.left_with == {2: None}
    later.set()
    assert await going_on == 1
    assert opener.left_with == {1: None, 2: None}


async def test_the_last_closes_it_with_its_error() -> None:
    opener, now = Opener(), asyncio.Event()
    now.set()
    with pytest.raises(OSError, match="broken"):
        await borrow(Lent(opener), now, OSError("broken"))
    assert isinstance(opener.left_with[1], OSError)


async def test_a_cancelled_user_takes_it_from_nobody() -> None:
    opener, until = Opener(), asyncio.Event()
    lent = Lent(opener)
    cancelled, other = await started(lent, until), await started(lent, until)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert not opener.left_with
    until.set()
    assert await other == 1
    assert await (await started(lent, until)) == 2


async def test_all_who_wait_hear_that_it_cannot_be_opened_and_the_next_tries_again() -> None:
    opener, until = Opener(), asyncio.Event()
    opener.may_open.clear()
    opener.fails = True
    lent = Lent(opener)
    tasks = [await started(lent, until), await started(lent, until)]
    opener.may_open.set()
    for task in tasks:
        with pytest.raises(OSError, match="cannot be opened"):
            await task
    assert opener.opened == 1
    opener.fails = False
    until.set()
    assert await borrow(lent, until) == 2


async def test_opening_ends_when_nobody_waits_any_more() -> None:
    opener, until = Opener(), asyncio.Event()
    opener.may_open.clear()
    lent = Lent(opener)
    task = await started(lent, until)
    task.cancel()
    await asyncio.wait([task])
    opener.may_open.set()
    until.set()
    assert await borrow(lent, until) == 2
    assert opener.left_with == {2: None}
