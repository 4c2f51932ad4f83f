"""What worker processes do: spill a partition, load a range into MongoDB, compare a range with what MongoDB holds."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from pymongo import WriteConcern
from pymongo.errors import BulkWriteError

from projector import workers
from projector.digests import Content, digest_of, read_digests
from projector.replay import Plan, Spilled, fold_range, spill
from projector.views import Document
from shared.mongo import Database, open_mongo, translated
from shared.settings import KafkaSettings, MongoSettings

_INSERTS_AT_ONCE = 4
_DUPLICATE_KEY = 11000
_MOST_DIFFERENCES = 1_000
"""Per range. A read model that differs more needs a rebuild, not a longer list."""

MISSING, EXTRA, DIFFERENT = "missing", "extra", "different"


class Compared(Struct, frozen=True):
    """One range of the read models beside the log."""

    number: int
    expected: dict[str, Content]
    differences: tuple[tuple[str, str, str], ...]
    """Kind, collection and key of the first of them."""
    different: int
    """How many there are."""


def spill_job(kafka: KafkaSettings, plan: Plan, partition: int, folder: Path, slot: int) -> tuple[int, Spilled]:
    """Spill one partition."""
    return partition, asyncio.run(spill(kafka, plan, partition, folder, workers.table.note(slot)))


def load_job(mongo: MongoSettings, database: str, plan: Plan, number: int, folder: Path, slot: int) -> int:
    """Insert the documents of one range; its number. Those that a run that was killed has inserted stay."""
    documents = fold_range(folder, number, sorted(plan.ends), workers.table.note(slot))
    asyncio.run(_load(mongo, database, documents))
    return number


async def _load(mongo: MongoSettings, name: str, documents: Iterator[tuple[str, Sequence[Document]]]) -> None:
    slots = asyncio.Semaphore(_INSERTS_AT_ONCE)
    async with open_mongo(mongo) as client, asyncio.TaskGroup() as tasks:
        database: Database = client[name]
        for collection, some in documents:
            await slots.acquire()
            tasks.create_task(_insert(database, collection, some, slots))


async def _insert(database: Database, collection: str, some: Sequence[Document], slots: asyncio.Semaphore) -> None:
    # The rebuild's own notes are written w: majority behind these: what they say is loaded is.
    quick = database[collection].with_options(write_concern=WriteConcern(w=1, j=False))
    try:
        with translated(f"loading {collection}"):
            await quick.insert_many(some, ordered=False)
    except BulkWriteError as error:
        failed: Sequence[Mapping[str, Any]] = (error.details or {}).get("writeErrors", ())
        if any(each["code"] != _DUPLICATE_KEY for each in failed) or not failed:
            raise
    finally:
        slots.release()


def compare_job(
    plan: Plan, number: int, folder: Path, stored: Path, collections: frozenset[str], slot: int
) -> Compared:
    """Compare the documents of one range, in these collections, with the digests of the stored ones."""
    there = {(collection, key): digest for collection, key, digest in read_digests(stored)}
    expected: dict[str, Content] = {}
    found: list[tuple[str, str, str]] = []
    for collection, some in fold_range(folder, number, sorted(plan.ends), workers.table.note(slot)):
        if collection not in collections:
            continue
        content = expected.setdefault(collection, Content())
        for document in some:
            digest = digest_of(document)
            content.add(digest)
            stored_digest = there.pop((collection, document["_id"]), None)
            if stored_digest != digest:
                found.append((MISSING if stored_digest is None else DIFFERENT, collection, document["_id"]))
    found += [(EXTRA, collection, key) for collection, key in there]
    return Compared(number, expected, tuple(found[:_MOST_DIFFERENCES]), len(found))


def expected_job(
    plan: Plan, number: int, folder: Path, keys: frozenset[tuple[str, str]], slot: int
) -> dict[tuple[str, str], Document]:
    """The documents of one range that have these collections and keys."""
    return {
        (collection, document["_id"]): document
        for collection, some in fold_range(folder, number, sorted(plan.ends), workers.table.note(slot))
        for document in some
        if (collection, document["_id"]) in keys
    }
