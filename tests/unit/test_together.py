"""`Together`: what is asked while one is under way goes together as the next."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from projector.together import Together


class Work:
    """Adds numbers up, each time only when the test lets it."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.asked: list[Sequence[int]] = []
        self._may_end = threading.Semaphore(0)
        self._fails = False
        self.call = Together(self._add, threads)

    def _add(self, numbers: Sequence[int]) -> int:
        self.asked.append(numbers)
        assert self._may_end.acquire(timeout=10)
        if self._fails:
            self._fails = False
            raise LookupError(numbers)
        return sum(numbers)

    def end(self, *, fails: bool = False) -> None:
        """Let the one under way end."""
        self._fails = fails
        self._may_end.release()

    async def is_under_way(self, number: int) -> None:
        """Wait until the work was called so often."""
        async with asyncio.timeout(10):
            while len(self.asked) < number:  # noqa: ASYNC110 - it is called in another thread
                await asyncio.sleep(0.001)


@pytest.fixture
def work() -> Iterator[Work]:
    with ThreadPoolExecutor(1) as threads:
        yield Work(threads)


async def test_what_comes_meanwhile_goes_together(work: Work) -> None:
    first = asyncio.create_task(work.call(1))
    await work.is_under_way(1)
    others = [asyncio.create_task(work.call(number)) for number in (2, 3, 4)]
    await asyncio.sleep(0)
    work.end()
    assert await first == 1
    await work.is_under_way(2)
    last = asyncio.create_task(work.call(5))
    work.end()
    assert await asyncio.gather(*others) == [9, 9, 9]
    work.end()
    assert await last == 5
    assert work.asked == [[1], [2, 3, 4], [5]]


async def test_those_who_ask_in_the_same_moment_go_together(work: Work) -> None:
    work.end()
    assert await asyncio.gather(*(work.call(number) for number in (1, 2))) == [3, 3]
    assert work.asked == [[1, 2]]


async def test_an_error_is_told_to_each_who_had_a_part_in_it(work: Work) -> None:
    work.end(fails=True)
    told = await asyncio.gather(work.call(1), work.call(2), return_exceptions=True)
    assert [type(one) for one in told] == [LookupError, LookupError]
    work.end()
    assert await work.call(3) == 3


async def test_who_is_cancelled_while_waiting_is_left_out(work: Work) -> None:
    first = asyncio.create_task(work.call(1))
    await work.is_under_way(1)
    cancelled, other = asyncio.create_task(work.call(2)), asyncio.create_task(work.call(3))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    work.end()
    work.end()
    assert (await first, await other) == (1, 3)


@pytest.mark.parametrize("fails", [False, True])
async def test_who_is_cancelled_while_it_is_under_way_waits_until_it_is_over(work: Work, *, fails: bool) -> None:
    cancelled = asyncio.create_task(work.call(1))
    await work.is_under_way(1)
    for _ in range(3):
        cancelled.cancel()
        await asyncio.sleep(0.01)
        assert not cancelled.done()
    work.end(fails=fails)
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    work.end()
    assert await work.call(2) == 2
