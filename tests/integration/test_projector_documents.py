"""What the projector needs of MongoDB beyond the contract of `DocumentStore`: rivals, the dead, and the first start."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from pymongo.client_session import ClientSession

import projector.mongodb
from projector import generations
from projector.documents import REPAIRS, Checkpoint, DocumentRefused, Overtaken
from projector.fold import Writes
from projector.mongodb import Generation, MongoDocumentStore, Move, _move_checkpoints, open_documents
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
    move = Move(store._partition, START, Checkpoint(SECOND), None, NOTHING)
    await asyncio.to_thread(_move_checkpoints, store._generation.database, store._writes, [move])


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


async def test_documents_that_are_mended_after_the_first_batch_are_loaded_again(client: Client) -> None:
    async with open_documents(client, GENERATION, 0) as store:
        assert await store.checkpoint() == Checkpoint()
        await store.apply(START, Checkpoint(FIRST), NOTHING)
        await client[generation_database(GENERATION)][CHECKPOINTS].update_one({"_id": 0}, {"$inc": {REPAIRS: 1}})
        with pytest.raises(Overtaken):
            await store.checkpoint()


@pytest.fixture
async def several(client: Client) -> AsyncIterator[list[MongoDocumentStore]]:
    """The stores of three partitions in one process."""
    generation = Generation(client, GENERATION)
    for name in INDEXES:
        await client[generation_database(GENERATION)].create_collection(name)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(open_documents(client, GENERATION, partition, generation))
            for partition in range(3)
        ]


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The partitions that had a part in each transaction."""
    seen: list[list[int]] = []
    transact = projector.mongodb.transact

    def noted(database: Any, session: ClientSession, moves: Sequence[Move]) -> None:
        seen.append([move.partition for move in moves])
        transact(database, session, moves)

    monkeypatch.setattr(projector.mongodb, "transact", noted)
    return seen


def stream_of(partition: int, event_id: int = 1) -> Writes:
    key = f"stream-{partition}"
    there = {STREAMS: {key: {"_id": key, "event_id": event_id, "at": NOON}}}
    return Writes(there, {}) if event_id == 1 else Writes({}, there)


async def streams(stores: Sequence[MongoDocumentStore]) -> list[str]:
    wanted = {STREAMS: [f"stream-{partition}" for partition in range(3)]}
    return sorted((await stores[0].load(wanted, max_bytes=None))[STREAMS])


async def test_what_partitions_write_at_the_same_moment_is_one_transaction(
    several: list[MongoDocumentStore], transactions: list[list[int]]
) -> None:
    for before, after, event_id in ((START, FIRST, 1), (FIRST, SECOND, 2)):
        await asyncio.gather(
            *(store.apply(before, Checkpoint(after), stream_of(n, event_id)) for n, store in enumerate(several))
        )
    assert transactions == [[0, 1, 2]] * 2
    for partition, store in enumerate(several):
        assert await store.checkpoint() == Checkpoint(SECOND)
        found = await store.load({STREAMS: [f"stream-{partition}"]}, max_bytes=None)
        assert found[STREAMS][f"stream-{partition}"]["event_id"] == 2


async def test_nobody_is_kept_back_by_what_cannot_be_done_for_another(several: list[MongoDocumentStore]) -> None:
    overtaken = several[1].apply(FIRST, Checkpoint(SECOND), stream_of(1))
    outcomes = await asyncio.gather(
        several[0].apply(START, Checkpoint(FIRST), stream_of(0)), overtaken, return_exceptions=True
    )
    assert [type(one) for one in outcomes] == [type(None), Overtaken]
    refused = several[2].apply(START, Checkpoint(FIRST), stream_of(0))
    outcomes = await asyncio.gather(
        several[1].apply(START, Checkpoint(FIRST), stream_of(1)), refused, return_exceptions=True
    )
    assert [type(one) for one in outcomes] == [type(None), DocumentRefused]
    assert await streams(several) == ["stream-0", "stream-1"]
    assert [(await store.checkpoint()).cursor for store in several] == [FIRST, FIRST, START]


async def test_a_partition_whose_checkpoint_the_dead_hold_keeps_back_no_other(
    client: Client, several: list[MongoDocumentStore]
) -> None:
    async with open_documents(client, GENERATION, 0) as dead:
        await hold_the_checkpoint(dead)
        held = asyncio.create_task(several[0].apply(START, Checkpoint(FIRST), stream_of(0)))
        others = [asyncio.create_task(several[n].apply(START, Checkpoint(FIRST), stream_of(n))) for n in (1, 2)]
        await asyncio.gather(*others)
        assert not held.done()
        await held
        assert await streams(several) == ["stream-0", "stream-1", "stream-2"]


async def test_who_ends_the_sessions_of_others_spares_what_is_shared(
    client: Client, several: list[MongoDocumentStore]
) -> None:
    await several[0].apply(START, Checkpoint(FIRST), NOTHING)
    shared = several[0]._generation.session_id
    assert shared is not None
    ended: list[object] = []
    end = several[0]._generation.client.admin.command

    def noted(name: str, sessions: list[dict[str, object]]) -> object:
        ended.extend(each["id"] for each in sessions)
        return end(name, sessions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(several[0]._generation.client.admin), "command", lambda _, *asked: noted(*asked))
        async with open_documents(client, GENERATION, 0) as other:
            await asyncio.to_thread(several[0]._end_other_sessions)
            assert other._writes.session_id["id"] in ended
    assert shared not in ended


async def test_much_is_not_written_together_with_others(
    several: list[MongoDocumentStore], transactions: list[list[int]]
) -> None:
    many = {f"many-{number}": {"_id": f"many-{number}", "event_id": 1, "at": NOON} for number in range(65)}
    long = {"long": {"_id": "long", "event_id": 1, "at": NOON, "text": "x" * 2**21}}
    await asyncio.gather(
        several[0].apply(START, Checkpoint(FIRST), Writes({STREAMS: many}, {})),
        several[1].apply(START, Checkpoint(FIRST), Writes({STREAMS: long}, {})),
        several[2].apply(START, Checkpoint(FIRST), stream_of(2)),
    )
    assert sorted(transactions) == [[0], [1], [2]]
    wanted = {STREAMS: [*many, *long]}
    assert len((await several[0].load(wanted, max_bytes=None))[STREAMS]) == 66
    assert len((await several[0].load({STREAMS: [*long]}, max_bytes=None))[STREAMS]) == 1


async def test_partitions_rest_together_after_a_transaction_of_several_commands(
    several: list[MongoDocumentStore],
) -> None:
    generation = several[0]._generation
    await several[0].apply(START, Checkpoint(FIRST), stream_of(0))
    assert generation._rest_until > 0
    generation._rest_until = float("inf")
    async with asyncio.timeout(10):
        await several[0].rest(1)  # it came alone, with one command
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await several[0].rest(2)
    async with asyncio.timeout(10):
        await several[0].rest(2)  # others may make the rest longer, not for ever
    await asyncio.gather(
        *(store.apply(START, Checkpoint(FIRST), stream_of(n + 1)) for n, store in enumerate(several[1:]))
    )
    until = generation._rest_until
    await asyncio.gather(*(store.rest(1) for store in several))
    assert time.monotonic() >= until > 0


async def test_a_store_is_not_closed_while_its_transaction_is_under_way_however_often_it_is_cancelled(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, may_end = threading.Event(), threading.Event()

    def transact(*_: object) -> None:
        under_way.set()
        may_end.wait(10)

    monkeypatch.setattr(projector.mongodb, "transact", transact)
    many = {f"{number}": {"_id": f"{number}", "event_id": 1, "at": NOON} for number in range(65)}

    async def apply() -> None:
        async with open_documents(client, GENERATION, 0) as store:
            await store.apply(START, Checkpoint(FIRST), Writes({STREAMS: many}, {}))

    applying = asyncio.create_task(apply())
    assert await asyncio.to_thread(under_way.wait, 10)
    for _ in range(3):
        applying.cancel()
        await asyncio.sleep(0.02)
        assert not applying.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await applying


async def test_what_is_loaded_is_never_of_before_the_checkpoint(client: Client) -> None:
    async with open_documents(client, GENERATION, 0) as store:
        assert store._seen_at is None
        await store.checkpoint()
        assert store._seen_at is not None


async def test_the_sessions_of_shared_transactions_push_no_other_out(several: list[MongoDocumentStore]) -> None:
    for _ in range(17):
        with pytest.raises(Overtaken):
            await several[0].apply(FIRST, Checkpoint(SECOND), NOTHING)
    noted = several[0]._generation.client[META]["projector_sessions"].find_one({"_id": f"episodes_g{GENERATION}/0"})
    assert noted is not None
    assert several[0]._writes.session_id["id"] in noted["sessions"]
    assert len(noted["shared"]) == 16
