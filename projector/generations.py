"""Generations: complete sets of read models, one database each, and the pointer to the one that readers see.

``episodes_meta.generations`` has one document each: ``_id`` (number), ``created_at``, ``state``, from a rebuild
``build``, and once it was verified ``verified``. The state is ``building`` until all is loaded, ``loaded`` until the
rebuild puts it to use, then ``live``; ``dropping`` at the end. Projectors keep generations up to date that are loaded
or live, in use or not.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct, structs
from pymongo import IndexModel, ReturnDocument
from pymongo.errors import DuplicateKeyError

from projector.documents import Checkpoint, checkpoint_in, create_collection
from projector.views import INDEXES
from shared.errors import EpisodesError
from shared.mongo import (
    DURABLE,
    META,
    Client,
    Collection,
    Database,
    Document,
    ReadConcern,
    Session,
    generation_database,
    translated,
)
from shared.read_models import CHECKPOINTS, POINTER_ID, POINTERS

GENERATIONS = "generations"
BUILDING, LOADED, LIVE, DROPPING = "building", "loaded", "live", "dropping"
_LOOK_SECONDS = 0.1
_CATCH_UP_SECONDS = 5.0
_LET_GO_SECONDS = 1.5
"""Projectors, which look for generations twice a second, and a rebuild have let go of one that is dropped by then."""


class WrongGeneration(EpisodesError):
    """A generation that is not there, or not in the state that the operation needs."""


class Verified(Struct, frozen=True):
    """What the last verification of a generation came to."""

    at: datetime
    position: int
    """Up to which events it looked, summed over the partitions."""
    hash: str | None
    """The content hash of all collections in hexadecimal, or None if they were not as the log says."""


class Generation(Struct, frozen=True):
    """One complete set of read models."""

    number: int
    state: str
    in_use: bool
    created_at: datetime
    checkpoints: dict[int, Checkpoint]
    documents: int
    bytes: int
    """On disk, indexes too."""
    verified: Verified | None


async def prepare(client: Client) -> int:
    """Make sure that there is a generation in use, as often and by as many as like; give its number.

    Raises:
        Unavailable: MongoDB does not answer.
    """
    with translated("preparing the read models"):
        pointer = await client[META][POINTERS].find_one_and_update(
            {"_id": POINTER_ID}, {"$setOnInsert": {"generation": 1}}, upsert=True, return_document=ReturnDocument.AFTER
        )
        number: int = pointer["generation"]
        await create_collections(client, number)
        await create_indexes(client, number)
        await _generations(client).update_one(
            {"_id": number}, {"$setOnInsert": {"state": LIVE, "created_at": datetime.now(UTC)}}, upsert=True
        )
        return number


async def create_collections(client: Client, number: int) -> None:
    """Create the collections of a generation that are missing."""
    database: Database = client[generation_database(number)]
    for collection in {*INDEXES, CHECKPOINTS} - {*await database.list_collection_names()}:
        await create_collection(database, collection)


async def create_indexes(client: Client, number: int) -> None:
    """Create the indexes of a generation that are missing."""
    database: Database = client[generation_database(number)]
    await asyncio.gather(
        *(
            database[collection].create_indexes([IndexModel([*index]) for index in indexes])
            for collection, indexes in INDEXES.items()
            if indexes
        )
    )


async def in_use(client: Client) -> int:
    """The number of the generation that readers see; 1 before any is made."""
    with translated("reading the pointer"):
        pointer = await client[META][POINTERS].find_one({"_id": POINTER_ID})
    return 1 if pointer is None else int(pointer["generation"])


async def live(client: Client) -> frozenset[int]:
    """The generations that projectors keep up to date."""
    with translated("listing the generations"):
        return frozenset(
            [
                found["_id"]
                async for found in _generations(client).find({"state": {"$in": [LOADED, LIVE]}}, {"_id": True})
            ]
        )


async def all_generations(client: Client) -> list[Generation]:
    """All there are, oldest first."""
    number_in_use = await in_use(client)
    with translated("listing the generations"):
        found = await _generations(client).find().sort("_id").to_list(None)
        return [
            Generation(
                number=each["_id"],
                state=each["state"],
                in_use=each["_id"] == number_in_use,
                created_at=each["created_at"],
                checkpoints=await checkpoints(client, each["_id"]),
                documents=await _count(client[generation_database(each["_id"])]),
                bytes=int((await client[generation_database(each["_id"])].command("dbStats"))["totalSize"]),
                verified=Verified(**each["verified"]) if "verified" in each else None,
            )
            for each in found
        ]


async def checkpoints(client: Client, number: int) -> dict[int, Checkpoint]:
    """Partition → how far a generation is."""
    with translated("reading the checkpoints"):
        found = client[generation_database(number)][CHECKPOINTS].find()
        return {document["_id"]: checkpoint_in(document) async for document in found}


async def events_behind(client: Client, number: int) -> int:
    """How many events a generation lacks of those that the one in use has."""
    ahead = await checkpoints(client, await in_use(client))
    own = await checkpoints(client, number)
    return sum(
        max(0, each.cursor.position - own.get(partition, Checkpoint()).cursor.position)
        for partition, each in ahead.items()
    )


async def begin(client: Client, build: Mapping[str, Any]) -> int:
    """Make the next generation, to be built; give its number.

    Raises:
        WrongGeneration: somebody else was quicker.
    """
    with translated("making a generation"):
        newest = await _generations(client).find_one(sort=[("_id", -1)])
        number = 1 + max(newest["_id"] if newest else 0, await in_use(client))
        try:
            await _generations(client).insert_one(
                {"_id": number, "state": BUILDING, "created_at": datetime.now(UTC), "build": dict(build)}
            )
        except DuplicateKeyError:
            raise WrongGeneration(f"another rebuild just began generation {number}") from None
        await client.drop_database(generation_database(number))  # what a rebuild left that did not hear of its drop
        return number


async def being_built(client: Client) -> Document | None:
    """The document of the generation that is being built, if one is."""
    with translated("looking for a rebuild"):
        return await _generations(client).find_one({"state": {"$in": [BUILDING, LOADED]}})


async def note_build(client: Client, number: int, owner: str, changes: Mapping[str, Any]) -> None:
    """Note how far a build is.

    Raises:
        WrongGeneration: it is somebody else's now, or was dropped.
    """
    with translated("noting the rebuild's progress"):
        noted = await _generations(client).update_one(
            {"_id": number, "build.owner": owner},
            {"$set": {f"build.{key}": value for key, value in changes.items()}},
        )
    if noted.matched_count == 0:
        raise WrongGeneration(f"generation {number} is no longer built by this process")


async def note_verified(client: Client, number: int, verified: Verified) -> None:
    """Note what a verification came to, for those who list the generations."""
    with translated("noting the verification"):
        await _generations(client).update_one({"_id": number}, {"$set": {"verified": structs.asdict(verified)}})


async def enliven(client: Client, number: int, owner: str, loaded: Mapping[int, Checkpoint]) -> None:
    """Hand a loaded generation over to the projectors, each partition at its checkpoint.

    Raises:
        WrongGeneration: somebody else did, and projectors may have moved the checkpoints since.
    """
    async with _together(client, "handing a generation over") as session:
        noted = await _generations(client).update_one(
            {"_id": number, "state": BUILDING, "build.owner": owner}, {"$set": {"state": LOADED}}, session=session
        )
        if noted.matched_count == 0:
            raise WrongGeneration(f"generation {number} is no longer built by this process")
        for partition, checkpoint in loaded.items():
            cursor = checkpoint.cursor
            await client[generation_database(number)][CHECKPOINTS].replace_one(
                {"_id": partition},
                {"position": cursor.position, "offset": cursor.offset, "fence": cursor.fence},
                upsert=True,
                session=session,
            )


async def take_over(client: Client, number: int, old_owner: str, owner: str) -> None:
    """Go on with a build whose process is dead.

    Raises:
        WrongGeneration: somebody else was quicker.
    """
    await note_build(client, number, old_owner, {"owner": owner, "heartbeat_at": datetime.now(UTC)})


async def switch(client: Client, *, old: int, new: int) -> None:
    """Let readers see ``new`` instead of ``old``, at once.

    Raises:
        WrongGeneration: ``new`` is not kept up to date, or ``old`` is not in use any more.
    """
    async with _together(client, "moving the pointer") as session:
        kept = await _generations(client).update_one(
            {"_id": new, "state": {"$in": [LOADED, LIVE]}},
            {"$set": {"state": LIVE, "used_at": datetime.now(UTC)}},  # a change in any case: it meets that of a drop
            session=session,
        )
        if kept.matched_count == 0:
            raise WrongGeneration(f"generation {new} is not kept up to date: it cannot be put to use")
        moved = await client[META][POINTERS].update_one(
            {"_id": POINTER_ID, "generation": old}, {"$set": {"generation": new, "previous": old}}, session=session
        )
        if moved.matched_count == 0:
            raise WrongGeneration(f"generation {old} is not in use any more: somebody else moved the pointer")


async def previous(client: Client) -> int | None:
    """The generation that was in use before the present one, if it is still kept."""
    with translated("reading the pointer"):
        pointer = await client[META][POINTERS].find_one({"_id": POINTER_ID})
    number = None if pointer is None else pointer.get("previous")
    return number if number in await live(client) else None


async def roll_back(client: Client) -> tuple[int, int]:
    """Let readers see the generation again that was in use before; give the numbers of both, old and new.

    Raises:
        WrongGeneration: none is kept, or it is not kept up to date: readers would go back in time.
    """
    old, new = await in_use(client), await previous(client)
    if new is None:
        raise WrongGeneration(f"no generation is kept from before {old}")
    until = time.monotonic() + _CATCH_UP_SECONDS
    while behind := await events_behind(client, new):
        if time.monotonic() > until:
            raise WrongGeneration(f"generation {new} is {behind} events behind {old}: see that a projector runs")
        await asyncio.sleep(_LOOK_SECONDS)
    await switch(client, old=old, new=new)
    return old, new


async def drop(client: Client, number: int) -> None:
    """Remove a generation that is not in use. Interrupted, it is done when it is called again.

    Raises:
        WrongGeneration: it is in use, or not there.
    """
    async with _together(client, "dropping a generation") as session:
        found = await _generations(client).find_one_and_update(
            {"_id": number}, {"$set": {"state": DROPPING}, "$unset": {"build": True}}, session=session
        )
        if found is None:
            raise WrongGeneration(f"there is no generation {number}")
        pointer = await client[META][POINTERS].find_one({"_id": POINTER_ID}, session=session)
        if pointer is not None and pointer["generation"] == number:
            raise WrongGeneration(f"generation {number} is in use: switch or roll back first")
    await asyncio.sleep(_LET_GO_SECONDS)  # whoever still wrote to it would bring the database back
    with translated("dropping a generation"):
        await client.drop_database(generation_database(number))
        await _generations(client).delete_one({"_id": number})


@asynccontextmanager
async def _together(client: Client, what: str) -> AsyncIterator[Session]:
    """One transaction."""
    with translated(what):
        async with await client.start_session() as session, session.start_transaction(ReadConcern("snapshot"), DURABLE):
            yield session


async def _count(database: Database) -> int:
    return sum([await database[collection].estimated_document_count() for collection in INDEXES])


def _generations(client: Client) -> Collection:
    return client[META][GENERATIONS]
