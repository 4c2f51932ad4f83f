"""One suite for every `DocumentStore`."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Protocol
from uuid import uuid4

import bson
import pytest

from projector.documents import (
    Checkpoint,
    DocumentRefused,
    DocumentStore,
    Overtaken,
    Stopped,
    TooMuch,
)
from projector.fold import Writes
from projector.mongodb import open_documents
from projector.views import INDEXES
from shared.ids import Position
from shared.log import Cursor
from shared.mongo import generation_database, open_mongo
from shared.read_models import PROJECT_EPISODES, STREAMS, TENANT_EPISODES
from shared.settings import MongoSettings
from tests.event_log import NOON
from tests.fakes import InMemoryDatabase, InMemoryDocumentStore

START = Cursor()
FIRST = Cursor(5, 0, Position(4))
SECOND = Cursor(9, 0, Position(8))
NOTHING = Writes({}, {})


class Opener(Protocol):
    """Opens a store of a partition; all of one opener share one database."""

    async def __call__(self, partition: int = 0) -> DocumentStore: ...


@pytest.fixture(params=["memory", "mongodb"])
async def open_store(request: pytest.FixtureRequest) -> AsyncIterator[Opener]:
    if request.param == "memory":
        database = InMemoryDatabase()

        async def open_in_memory(partition: int = 0) -> DocumentStore:
            return InMemoryDocumentStore(database, partition)

        yield open_in_memory
        return
    servers = request.getfixturevalue("servers")
    async with open_mongo(MongoSettings(url=servers.mongodb_url)) as client, AsyncExitStack() as stores:
        generation = uuid4().int % 10**9 + 2
        for collection in INDEXES:
            await client[generation_database(generation)].create_collection(collection)
        stores.push_async_callback(client.drop_database, generation_database(generation))

        async def open_in_mongodb(partition: int = 0) -> DocumentStore:
            return await stores.enter_async_context(open_documents(client, generation, partition))

        yield open_in_mongodb


@pytest.fixture
async def store(open_store: Opener) -> DocumentStore:
    return await open_store()


def episode(key: str, **fields: Any) -> dict[str, Any]:
    return {"_id": key, "name": "run-1", "updated_at": NOON, "folder": None} | fields


def new(*documents: dict[str, Any], collection: str = PROJECT_EPISODES) -> Writes:
    return Writes({collection: {document["_id"]: document for document in documents}}, {})


def changed(*documents: dict[str, Any], collection: str = PROJECT_EPISODES) -> Writes:
    return Writes({}, new(*documents, collection=collection).new)


async def load(store: DocumentStore, *keys: str, collection: str = PROJECT_EPISODES) -> dict[str, Any]:
    return (await store.load({collection: keys}, max_bytes=None))[collection]


async def test_nothing_is_applied_at_first(store: DocumentStore) -> None:
    assert await store.checkpoint() == Checkpoint()
    assert await load(store, "a", "b") == {}


async def test_what_is_applied_is_there_with_its_checkpoint(store: DocumentStore) -> None:
    await store.apply(START, Checkpoint(FIRST), new(episode("a"), episode("b")))
    assert await store.checkpoint() == Checkpoint(FIRST)
    assert await load(store, "a", "c", "b") == {"a": episode("a"), "b": episode("b")}


async def test_documents_are_replaced_as_a_whole(store: DocumentStore) -> None:
    await store.apply(START, Checkpoint(FIRST), new(episode("a", tags=["x"])))
    await store.apply(FIRST, Checkpoint(SECOND), changed(episode("a", name="run-2")))
    assert await load(store, "a") == {"a": episode("a", name="run-2")}


async def test_user_text_is_only_text(store: DocumentStore) -> None:
    odd = episode("$a.b", name="$name", folder={"id": "$$ROOT", "path": "/$set/x.y"})
    await store.apply(START, Checkpoint(FIRST), new(odd))
    await store.apply(FIRST, Checkpoint(SECOND), changed(odd | {"name": "$unset"}))
    assert await load(store, "$a.b") == {"$a.b": odd | {"name": "$unset"}}


async def test_several_collections_move_together(store: DocumentStore) -> None:
    stream = {"_id": "namespace:a", "event_id": 1, "at": NOON}
    writes = Writes({STREAMS: {"namespace:a": stream}, PROJECT_EPISODES: {"a": episode("a")}}, {})
    await store.apply(START, Checkpoint(FIRST), writes)
    loaded = await store.load(
        {STREAMS: ["namespace:a"], PROJECT_EPISODES: ["a"], TENANT_EPISODES: ["a"]}, max_bytes=None
    )
    assert loaded == {STREAMS: {"namespace:a": stream}, PROJECT_EPISODES: {"a": episode("a")}, TENANT_EPISODES: {}}


async def test_a_checkpoint_moves_without_documents(store: DocumentStore) -> None:
    await store.apply(START, Checkpoint(FIRST), NOTHING)
    await store.apply(FIRST, Checkpoint(FIRST), NOTHING)
    assert await store.checkpoint() == Checkpoint(FIRST)


async def test_who_comes_second_is_overtaken_and_writes_nothing(open_store: Opener) -> None:
    ours, rival = await open_store(), await open_store()
    await rival.apply(START, Checkpoint(FIRST), new(episode("a")))
    with pytest.raises(Overtaken):
        await ours.apply(START, Checkpoint(SECOND), new(episode("b")))
    await rival.apply(FIRST, Checkpoint(SECOND), changed(episode("a", name="run-2")))
    with pytest.raises(Overtaken):
        await ours.apply(FIRST, Checkpoint(SECOND), changed(episode("a", name="run-3")))
    assert await ours.checkpoint() == Checkpoint(SECOND)
    assert await load(ours, "a", "b") == {"a": episode("a", name="run-2")}


@pytest.mark.parametrize(
    "before",
    [START, Cursor(5, 0, Position(3)), Cursor(4, 0, Position(4)), Cursor(5, 1, Position(4))],
)
async def test_the_whole_checkpoint_is_compared(store: DocumentStore, before: Cursor) -> None:
    await store.apply(START, Checkpoint(FIRST), NOTHING)
    with pytest.raises(Overtaken):
        await store.apply(before, Checkpoint(SECOND), new(episode("a")))
    assert await load(store, "a") == {}


async def test_only_the_start_may_be_the_first_checkpoint(store: DocumentStore) -> None:
    with pytest.raises(Overtaken):
        await store.apply(FIRST, Checkpoint(SECOND), new(episode("a")))
    assert await store.checkpoint() == Checkpoint()


async def test_partitions_do_not_share_a_checkpoint(open_store: Opener) -> None:
    first, second = await open_store(0), await open_store(1)
    await first.apply(START, Checkpoint(FIRST), new(episode("a")))
    await second.apply(START, Checkpoint(SECOND), new(episode("b")))
    assert (await first.checkpoint()).cursor == FIRST
    assert (await second.checkpoint()).cursor == SECOND


async def test_a_stop_is_remembered_until_it_goes_on(store: DocumentStore) -> None:
    stopped = Stopped(5, "no such episode", NOON)
    await store.apply(START, Checkpoint(START, stopped), NOTHING)
    assert await store.checkpoint() == Checkpoint(START, stopped)
    await store.apply(START, Checkpoint(FIRST), NOTHING)
    assert await store.checkpoint() == Checkpoint(FIRST)
    await store.apply(FIRST, Checkpoint(SECOND, stopped), new(episode("a")))
    assert await store.checkpoint() == Checkpoint(SECOND, stopped)


async def test_a_document_that_is_there_already_is_refused_and_nothing_happens(store: DocumentStore) -> None:
    await store.apply(START, Checkpoint(FIRST), new(episode("a")))
    with pytest.raises(DocumentRefused) as refused:
        await store.apply(FIRST, Checkpoint(SECOND), new(episode("b"), episode("a", name="again")))
    assert (refused.value.collection, refused.value.key) == (PROJECT_EPISODES, "a")
    assert await store.checkpoint() == Checkpoint(FIRST)
    assert await load(store, "a", "b") == {"a": episode("a")}


UNFIT = [{"ordinal": 2**63}, {"name": "x" * 16 * 1024 * 1024}]


@pytest.mark.parametrize("unfit", UNFIT, ids=["number", "size"])
async def test_a_new_document_that_no_database_takes_is_refused_and_nothing_happens(
    store: DocumentStore, unfit: dict[str, Any]
) -> None:
    with pytest.raises(DocumentRefused) as refused:
        await store.apply(START, Checkpoint(FIRST), new(episode("a"), episode("bad", **unfit)))
    assert (refused.value.collection, refused.value.key) == (PROJECT_EPISODES, "bad")
    assert await store.checkpoint() == Checkpoint()
    assert await load(store, "a", "bad") == {}
    await store.apply(START, Checkpoint(FIRST), new(episode("a")))


@pytest.mark.parametrize("unfit", UNFIT, ids=["number", "size"])
async def test_a_document_that_becomes_what_no_database_takes_is_refused_and_nothing_happens(
    store: DocumentStore, unfit: dict[str, Any]
) -> None:
    await store.apply(START, Checkpoint(FIRST), new(episode("a"), episode("bad")))
    with pytest.raises(DocumentRefused) as refused:
        await store.apply(FIRST, Checkpoint(SECOND), changed(episode("a", name="run-2"), episode("bad", **unfit)))
    assert (refused.value.collection, refused.value.key) == (PROJECT_EPISODES, "bad")
    assert await store.checkpoint() == Checkpoint(FIRST)
    assert await load(store, "a", "bad") == {"a": episode("a"), "bad": episode("bad")}


async def test_a_document_that_somebody_took_away_is_missed_and_nothing_happens(store: DocumentStore) -> None:
    await store.apply(START, Checkpoint(FIRST), new(episode("a")))
    with pytest.raises(Overtaken, match=f"{PROJECT_EPISODES}/b"):
        await store.apply(FIRST, Checkpoint(SECOND), changed(episode("a", name="run-2"), episode("b")))
    assert await load(store, "a", "b") == {"a": episode("a")}


@pytest.mark.parametrize(("count", "size"), [(1, 16 * 1024 * 1024 - 200), (4, 3 * 1024 * 1024)])
async def test_large_documents_go_through_alone_and_together(store: DocumentStore, count: int, size: int) -> None:
    large = [episode(str(number), name="x" * size) for number in range(count)]
    await store.apply(START, Checkpoint(FIRST), new(*large))
    await store.apply(FIRST, Checkpoint(SECOND), changed(*(one | {"name": one["name"][:-1] + "y"} for one in large)))
    assert [one["name"][-2:] for one in (await load(store, *map(str, range(count)))).values()] == ["xy"] * count


async def test_loading_stops_at_the_limit(store: DocumentStore) -> None:
    large = [episode(str(number), name="x" * 100_000) for number in range(10)]
    await store.apply(START, Checkpoint(FIRST), new(*large))
    wanted = {PROJECT_EPISODES: [str(number) for number in range(10)]}
    with pytest.raises(TooMuch):
        await store.load(wanted, max_bytes=500_000)
    assert len((await store.load(wanted, max_bytes=1_100_000))[PROJECT_EPISODES]) == 10


async def test_what_comes_back_is_byte_for_byte_what_went_in(store: DocumentStore) -> None:
    odd = episode("a", name="\u202e\U0001f600\x00", tags=[], event_id=2**53 + 1, deleted_at=None, created_at=NOON)
    await store.apply(START, Checkpoint(FIRST), new(odd))
    [back] = (await load(store, "a")).values()
    assert bson.encode(back) == bson.encode(odd)
    assert back["created_at"].tzinfo is not None
