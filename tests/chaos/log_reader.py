"""Reads all that there is: the commands, the log, and every generation of the read models. No code of the service."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from aiokafka import AIOKafkaConsumer
from msgspec import Struct
from pymongo import MongoClient

COMMANDS = "episodes.commands"
EVENTS = "episodes.events"

Document = Mapping[str, Any]


class Record(Struct, frozen=True, gc=False):
    """A record of Kafka. ``headers`` are those of a command."""

    offset: int
    value: bytes
    at: int = 0
    """Kafka's timestamp, in milliseconds."""
    key: bytes | None = None
    headers: dict[str, str] = {}


class Log(Struct):
    """Partition → its records, in the order of their offsets, of both topics."""

    commands: dict[int, list[Record]]
    events: dict[int, list[Record]]


class Generation(Struct):
    """One set of read models: collection → its documents."""

    number: int
    state: str
    """As ``episodes_meta.generations`` has it; what is ``live`` or ``loaded`` is kept up to date."""
    in_use: bool
    collections: dict[str, list[Document]]

    @property
    def positions(self) -> dict[int, int]:
        """Partition → the position up to which the log is in it."""
        return {document["_id"]: document["position"] for document in self.collections.get("checkpoints", ())}


class Models(Struct):
    generations: list[Generation]


def read_log(bootstrap: str) -> Log:
    """Everything in both topics, up to where they end now."""
    return asyncio.run(_read_log(bootstrap))


def read_models(mongodb_url: str) -> Models:
    """Every generation that is kept up to date, whether in use or not."""
    with MongoClient[dict[str, Any]](
        mongodb_url, serverSelectionTimeoutMS=20_000, tz_aware=True, readConcernLevel="majority"
    ) as client:
        pointer = client["episodes_meta"]["pointers"].find_one({"_id": "generation"}) or {"generation": 1}
        generations = [
            Generation(
                number=kept["_id"],
                state=kept["state"],
                in_use=kept["_id"] == pointer["generation"],
                collections={
                    name: list(client[f"episodes_g{kept['_id']}"][name].find())
                    for name in client[f"episodes_g{kept['_id']}"].list_collection_names()
                },
            )
            for kept in client["episodes_meta"]["generations"].find({"state": {"$in": ["live", "loaded"]}})
        ]
    return Models(generations)


async def _read_log(bootstrap: str) -> Log:
    events = await _read_topic(bootstrap, EVENTS)
    return Log(await _read_topic(bootstrap, COMMANDS), events)


async def _read_topic(bootstrap: str, topic: str) -> dict[int, list[Record]]:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )
    await consumer.start()
    try:
        partitions = consumer.assignment()
        if not partitions:
            raise LookupError(f"there is no topic {topic}")
        ends: Mapping[Any, int] = await consumer.end_offsets(partitions)
        records: dict[int, list[Record]] = {partition.partition: [] for partition in partitions}
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for partition, fetched in (await consumer.getmany(timeout_ms=100)).items():
                records[partition.partition] += [
                    Record(
                        record.offset,
                        record.value or b"",
                        record.timestamp,
                        record.key,
                        _texts(record.headers) if topic == COMMANDS else {},
                    )
                    for record in fetched
                    if record.offset < ends[partition]
                ]
        return records
    finally:
        await consumer.stop()


def _texts(headers: Sequence[tuple[str, bytes]]) -> dict[str, str]:
    return {name: value.decode(errors="replace") for name, value in headers}


def instant(at: datetime) -> str:
    """As answers write a time: ISO 8601 in UTC with milliseconds."""
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"
