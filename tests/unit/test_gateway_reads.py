"""Waiting for the read model, merging lookups, and limits."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import bson
import pytest

import gateway.queries
from gateway.exchange import ReadOptions
from gateway.paging import Slice
from gateway.problems import Problem
from gateway.queries import Merged, MongoReadModel, PageTooLarge, ReadModel
from gateway.reads import Reads
from shared.errors import Unavailable
from shared.ids import EventId, StreamId
from tests.unit.gateway_fakes import InMemoryReadModels

STREAM = StreamId("tenant:t")


async def nothing_found(_: ReadModel) -> None:
    return None


async def found(_: ReadModel) -> bytes:
    return b"{}"


def reads(models: InMemoryReadModels, *, most: int = 10, remembered: int = 2) -> Reads:
    return Reads(models, most=most, remembered=remembered)


async def test_a_read_that_is_fresh_enough_waits_for_nothing() -> None:
    models = InMemoryReadModels()
    models.model.event_ids[STREAM] = 7
    response = await reads(models).answer("alice", STREAM, ReadOptions(7, 0), found, "")
    assert response.headers["x-event-id"] == "7"
    assert models.model.polls == 1


async def test_a_read_that_is_not_fresh_in_time_is_refused() -> None:
    models = InMemoryReadModels()
    with pytest.raises(Problem) as caught:
        await reads(models).answer("alice", STREAM, ReadOptions(1, 0.3), found, "")
    assert caught.value.status == 503
    assert caught.value.headers == {"Retry-After": "1", "X-Event-Id": "0"}
    assert models.model.polls > 2


async def test_what_was_acknowledged_last_is_remembered_for_some_streams() -> None:
    models = InMemoryReadModels()
    some = reads(models)
    for stream, event_id in (("a", 3), ("a", 2), ("b", 1), ("c", 1)):
        some.remember(StreamId(stream), EventId(event_id))
    models.model.event_ids = {StreamId("c"): 1}
    await some.answer("alice", StreamId("c"), ReadOptions(None, 0), found, "")
    await some.answer("alice", StreamId("a"), ReadOptions(None, 0), found, "")  # forgotten: it does not wait
    assert models.model.polls == 2


async def test_who_read_a_stream_is_not_led_back_by_a_generation_that_is_a_moment_behind() -> None:
    models = InMemoryReadModels()
    some = reads(models)
    models.model.event_ids[STREAM] = 7
    await some.answer("alice", STREAM, ReadOptions(None, 0), found, "")
    models.model.event_ids[STREAM] = 5
    waiting = asyncio.ensure_future(some.answer("alice", STREAM, ReadOptions(None, 0), found, ""))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    models.model.event_ids[STREAM] = 8
    assert (await waiting).headers["x-event-id"] == "8"


async def test_more_reads_than_there_may_be_are_refused() -> None:
    models = InMemoryReadModels()
    few = reads(models, most=1)
    waiting = asyncio.ensure_future(few.answer("alice", STREAM, ReadOptions(1, 0.05), found, ""))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="Too many reads"):
        await few.answer("alice", STREAM, ReadOptions(None, 0), found, "")
    with pytest.raises(Problem):
        await waiting
    await few.answer("alice", STREAM, ReadOptions(None, 0), found, "")


async def test_what_is_not_found_is_404_with_how_far_the_read_model_is() -> None:
    with pytest.raises(Problem, match="It is not there") as caught:
        await reads(InMemoryReadModels()).answer(
            "alice", STREAM, ReadOptions(None, 0), nothing_found, "It is not there"
        )
    assert (caught.value.status, caught.value.headers) == (404, {"X-Event-Id": "0"})


async def test_a_write_that_is_never_readable_is_told_so_at_once_when_mongodb_is_away() -> None:
    models = InMemoryReadModels()
    models.missing = "away"
    assert not await reads(models).wait_projected("alice", STREAM, EventId(1))
    models.missing = None
    models.model.event_ids[STREAM] = 1
    assert await reads(models).wait_projected("alice", STREAM, EventId(1))


class Loaded:
    """A store that remembers what it was asked for, and answers when it is told to."""

    def __init__(self, *, at_once: bool = True) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.go_on = asyncio.Event()
        self._asked = asyncio.Event()
        self.error: Exception | None = None
        if at_once:
            self.go_on.set()

    async def asked_for(self, times: int) -> None:
        while len(self.asked) < times:
            self._asked.clear()
            await self._asked.wait()

    async def __call__(self, keys: Sequence[int], tell: Callable[[int, str], None]) -> None:
        self.asked.append(tuple(keys))
        self._asked.set()
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        for key in keys:
            if key > 0:
                tell(key, str(key))
                await asyncio.sleep(0)


async def test_lookups_of_one_moment_share_a_query() -> None:
    load = Loaded()
    merged = Merged(load)
    assert await asyncio.gather(*(merged.get(key) for key in (1, 2, 2, 0))) == ["1", "2", "2", None]
    assert load.asked == [(1, 2, 0)]
    assert await merged.get(3) == "3"
    assert load.asked[1:] == [(3,)]


async def test_lookups_that_come_while_enough_are_under_way_share_the_next() -> None:
    load = Loaded(at_once=False)
    merged = Merged(load, at_once=1)
    waiting = []
    for key in (1, 2, 3):
        waiting.append(asyncio.ensure_future(merged.get(key)))
        for _ in range(5):
            await asyncio.sleep(0)
    load.go_on.set()
    assert await asyncio.gather(*waiting) == ["1", "2", "3"]
    assert load.asked == [(1,), (2, 3)]


async def test_a_query_asks_for_no_more_than_it_may() -> None:
    load = Loaded()
    merged = Merged(load, most=2)
    assert await asyncio.gather(*(merged.get(key) for key in (1, 2, 3))) == ["1", "2", "3"]
    assert load.asked == [(1, 2), (3,)]


async def test_an_error_is_everybodys_and_the_next_query_is_new() -> None:
    load = Loaded()
    load.error = Unavailable("away")
    merged = Merged(load)
    assert [type(each) for each in await asyncio.gather(merged.get(1), merged.get(2), return_exceptions=True)] == [
        Unavailable,
        Unavailable,
    ]
    load.error = None
    assert await merged.get(1) == "1"


async def test_who_joined_hears_when_the_query_breaks_off() -> None:
    load = Loaded(at_once=False)
    merged = Merged(load)
    leads, joins = asyncio.ensure_future(merged.get(1)), asyncio.ensure_future(merged.get(2))
    for _ in range(5):
        await asyncio.sleep(0)
    leads.cancel()
    with pytest.raises(Unavailable):
        await joins
    load.go_on.set()
    assert await merged.get(3) == "3"


async def test_who_joined_can_leave() -> None:
    load = Loaded(at_once=False)
    merged = Merged(load)
    leads, joins = asyncio.ensure_future(merged.get(1)), asyncio.ensure_future(merged.get(1))
    for _ in range(5):
        await asyncio.sleep(0)
    joins.cancel()
    load.go_on.set()
    assert await leads == "1"


async def test_a_query_that_hangs_keeps_only_those_waiting_who_joined_it() -> None:
    load = Loaded(at_once=False)
    merged = Merged(load, at_once=1, patience=0.01)
    hanging = asyncio.ensure_future(merged.get(1))
    for _ in range(5):
        await asyncio.sleep(0)
    next_one = asyncio.ensure_future(merged.get(2))
    async with asyncio.timeout(10):
        await load.asked_for(2)
    assert not hanging.done()
    load.go_on.set()
    assert (await hanging, await next_one) == ("1", "2")


class Sent:
    """A collection that sends the same batches of documents, whatever is asked."""

    def __init__(self, *batches: Sequence[int]) -> None:
        self.batches = [b"".join(bson.encode({"_id": number}) for number in batch) for batch in batches]

    async def find_raw_batches(self, *_: Any, **__: Any) -> AsyncIterator[bytes]:
        for batch in self.batches:
            yield batch


async def test_a_page_holds_what_mongodb_sends_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def room(*, large: bool) -> None:
        assert not large

    sent = Sent([1, 2], [3])
    database: Any = defaultdict(lambda: sent)
    model = MongoReadModel(database, room)
    monkeypatch.setattr(gateway.queries, "LARGEST_PAGE", sum(map(len, sent.batches)))
    assert [found["_id"] for found in await model.project_episodes("p", Slice(0, 0, 50))] == [1, 2, 3]
    monkeypatch.setattr(gateway.queries, "LARGEST_PAGE", sum(map(len, sent.batches)) - 1)
    with pytest.raises(PageTooLarge):
        await model.project_episodes("p", Slice(0, 0, 50))
