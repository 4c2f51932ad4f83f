"""What the projector needs of MongoDB beyond the contract of `DocumentStore`: rivals, the dead, and the first start."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from projector import generations
from projector.documents import REPAIRS, Checkpoint, MongoDocumentStore, Overtaken, open_documents
from projector.fold import Writes
from projector.views import INDEXES
from shared.ids import Position
from shared.log import Cursor
from shared.mongo import DURABLE, META, Client, ReadConcern, generation_database, open_mongo
from shared.read_models import CHECKPOINTS, POINTER_ID, POINTERS, STREAMS
from shared.settings import MongoSettings
from tests.cluster import ThrowAwayServers, throw_away_servers
from tests.event_log import NOON

START, FIRST, SECOND = Cursor(), Cursor(5, 0, Position(4)), Cursor(9, 0, Position(8))
GENERATION = 4_711
NOTHING = Writes({}, {})


@pytest.fixture(scope="module")
def servers() -> Iterator[ThrowAwayServers]:
    """Servers of our own: a gateway of other tests would follow the pointer that is moved here."""
    with throw_away_servers() as running:
        yield running


@pytest.fixture
async def client(servers: ThrowAwayServers) -> AsyncIterator[Client]:
    async with open_mongo(MongoSettings(url=servers.mongodb_url)) as connected:
        await connected[generation_database(GENERATION)].create_collection(CHECKPOINTS)
        yield connected
        await connected.drop_database(generation_database(GENERATION))


async def hold_the_checkpoint(store: MongoDocumentStore) -> None:
    """Move the checkpoint in a transaction that is never ended, as a projector does that is killed right then."""
    store._writes.start_transaction(ReadConcern("snapshot"), DURABLE)
    await asyncio.to_thread(store._move_checkpoint, START, Checkpoint(SECOND))


async def test_the_dead_do_not_hold_a_checkpoint_for_long(client: Client) -> None:
    async with open_documents(client, GENERATION, 0) as dead, open_documents(client, GENERATION, 0) as ours:
        await hold_the_checkpoint(dead)
        began = time.monotonic()
        await ours.apply(START, Checkpoint(FIRST), NOTHING)
        assert time.monotonic() - began < 10, "MongoDB itself would take 60 s"
        assert await ours.checkpoint() == Checkpoint(FIRST)


async def test_a_rival_that_is_alive_is_waited_for(client: Client) -> None:
    async with open_documents(client, GENERATION, 0) as rival, open_documents(client, GENERATION, 0) as ours:
        await hold_the_checkpoint(rival)

        async def commit_soon() -> None:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(rival._writes.commit_transaction)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(commit_soon())
            with pytest.raises(Overtaken):
                await ours.apply(START, Checkpoint(FIRST), NOTHING)
        assert await ours.checkpoint() == Checkpoint(SECOND)


async def test_the_dead_of_another_partition_are_left_alone(client: Client) -> None:
    async with open_documents(client, GENERATION, 1) as other, open_documents(client, GENERATION, 0) as ours:
        await hold_the_checkpoint(other)
        await ours.apply(START, Checkpoint(FIRST), NOTHING)
        await asyncio.to_thread(ours._end_other_sessions)
        await asyncio.to_thread(other._writes.commit_transaction)


async def test_reads_see_our_own_last_write(client: Client) -> None:
    async with open_documents(client, GENERATION, 0) as store:
        cursor = START
        for number in range(1, 50):
            document = {"_id": "s", "event_id": number, "at": NOON}
            after = Cursor(number, 0, Position(number))
            there = {STREAMS: {"s": document}}
            await store.apply(cursor, Checkpoint(after), Writes(there, {}) if number == 1 else Writes({}, there))
            assert (await store.load({STREAMS: ["s"]}, max_bytes=None))[STREAMS]["s"]["event_id"] == number
            cursor = after


async def test_many_may_prepare_the_first_generation_at_once(client: Client) -> None:
    await client.drop_database(META)
    await client.drop_database(generation_database(1))
    assert await asyncio.gather(*(generations.prepare(client) for _ in range(8))) == [1] * 8
    assert await client[META][POINTERS].find_one() == {"_id": POINTER_ID, "generation": 1}
    for collection, indexes in INDEXES.items():
        found = await client[generation_database(1)][collection].index_information()
        assert sorted(tuple(field for field, _ in index["key"]) for index in found.values()) == sorted(
            [("_id",), *indexes]
        )
    assert set(await client[generation_database(1)].list_collection_names()) == {*INDEXES, CHECKPOINTS}


async def test_the_generation_in_use_stays(client: Client) -> None:
    await client[META][POINTERS].update_one({"_id": POINTER_ID}, {"$set": {"generation": GENERATION}}, upsert=True)
    assert await generations.prepare(client) == GENERATION
    await client[META][POINTERS].delete_one({"_id": POINTER_ID})


async def test_a_batch_that_was_prepared_before_documents_were_mended_is_not_applied(client: Client) -> None:
    async with open_documents(client, GENERATION, 0) as store:
        await store.apply(START, Checkpoint(FIRST), NOTHING)
    for _ in range(2):
        async with open_documents(client, GENERATION, 0) as store:
            assert await store.checkpoint() == Checkpoint(FIRST)
            await client[generation_database(GENERATION)][CHECKPOINTS].update_one({"_id": 0}, {"$inc": {REPAIRS: 1}})
            with pytest.raises(Overtaken):
                await store.apply(FIRST, Checkpoint(SECOND), NOTHING)
            with pytest.raises(Overtaken):
                await store.checkpoint()
    async with open_documents(client, GENERATION, 0) as store:
        assert await store.checkpoint() == Checkpoint(FIRST)
        await store.apply(FIRST, Checkpoint(SECOND), NOTHING)
        assert await store.checkpoint() == Checkpoint(SECOND)
