"""MongoDB's errors in our words, on the real one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast
from uuid import uuid4

import pytest

from shared.errors import Unavailable
from shared.mongo import Client, open_mongo, translated
from shared.settings import MongoSettings
from tests.cluster import ThrowAwayServers


@pytest.fixture
async def client(servers: ThrowAwayServers) -> AsyncIterator[Client]:
    async with open_mongo(MongoSettings(url=servers.mongodb_url)) as client:
        yield client


async def kill(client: Client, database: str, cursor_id: int) -> None:
    await client[database].command("killCursors", "things", cursors=[cursor_id])


async def drop(client: Client, database: str, _: int) -> None:
    await client.drop_database(database)


@pytest.mark.parametrize("lose", [kill, drop])
async def test_a_cursor_that_is_gone_is_a_database_that_is_away(
    client: Client, lose: Callable[[Client, str, int], Awaitable[None]]
) -> None:
    """As after a restart of MongoDB between two batches."""
    database = f"test_{uuid4().hex}"
    things = client[database].things
    await things.insert_many([{"_id": number} for number in range(10)])
    cursor = things.find({}, batch_size=2)
    await cursor.next()
    await lose(client, database, cursor.delegate.cursor_id)
    with pytest.raises(Unavailable, match="reading things: "), translated("reading things"):
        await cursor.to_list(None)
    await client.drop_database(database)


async def test_an_operation_whose_session_was_ended_by_another_is_a_database_that_is_away(client: Client) -> None:
    """As at the commit of a projector that was away for so long that another one ended its session."""
    database = f"test_{uuid4().hex}"
    things = client[database].things
    await things.insert_one({"_id": 1, "changes": 0})
    change = {"_id": 1}, {"$inc": {"changes": 1}}
    async with await client.start_session() as first, await client.start_session() as ended:
        async with first.start_transaction():
            await things.update_one(*change, session=first)
            waiting = asyncio.ensure_future(things.update_one(*change, session=ended))
            while not waiting.done():
                await client.admin.command("killSessions", [{"id": cast(Any, ended).session_id["id"]}])
                await asyncio.sleep(0.05)
        with pytest.raises(Unavailable, match="changing things: "), translated("changing things"):
            await waiting
    assert await things.find_one() == {"_id": 1, "changes": 1}
    await client.drop_database(database)
