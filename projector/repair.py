"""Mends the documents of one stream in place: what differs from the log is written anew, in one transaction."""

from collections.abc import Collection as AbstractCollection
from typing import Any

from msgspec import Struct
from pymongo import DeleteOne, ReplaceOne

from projector.digests import digest_of
from projector.documents import REPAIRS, Checkpoint, checkpoint_in
from projector.views import INDEXES, Document, Documents, no_documents, owner_query, project
from shared.errors import EpisodesError, RecordsLost
from shared.ids import StreamId
from shared.kafka import describe_topic, open_partition, partition_of, read_to
from shared.log import Cursor, LogReader
from shared.mongo import DURABLE, Client, Database, ReadConcern, Session, generation_database, translated
from shared.read_models import CHECKPOINTS
from shared.settings import EVENTS, KafkaSettings


class NothingToRepair(EpisodesError):
    """The partition of the stream has not been projected yet."""


class Repaired(Struct, frozen=True):
    """How many documents were mended, by kind."""

    stream: str
    missing: int = 0
    different: int = 0
    extra: int = 0


async def repair(
    client: Client, kafka: KafkaSettings, generation: int, stream: StreamId, collections: AbstractCollection[str]
) -> Repaired:
    """Mend those of the stream's documents that are in ``collections``.

    The log is folded up to the checkpoint first. Then a transaction holds the checkpoint, the little that came
    meanwhile is folded too, and what differs is written. Projectors wait for the transaction and go on after it.

    Raises:
        PoisonRecord: the log holds what cannot be read or applied.
        Unavailable: Kafka or MongoDB does not answer; nothing was changed.
    """
    _, partitions = await describe_topic(kafka, EVENTS)
    partition = partition_of(stream.encode(), partitions)
    database: Database = client[generation_database(generation)]
    fold = _StreamFold(kafka, partition, stream)
    with translated("reading the checkpoint"):
        found = await database[CHECKPOINTS].find_one({"_id": partition})
    if found is None:
        raise NothingToRepair(f"partition {partition}, where {stream} is, has not been projected yet")
    await fold.up_to(checkpoint_in(found))
    with translated("repairing a stream"):
        async with await client.start_session() as session, session.start_transaction(ReadConcern("snapshot"), DURABLE):
            held = await database[CHECKPOINTS].find_one_and_update(
                {"_id": partition}, {"$inc": {REPAIRS: 1}}, session=session, return_document=True
            )
            await fold.up_to(checkpoint_in(held))
            return await _mend(database, session, stream, fold.documents, collections)


class _StreamFold:
    """One stream's documents, folded from the start of the log up to a checkpoint, and then up to a later one."""

    def __init__(self, kafka: KafkaSettings, partition: int, stream: StreamId) -> None:
        self.documents: Documents = no_documents()
        self._kafka = kafka
        self._partition = partition
        self._stream = stream
        self._reader = LogReader(Cursor())

    async def up_to(self, checkpoint: Checkpoint) -> None:
        cursor = checkpoint.cursor
        async with open_partition(self._kafka, EVENTS, self._partition) as consumer:
            at = self._reader.cursor.offset
            async for records in read_to(consumer, EVENTS, self._partition, at, cursor.offset):
                for record in records:
                    commit = self._reader.read(record.offset, record.value)
                    for logged in commit.events if commit else ():
                        if logged.stream == self._stream:
                            project(self.documents, logged)
        if self._reader.cursor != cursor:
            raise RecordsLost(
                f"{EVENTS}/{self._partition}: the checkpoint says {cursor}, the log {self._reader.cursor}: "
                "the read model is of another log, rebuild it"
            )


async def _mend(
    database: Database, session: Session, stream: StreamId, expected: Documents, collections: AbstractCollection[str]
) -> Repaired:
    counts = {"missing": 0, "different": 0, "extra": 0}
    for collection in INDEXES:
        if collection not in collections:
            continue
        wanted = dict(expected[collection])
        changes: list[ReplaceOne[Document] | DeleteOne] = []
        stored: Any = database[collection].find(owner_query(collection, stream), session=session)
        async for document in stored:
            must_be = wanted.pop(document["_id"], None)
            if must_be is None:
                counts["extra"] += 1
                changes.append(DeleteOne({"_id": document["_id"]}))
            elif digest_of(must_be) != digest_of(document):
                counts["different"] += 1
                changes.append(ReplaceOne({"_id": document["_id"]}, must_be))
        for key, must_be in wanted.items():
            # it may be there with its owner altered
            there = await database[collection].find_one({"_id": key}, {"_id": True}, session=session)
            counts["missing" if there is None else "different"] += 1
            changes.append(ReplaceOne({"_id": key}, must_be, upsert=True))
        if changes:
            await database[collection].bulk_write(changes, ordered=False, session=session)
    return Repaired(stream, **counts)
