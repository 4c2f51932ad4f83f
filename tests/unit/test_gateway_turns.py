"""Whose turn it is, when more is wanted than may be under way."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterable

import pytest

from gateway.limits import AdaptiveSize, ShareExceeded, TooMany
from gateway.turns import FairQueue
from shared.errors import Unavailable

LONG_AGO, TARGET = float("-inf"), 1e9


class Clock:
    """Stands still, but for what the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gateway.turns._clock", clock)
    return clock


def queue(most: int, patience: float = TARGET) -> FairQueue:
    return FairQueue(AdaptiveSize(least=most, greatest=most, target=TARGET), patience)


class Callers:
    """Callers who want a turn each time they are told to; who was let in, in order."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.let_in: list[str] = []
        self.asked: list[asyncio.Task[None]] = []

    def ask(self, caller: str, times: int = 1, cost: int = 1) -> list[asyncio.Task[None]]:
        asked = [asyncio.ensure_future(self._enter(caller, cost)) for _ in range(times)]
        self.asked += asked
        return asked

    async def _enter(self, caller: str, cost: int) -> None:
        await self.queue.enter(caller, cost)
        self.let_in.append(caller)

    async def leave(self, times: int, cost: int = 1) -> str:
        """So many end, one by one; who is let in meanwhile."""
        before = len(self.let_in)
        for _ in range(times):
            self.queue.leave(cost, LONG_AGO)
            await turns()
        return "".join(self.let_in[before:])

    def give_up(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_nobody_waits_while_there_is_room() -> None:
    callers = Callers(queue(10))
    callers.ask("a", 10)
    await turns()
    assert callers.let_in == ["a"] * 10
    callers.ask("a")
    await turns()
    assert len(callers.let_in) == 10
    assert await callers.leave(1) == "a"
    assert callers.queue.under_way == 10


async def test_one_caller_is_served_in_the_order_of_asking() -> None:
    it, order = queue(1), []

    async def ask(number: int) -> None:
        await it.enter("a", 1)
        order.append(number)

    asked = [asyncio.ensure_future(ask(number)) for number in range(5)]
    for _ in range(5):
        await turns()
        it.leave(1, LONG_AGO)
    assert order == [0, 1, 2, 3, 4]
    await asyncio.gather(*asked)


async def test_whoever_asks_for_little_comes_before_the_many_of_another() -> None:
    callers = Callers(queue(4))
    callers.ask("g", 100)
    await turns()
    assert await callers.leave(10) == "g" * 10
    callers.ask("m")
    await turns()
    assert "m" in await callers.leave(2)


async def test_callers_who_all_want_much_take_turns() -> None:
    callers = Callers(queue(1))
    callers.ask("a", 50)
    callers.ask("b", 50)
    callers.ask("c", 50)
    await turns()
    assert Counter(await callers.leave(90)) == {"a": 30, "b": 30, "c": 30}
    assert sorted(await callers.leave(3)) == ["a", "b", "c"]


async def test_who_asks_for_what_costs_more_gets_fewer_turns() -> None:
    callers = Callers(queue(1))
    callers.ask("a", 100)
    await turns()
    callers.ask("b", 20, cost=9)
    await turns()
    callers.queue.under_way = 1
    served: Counter[str] = Counter()
    for _ in range(50):
        callers.queue.leave(callers.queue.under_way, LONG_AGO)
        await turns()
        served[callers.let_in[-1]] += 1
    assert served == {"a": 45, "b": 5}


async def test_what_costs_more_than_there_is_goes_when_nothing_else_does() -> None:
    callers = Callers(queue(4))
    callers.ask("a", cost=100)
    await turns()
    assert callers.let_in == ["a"]
    callers.ask("b")
    await turns()
    assert callers.let_in == ["a"]
    assert await callers.leave(1, cost=100) == "b"


async def test_who_was_idle_has_saved_nothing_up() -> None:
    callers = Callers(queue(1))
    callers.ask("a", 200)
    await turns()
    await callers.leave(100)
    callers.ask("b", 50)
    await turns()
    assert Counter(await callers.leave(20)) == {"a": 10, "b": 10}


async def test_who_gives_up_waiting_takes_no_room() -> None:
    callers = Callers(queue(2))
    callers.ask("a", 2)
    await turns()
    leaving = callers.ask("b", 3)
    callers.ask("c")
    await turns()
    callers.give_up(leaving)
    await turns()
    assert await callers.leave(1) == "c"
    await callers.leave(2)
    assert (callers.queue.under_way, callers.queue._lines, len(callers.queue._by_age)) == (0, {}, 0)


async def test_who_gives_up_in_the_moment_of_being_let_in_lets_the_next_one_in() -> None:
    callers = Callers(queue(1))
    callers.ask("a")
    await turns()
    leaving = callers.ask("b")
    callers.ask("c")
    await turns()
    callers.queue.leave(1, LONG_AGO)
    callers.give_up(leaving)
    await turns()
    assert callers.let_in == ["a", "c"]
    await callers.leave(1)
    assert callers.queue.under_way == 0


async def test_all_who_wait_are_turned_away() -> None:
    callers = Callers(queue(1))
    callers.ask("a")
    await turns()
    waiting: list[Awaitable[None]] = [*callers.ask("a", 2), *callers.ask("b")]
    [gone] = callers.ask("c")
    await turns()
    callers.give_up([gone])
    callers.queue.turn_away("Kafka does not answer")
    for one in waiting:
        with pytest.raises(Unavailable, match="Kafka does not answer"):
            await one
    callers.ask("a")
    await turns()
    assert await callers.leave(1) == "a"
    await callers.leave(1)
    assert callers.queue.under_way == 0


async def test_who_gives_up_in_the_moment_of_being_turned_away_leaves_nothing_behind() -> None:
    callers = Callers(queue(1))
    callers.ask("a")
    await turns()
    leaving = callers.ask("b")
    await turns()
    callers.queue.turn_away("Kafka does not answer")
    callers.give_up(leaving)
    await turns()
    assert callers.queue.under_way == 1


async def test_what_waits_too_long_is_refused_while_others_go_on(clock: Clock) -> None:
    callers = Callers(queue(1, patience=0.2))
    callers.ask("a")
    await turns()
    late, few = callers.ask("a", 15), callers.ask("b", 8)
    await turns()
    for _ in range(3):
        clock.now += 0.1
        await callers.leave(1)
    await asyncio.wait(late)
    refused = [task.exception() for task in [*late, *few] if task.done() and task.exception()]
    assert {type(error) for error in refused} == {ShareExceeded, TooMany}
    assert len(refused) == 23 - 3
    callers.ask("a")
    await turns()
    assert await callers.leave(1) == "a"


async def test_nothing_is_refused_for_what_it_waited_while_nothing_went_on(clock: Clock) -> None:
    callers = Callers(queue(1, patience=0.1))
    callers.ask("a")
    await turns()
    waiting = callers.ask("a", 5)
    clock.now += 0.3
    assert await callers.leave(6) == "aaaaa"
    await asyncio.gather(*waiting)


async def test_nothing_is_refused_while_what_is_let_in_is_not_answered(clock: Clock) -> None:
    callers = Callers(queue(2, patience=0.1))
    callers.ask("a", 12)
    await turns()
    for _ in range(5):
        clock.now += 0.06
        callers.queue.leave(1, None)
        await turns()
    assert callers.let_in == ["a"] * 7
    assert await callers.leave(7) == "a" * 5
    await asyncio.gather(*callers.asked)


async def test_who_waits_for_what_somebody_alone_has_under_way_is_not_refused(clock: Clock) -> None:
    callers = Callers(queue(2, patience=0.1))
    callers.ask("a")
    await turns()
    clock.now += 1.1
    callers.ask("a", 30)
    await turns()
    assert callers.queue.under_way == 31
    [newcomer] = callers.ask("b")
    await turns()
    for _ in range(25):
        clock.now += 0.01
        assert await callers.leave(1) == ""
    assert await callers.leave(5) == "b"
    await newcomer


async def test_nothing_of_those_who_were_turned_away_is_kept() -> None:
    callers = Callers(queue(1))
    callers.ask("a")
    await turns()
    for caller in "bcd":
        callers.ask(caller, 2)
        await turns()
        callers.queue.turn_away("Kafka does not answer")
    assert (callers.queue._lines, callers.queue._heads, len(callers.queue._by_age)) == ({}, [], 0)
    await asyncio.wait(callers.asked)
    assert all(task.exception() for task in callers.asked[1:])


async def test_who_is_refused_much_still_gets_as_many_turns_as_others(clock: Clock) -> None:
    callers = Callers(queue(1, patience=0.02))
    callers.ask("a", 1)
    await turns()
    served = ""
    for _ in range(100):
        callers.ask("a", 20)
        callers.ask("b", 2)
        await turns()
        clock.now += 0.001
        served += await callers.leave(1)
    callers.give_up(callers.asked)
    ends = await asyncio.gather(*callers.asked, return_exceptions=True)
    assert any(isinstance(end, ShareExceeded) for end in ends)
    assert 40 <= served.count("a") <= 60


async def test_more_go_at_once_while_all_is_quick_and_fewer_when_it_is_not(clock: Clock) -> None:
    size = AdaptiveSize(least=2, greatest=100, target=0.2)
    it = FairQueue(size, patience=TARGET)
    for _ in range(40):
        room = size.most - it.under_way
        for _ in range(room):
            await it.enter("a", 1)
        it.leave(1, clock.now)
    assert size.most == 42
    it.leave(1, clock.now - 1)
    assert size.most == 10


async def test_who_is_alone_may_have_all_until_somebody_comes(clock: Clock) -> None:
    callers = Callers(queue(2))
    callers.ask("a", 100)
    await turns()
    assert len(callers.let_in) == 2
    clock.now += 1.1
    await callers.leave(1)
    callers.ask("a", 100)
    await turns()
    assert callers.let_in == ["a"] * 200
    callers.ask("b")
    callers.ask("a", 5)
    await turns()
    assert len(callers.let_in) == 200
    assert await callers.leave(199) == "ba"
    clock.now += 1.1
    assert await callers.leave(1) == "aaaa"
