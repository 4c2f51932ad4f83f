"""A log to measure with: events of both APIs over many streams, of which few get most, as ingestors would write it.

    python -m bench.events --events 1000000 --bootstrap localhost:9092

writes it into the empty topic of a running Kafka. Half of the streams are namespaces, half are tenants.
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate

from msgspec import Raw

from shared.codec import encode_record
from shared.commands import Entity
from shared.errors import Unavailable
from shared.events import (
    BEFORE_ALL_COMMANDS,
    CommandType,
    EpisodeChanges,
    Event,
    FolderCreated,
    FolderRef,
    LoggedEvent,
    LoggedFence,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
    TenantEpisodeRecorded,
    WriterFenced,
)
from shared.ids import CommandId, EventId, Position, StreamId, entity_id, namespace_stream, tenant_stream
from shared.kafka import append_together, describe_topic, open_producer, partition_of
from shared.settings import EVENTS, KafkaSettings

STREAMS = 10_000
RECORDS_PER_BATCH = 1_000
ITEMS_PER_BATCH = 8
_KNOWN_SECONDS = 20.0
_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
_SENTENCE = "The arm drifted by two degrees and was calibrated again, as Grace Hopper had said it would. "

Record = tuple[bytes | None, bytes, datetime]


@dataclass
class _Stream:
    """What the writer of a stream knows of it."""

    name: str
    stream: StreamId
    episodes: int = 0
    deleted: set[int] = field(default_factory=set)


@dataclass
class _Partition:
    """The end of a partition, and the records that are not sent yet."""

    position: int = 0
    records: list[Record] = field(default_factory=list)


class Log:
    """The log of one writer, command by command, in record batches that are taken away as they fill."""

    def __init__(self, partitions: int) -> None:
        fence = (None, encode_record(LoggedFence(WriterFenced("bench", "first")), at=_NOON), _NOON)
        self.events = 0
        self._ends = [_Partition(records=[fence]) for _ in range(partitions)]
        self._last_event_ids: Counter[StreamId] = Counter()
        self._commands = 0

    def append(self, stream: StreamId, made: Sequence[Event], kind: CommandType) -> Iterator[tuple[int, list[Record]]]:
        """Write the events of one command; the partition and the records of a batch that is full now, if one is."""
        key = stream.encode()
        partition = partition_of(key, len(self._ends))
        end = self._ends[partition]
        self._commands += 1
        self.events += len(made)
        at = _NOON + timedelta(milliseconds=10 * self._commands)
        for number, event in enumerate(made, 1):
            end.position += 1
            self._last_event_ids[stream] += 1
            logged = LoggedEvent(
                stream=stream,
                event_id=EventId(self._last_event_ids[stream]),
                position=Position(end.position),
                writer=0,
                command_id=CommandId(f"01980e5a-7c00-7000-8000-{self._commands:012d}"),
                command_offset=BEFORE_ALL_COMMANDS,
                actor="alice",
                at=at,
                event=event,
                completes=kind if number == len(made) else None,
            )
            end.records.append((key, encode_record(logged), at))
        if len(end.records) >= RECORDS_PER_BATCH:
            yield partition, end.records
            end.records = []

    def rest(self) -> Iterator[tuple[int, list[Record]]]:
        """The batches that are not full."""
        for partition, end in enumerate(self._ends):
            if end.records:
                yield partition, end.records
                end.records = []


def batches(events: int, partitions: int, *, seed: int = 1) -> Iterator[tuple[int, list[Record]]]:
    """The record batches of a log with about so many events: partition and records, in order. Commands stay whole."""
    chance = random.Random(seed)  # noqa: S311
    streams = [_stream(number) for number in range(STREAMS)]
    weights = [*accumulate(1 / rank for rank in range(1, STREAMS + 1))]
    log = Log(partitions)
    while log.events < events:
        for stream in chance.choices(streams, cum_weights=weights, k=1_000):
            is_tenant = stream.stream.startswith("tenant:")
            if is_tenant and chance.random() > 1.5 / ITEMS_PER_BATCH:
                continue  # a batch makes many events, and there are to be as many of either kind
            made = _recorded(stream, chance) if is_tenant else _changed(stream, chance)
            yield from log.append(stream.stream, made, "RecordEpisodes" if is_tenant else "UpsertEpisode")
            if log.events >= events:
                break
    yield from log.rest()


async def preload(kafka: KafkaSettings, events: int) -> Counter[int]:
    """Write such a log; the number of records in each partition."""
    return await write(kafka, EVENTS, batches(events, await partitions_of(kafka, EVENTS)))


async def write(kafka: KafkaSettings, topic: str, some: Iterable[tuple[int, list[Record]]]) -> Counter[int]:
    """Append record batches, one on its way to each partition at a time; the number of records in each."""
    written: Counter[int] = Counter()
    sent: dict[int, asyncio.Future[object]] = {}
    async with open_producer(kafka, batch_bytes=8 * 1024**2) as producer:
        for partition, records in some:
            if partition in sent:
                await sent[partition]
            sent[partition] = await append_together(producer, topic, partition, records)
            written[partition] += len(records)
        for future in sent.values():
            await future
    return written


async def partitions_of(kafka: KafkaSettings, topic: str) -> int:
    """How many partitions the topic has. One that was made just now may take a moment to be known."""
    async with asyncio.timeout(_KNOWN_SECONDS):
        while True:
            try:
                return (await describe_topic(kafka, topic))[1]
            except Unavailable:
                await asyncio.sleep(0.05)


def _stream(number: int) -> _Stream:
    name = f"{'team' if number % 2 else 'tenant'}-{number}"
    return _Stream(name, namespace_stream(name) if number % 2 else tenant_stream(name))


def _recorded(stream: _Stream, chance: random.Random) -> list[Event]:
    made: list[Event] = []
    for _ in range(ITEMS_PER_BATCH):
        stream.episodes += 1
        name = f"Thing {chance.randrange(200)}"
        made.append(
            TenantEpisodeRecorded(
                id=f"ep_{stream.name}_{stream.episodes}",
                type="message",
                content=_SENTENCE * chance.randint(1, 4),
                source="notes",
                timestamp=_NOON,
                metadata=Raw(b'{"priority":"high"}'),
                entities=(Entity(entity_id(stream.name, "thing", name), name, "thing"),),
            )
        )
    return made


def _changed(stream: _Stream, chance: random.Random) -> list[Event]:
    project_id, choice = f"{stream.name}-p", chance.random()
    if stream.episodes and choice < 0.5:
        number = chance.randint(1, stream.episodes)
        identity, name = _identity(stream, number), f"run-{number}"
        if number in stream.deleted:
            stream.deleted.discard(number)
            return [ProjectEpisodeRestored(identity, project_id, "robotics", name)]
        if choice < 0.04:
            stream.deleted.add(number)
            return [ProjectEpisodeDeleted(identity, project_id, "robotics", name)]
        changes = EpisodeChanges(status=chance.choice(("completed", "failed")), tags=("arm", "again"))
        return [ProjectEpisodeRevised(identity, project_id, "robotics", name, changes)]
    made: list[Event] = []
    if not stream.episodes:
        made += [NamespaceCreated(f"{stream.name}-n", stream.name), ProjectCreated(project_id, "robotics", "robotics")]
    stream.episodes += 1
    folder = None
    if stream.episodes % 20 == 1:
        folder = FolderRef(f"{stream.name}-f{stream.episodes}", f"/experiments/batch-{stream.episodes}")
        made.append(FolderCreated(folder.id, project_id, "robotics", None, folder.path, folder.name))
    made.append(
        ProjectEpisodeCreated(
            id=_identity(stream, stream.episodes),
            project_id=project_id,
            project="robotics",
            ordinal=stream.episodes,
            name=f"run-{stream.episodes}",
            description=_SENTENCE * chance.randint(1, 3),
            tags=("arm", "calibration"),
            folder=folder,
            write_protected=False,
            status="running",
            metadata=Raw(b'{"seed":7,"rate":0.5}'),
        )
    )
    return made


def _identity(stream: _Stream, number: int) -> str:
    return f"{stream.name}-e{number}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--bootstrap", required=True)
    options = parser.parse_args()
    began = time.perf_counter()
    records = asyncio.run(preload(KafkaSettings(bootstrap_servers=options.bootstrap), options.events))
    print(f"{records.total()} records in {time.perf_counter() - began:.1f} s")
