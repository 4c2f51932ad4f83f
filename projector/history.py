"""How a stream, or one thing in it, came to be: its events, read from the log."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from shared.events import LoggedEvent
from shared.ids import StreamId
from shared.kafka import describe_topic, ends, open_partition, partition_of, read_to
from shared.log import Cursor, LogReader
from shared.settings import EVENTS, KafkaSettings


class HistoryEntry(Struct, frozen=True):
    """One event, as a person reads it."""

    at: datetime
    event_id: int
    type: str
    subject: str
    command_id: str
    command: str
    """The command's type; several events may belong to it."""
    actor: str
    changed: dict[str, Any]
    """What the event says, without the ids that stand beside it."""


async def history(kafka: KafkaSettings, stream: StreamId, subject: str | None) -> AsyncIterator[HistoryEntry]:
    """The stream's events, oldest first; of one subject only, by its id or a name that it has or had.

    Raises:
        PoisonRecord: the log holds what cannot be read.
        Unavailable: Kafka does not answer.
    """
    ids = None
    if subject is not None:  # a name leads to an id, which had other names before
        ids = {logged.event.id async for logged, _ in _events(kafka, stream) if subject in _names(logged)}
    async for logged, command in _events(kafka, stream):
        if ids is None or logged.event.id in ids:
            yield _entry(logged, command)


async def _events(kafka: KafkaSettings, stream: StreamId) -> AsyncIterator[tuple[LoggedEvent, str]]:
    """The stream's events, each with the type of its command."""
    _, partitions = await describe_topic(kafka, EVENTS)
    partition = partition_of(stream.encode(), partitions)
    async with open_partition(kafka, EVENTS, partition) as consumer:
        end = (await ends(consumer, EVENTS, [partition]))[partition]
        reader = LogReader(Cursor())
        async for records in read_to(consumer, EVENTS, partition, 0, end):
            for record in records:
                commit = reader.read(record.offset, record.value)
                for logged in commit.events if commit else ():
                    if logged.stream == stream:
                        yield logged, (commit.events[-1].completes or "" if commit else "")


def _names(logged: LoggedEvent) -> set[str | None]:
    """What the event calls its subject."""
    event = logged.event
    called = {getattr(event, attribute, None) for attribute in ("id", "name", "path", "slug")}
    return {*called, getattr(getattr(event, "changes", None), "name", None)}


def _entry(logged: LoggedEvent, command: str) -> HistoryEntry:
    said = msgspec.json.decode(msgspec.json.encode(logged.event))
    changed = said.get("changes", {key: value for key, value in said.items() if key not in {"id", "project_id"}})
    return HistoryEntry(
        at=logged.at,
        event_id=logged.event_id,
        type=type(logged.event).__name__,
        subject=logged.event.id,
        command_id=logged.command_id,
        command=command,
        actor=logged.actor,
        changed=changed,
    )
