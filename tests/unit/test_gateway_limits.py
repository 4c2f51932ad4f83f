"""Who may have how much at once, and how often somebody may come."""

import asyncio

import pytest
from limits import parse

from gateway.auth import Caller
from gateway.limits import AdaptiveSize, Brake, LatencyLimit, Limit, ShareExceeded, TooMany
from gateway.problems import Problem
from gateway.rates import RateLimitedAuthenticator
from shared.errors import Unavailable
from tests.unit.gateway_fakes import Gateway

EPISODES = "/namespaces/alice/projects/robotics/episodes"
TARGET = 0.3
PATIENCE = 20


def latency_limit(most: int, *, least: int) -> LatencyLimit:
    return LatencyLimit("writes", AdaptiveSize(least=least, greatest=most, target=TARGET))


def taken_by(limit: Limit, caller: str) -> int:
    """How much the limit gives this caller, who takes all that there is."""
    for taken in range(1_000_000):
        try:
            limit.take(caller)
        except (Unavailable, ShareExceeded):
            return taken
    raise AssertionError("there is no limit")


def test_more_than_there_is_is_given_to_nobody() -> None:
    limit = Limit(10, "things")
    with pytest.raises(Unavailable, match="Too many things are under way"):
        limit.take("alice", 11)
    limit.take("alice", 10)
    with pytest.raises(Unavailable):
        limit.take("bob")
    limit.give_back("alice", 3)
    limit.take("bob")
    assert limit.taken == 8


def test_one_caller_alone_gets_half_and_two_a_third_each() -> None:
    limit = Limit(1200, "things")
    assert taken_by(limit, "alice") == 600
    assert taken_by(limit, "bob") == 300
    limit.give_back("alice", 200)
    assert 600 - 200 + taken_by(limit, "alice") == 450
    limit.give_back("alice", 50)
    assert 300 + taken_by(limit, "bob") == 400 == 450 - 50


def test_whoever_asks_for_little_finds_something_beside_many_who_want_all() -> None:
    limit = Limit(1000, "things")
    greedy = [taken_by(limit, f"greedy-{number}") for number in range(8)]
    with pytest.raises(ShareExceeded, match="more than your share of things"):
        limit.take("greedy-0")
    limit.take("modest")
    assert sum(greedy) + 1 == limit.taken < 1000


def test_a_limit_forgets_who_holds_nothing() -> None:
    limit = Limit(1000, "things")
    for number in range(100):
        limit.take(f"caller-{number}")
        limit.give_back(f"caller-{number}")
    with pytest.raises(Unavailable):
        limit.take("alice", 1001)
    limit.check("bob")
    assert (limit.taken, len(limit._held)) == (0, 0)


def served(limit: LatencyLimit, *, rate: float, seconds: float, caller: str = "alice", now: float = 0) -> float:
    """A server that does ``rate`` a second, and a caller who takes all they can get. The time when it ends."""
    waiting: list[float] = []
    end = now + seconds
    while now < end:
        waiting += [now] * taken_by(limit, caller)
        now += 1 / rate
        limit.observe(waiting.pop(0), now)
        limit.give_back(caller)
    limit.give_back(caller, len(waiting))
    return now


def test_the_limit_falls_until_nobody_waits_longer_than_the_target() -> None:
    limit = latency_limit(4096, least=8)
    served(limit, rate=10_000, seconds=5)
    assert limit.most == 4096
    served(limit, rate=1000, seconds=20, now=5)
    assert 200 * TARGET < limit.most < 2.5 * 1000 * TARGET  # half of it is one caller's


def test_the_limit_rises_again_when_the_server_is_fast_again() -> None:
    limit = latency_limit(4096, least=8)
    now = served(limit, rate=100, seconds=60)
    assert limit.most < 100
    served(limit, rate=10_000, seconds=1, now=now)
    assert limit.most > 2000


def test_the_limit_does_not_fall_below_what_is_always_allowed() -> None:
    limit = latency_limit(4096, least=128)
    served(limit, rate=1, seconds=500)
    assert limit.most == 128


def test_who_asks_for_little_is_let_in_while_more_is_out_than_the_fallen_limit_allows() -> None:
    limit = latency_limit(1000, least=128)
    served(limit, rate=10_000, seconds=5)
    limit.take("greedy", 500)
    limit.observe(began_at=5, ended_at=5 + 4 * TARGET)
    assert limit.most < limit.taken
    assert [taken_by(limit, caller) for caller in ("greedy", "alice", "bob")] == [0, 8, 8]
    limit.give_back("greedy", 400)
    assert taken_by(limit, "alice") > 0


def test_nobody_is_let_in_when_as_much_is_out_as_there_may_ever_be() -> None:
    limit = latency_limit(10, least=10)
    assert [taken_by(limit, caller) for caller in ("alice", "bob", "carol")] == [8, 2, 0]


def test_the_limit_stays_where_nobody_wants_more() -> None:
    limit = latency_limit(4096, least=128)
    for _ in range(100):
        limit.take("alice")
        limit.observe(began_at=2, ended_at=2.1)
        limit.give_back("alice")
    assert limit.most == 128


def test_those_that_began_before_the_limit_fell_do_not_lower_it_again() -> None:
    limit = latency_limit(4096, least=128)
    served(limit, rate=10_000, seconds=5)
    limit.take("alice", 2000)
    for _ in range(100):
        limit.observe(began_at=5, ended_at=5.4)
    assert limit.most == 3000
    limit.observe(began_at=5.4, ended_at=6)
    assert limit.most == 1500
    limit.observe(began_at=6, ended_at=16)
    assert limit.most == 375


async def test_a_write_that_would_be_refused_is_refused_before_its_body_is_read() -> None:
    gateway = Gateway()
    gateway.dispatcher.busy = ShareExceeded("You have more than your share")

    async def endless() -> object:
        while True:
            yield b" "
            await asyncio.sleep(0)

    for path in (EPISODES, "/v1/episodes"):
        headers = {"Content-Type": "application/json"}
        async with asyncio.timeout(5):
            response = await gateway.ask("POST", path, content=endless(), headers=headers)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["code"] == "rate_limited"
    assert len(gateway.dispatcher.checked) == 2


async def test_who_asks_for_too_much_waits_for_the_refusal() -> None:
    gateway = Gateway(gateway_refusal_seconds=PATIENCE)
    for busy in (ShareExceeded("You have more than your share"), TooMany("Too many writes are under way")):
        gateway.dispatcher.busy = busy
        asking = asyncio.ensure_future(gateway.ask("POST", EPISODES, json={"name": "run-042"}))
        await asyncio.sleep(0.1)  # far less than the refusal takes, and time enough for one that comes at once
        assert not asking.done()
        asking.cancel()
    gateway.dispatcher.busy = Unavailable("Kafka does not answer")
    async with asyncio.timeout(PATIENCE / 2):
        assert (await gateway.ask("POST", EPISODES, json={"name": "run-042"})).status_code == 503


async def test_not_everybody_can_be_kept_waiting() -> None:
    brake = Brake(PATIENCE)
    kept = [asyncio.ensure_future(brake.hold()) for _ in range(4096)]
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE / 2):
        await brake.hold()
    for one in kept:
        one.cancel()
    await asyncio.wait(kept)
    one_more = asyncio.ensure_future(brake.hold())
    await asyncio.sleep(0.01)
    assert not one_more.done()
    one_more.cancel()


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    gateway = Gateway(gateway_body_seconds=0.05)

    async def stuck() -> object:
        yield b"{"
        await asyncio.Event().wait()

    response = await gateway.ask("POST", EPISODES, content=stuck(), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (408, "request_timeout")
    assert response.headers["connection"] == "close"


class Known:
    """Believes what it is told."""

    async def caller(self, authorization: str | None) -> Caller:
        return Caller(str(authorization), frozenset())


async def test_a_caller_may_come_so_often_and_others_as_often() -> None:
    authenticator = RateLimitedAuthenticator(Known(), parse("3/minute"))
    for caller in ("alice", "bob"):
        for _ in range(3):
            await authenticator.caller(caller)
        with pytest.raises(Problem, match="You may send 3 per 1 minute") as refused:
            await authenticator.caller(caller)
        assert refused.value.code == "rate_limited"
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 60


async def test_the_rate_limit_holds_for_both_apis() -> None:
    gateway = Gateway(gateway_rate_limit="2/hour")
    for path in (EPISODES, "/v1/episodes/ep_1?tenant_id=my-app"):
        answers = [(await gateway.ask("GET", path)).status_code for _ in range(3)]
        assert answers == [404, 404, 429]


async def test_without_a_rate_limit_nobody_is_counted() -> None:
    gateway = Gateway()
    assert {(await gateway.ask("GET", EPISODES)).status_code for _ in range(50)} == {404}
