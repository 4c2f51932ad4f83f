"""What worker processes do: spill a partition, load a range into MongoDB, compare a range with what MongoDB holds."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct
from pymongo.errors import BulkWriteError

from projector import workers
from projector.digests import Content, digest_of, read_digests
from projector.replay import Plan, Spilled, fold_range, spill
from projector.views import Document
from shared.mongo import QUICK, BlockingClient, generation_database, open_blocking_mongo, translated
from shared.settings import KafkaSettings, MongoSettings

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
    return partition, asyncio.run(spill(kafka, plan, partition, folder, partial(workers.table.note, slot)))


def load_job(mongo: MongoSettings, generation: int, plan: Plan, number: int, folder: Path, slots: int) -> int:
    """Insert the documents of one range; its number. Those that a run that was killed has inserted stay."""
    with open_blocking_mongo(mongo) as client:
        for collection, some in _folded(plan, folder, number, slots):
            _insert(client, generation, collection, some)
    return number


def _folded(plan: Plan, folder: Path, number: int, slots: int) -> Iterator[tuple[str, Sequence[Document]]]:
    """The documents of a range. Each partition has a slot for its progress, from ``slots`` on."""
    return fold_range(plan, folder, number, lambda place, done: workers.table.note(slots + place, done))


def _insert(client: BlockingClient, generation: int, collection: str, some: Sequence[Document]) -> None:
    # The rebuild's own notes are written w: majority behind these: what they say is loaded is.
    quick = client[generation_database(generation)].get_collection(collection, write_concern=QUICK)
    try:
        with translated(f"loading {collection}"):
            quick.insert_many(some, ordered=False)
    except BulkWriteError as error:
        failed: Sequence[Mapping[str, Any]] = (error.details or {}).get("writeErrors", ())
        if any(each["code"] != _DUPLICATE_KEY for each in failed) or not failed:
            raise


def compare_job(
    plan: Plan, number: int, folder: Path, stored: Path, collections: frozenset[str], slots: int
) -> Compared:
    """Compare the documents of one range, in these collections, with the digests of the stored ones."""
    there = {(collection, key): digest for collection, key, digest in read_digests(stored)}
    expected: dict[str, Content] = {}
    found: list[tuple[str, str, str]] = []
    for collection, some in _folded(plan, folder, number, slots):
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
    plan: Plan, number: int, folder: Path, keys: frozenset[tuple[str, str]], slots: int
) -> dict[tuple[str, str], Document]:
    """The documents of one range that have these collections and keys."""
    return {
        (collection, document["_id"]): document
        for collection, some in _folded(plan, folder, number, slots)
        for document in some
        if (collection, document["_id"]) in keys
    }
