"""Our three processes on a state of a given size, which is put into Kafka directly and not through the gateway."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from aiokafka import AIOKafkaConsumer
from msgspec import Raw

from bench.events import Log, Record, write
from bench.harness import say
from projector.documents import Checkpoint, read_checkpoints
from shared.errors import Unavailable
from shared.events import Event, NamespaceCreated, ProjectCreated, ProjectEpisodeCreated, TenantEpisodeRecorded
from shared.ids import namespace_stream, tenant_stream
from shared.kafka import ends, open_partition
from shared.mongo import Client, open_mongo
from shared.settings import EVENTS, KafkaSettings, MongoSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import Cluster, ThrowAwayServers, throw_away_cluster, throw_away_servers

PROJECT = "robotics"
TEXT = "The arm drifted by two degrees and was calibrated again, as Grace Hopper had said it would. " * 3
_PROJECTED_SECONDS = 600.0
_READY_SECONDS = 300.0
_NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
_ITEMS = 100


@dataclass(frozen=True)
class Size:
    """How much is there before anything is measured: half of the episodes are of users, half of tenants."""

    episodes: int
    tenants: int = 1_000
    """So many tenants, and as many users with a namespace each."""
    partitions: int = 8

    @property
    def of_each(self) -> int:
        """Episodes of a user, and of a tenant."""
        return max(1, self.episodes // 2 // self.tenants)


@dataclass(frozen=True)
class Stack:
    """Servers and our three processes, up to date with the log."""

    servers: ThrowAwayServers
    cluster: Cluster
    size: Size
    mongodb: Client
    log: AIOKafkaConsumer
    """Asked for the ends of the log. It stays open, as MongoDB's client does, so that asking often costs little."""

    @property
    def kafka(self) -> KafkaSettings:
        """Where Kafka is."""
        return KafkaSettings(bootstrap_servers=self.servers.kafka_bootstrap)

    @property
    def pids(self) -> list[int]:
        """Of our processes that run."""
        return [pid for process in self.cluster.processes.values() if (pid := process.pid) is not None]

    async def wait_level(self, at_least: int = 0, *, look_seconds: float = 0.02) -> int:
        """Wait until the read models have all of the log, and that is ``at_least`` so much; how many records count.

        Raises:
            TimeoutError: they do not get there.
        """
        async with asyncio.timeout(_PROJECTED_SECONDS):
            while True:
                with contextlib.suppress(Unavailable):
                    _, there = await read_checkpoints(self.mongodb)
                    position = sum(each.cursor.position for each in there.values())
                    if position >= at_least and await self._has_all(there):
                        return position
                await asyncio.sleep(look_seconds)

    async def _has_all(self, there: Mapping[int, Checkpoint]) -> bool:
        log_ends = await ends(self.log, EVENTS, range(self.size.partitions))
        return all(there.get(number, Checkpoint()).cursor.offset >= end for number, end in log_ends.items())


@contextlib.asynccontextmanager
async def open_stack(
    size: Size, log: Iterable[tuple[int, list[Record]]] | None = None, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Stack]:
    """Servers with a log of this size, or with ``log``, and our processes when they have read all of it."""
    began = time.perf_counter()
    with throw_away_servers() as servers:
        kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap)
        await create_topics(kafka, TopicSettings(partitions=size.partitions))
        written = await write(kafka, EVENTS, log or episodes(size))
        env = {"TOPICS_PARTITIONS": str(size.partitions), **(settings or {})}
        with throw_away_cluster(servers, env, ready_seconds=_READY_SECONDS) as cluster:
            mongo = MongoSettings(url=servers.mongodb_url)
            async with open_mongo(mongo) as mongodb, open_partition(kafka, EVENTS, 0) as consumer:
                stack = Stack(servers, cluster, size, mongodb, consumer)
                await stack.wait_level(look_seconds=0.5)
                say(
                    f"  {size.episodes:,} episodes, {size.tenants:,} tenants, {size.partitions} partitions: "
                    f"{written.total():,} records are read after {time.perf_counter() - began:.0f} s"
                )
                yield stack


def user(number: int) -> str:
    """The name of a user, and of the namespace that is theirs."""
    return f"user-{number}"


def tenant(number: int) -> str:
    """The id of a tenant."""
    return f"tenant-{number}"


def episodes(size: Size) -> Iterator[tuple[int, list[Record]]]:
    """The record batches of a log with nothing but episodes, the youngest of all streams at the end."""
    log = Log(size.partitions)
    for first in range(0, size.of_each, _ITEMS):
        numbers = range(first, min(first + _ITEMS, size.of_each))
        for owner in range(size.tenants):
            for number in numbers:
                made = ([] if number else founding(user(owner), PROJECT)) + [created(user(owner), PROJECT, number)]
                yield from log.append(namespace_stream(user(owner)), made, "UpsertEpisode")
            recorded = [_recorded(tenant(owner), number) for number in numbers]
            yield from log.append(tenant_stream(tenant(owner)), recorded, "RecordEpisodes")
    yield from log.rest()


def founding(namespace: str, *projects: str) -> list[Event]:
    """A namespace and its projects come into being."""
    made: list[Event] = [NamespaceCreated(f"{namespace}-n", namespace)]
    return made + [ProjectCreated(f"{namespace}-{project}", project, project) for project in projects]


def created(namespace: str, project: str, number: int) -> ProjectEpisodeCreated:
    """The project's episode ``run-<number>``, counted from 0."""
    return ProjectEpisodeCreated(
        id=f"{namespace}-{project}-{number}",
        project_id=f"{namespace}-{project}",
        project=project,
        ordinal=number + 1,
        name=f"run-{number}",
        description=TEXT,
        tags=("arm", "calibration"),
        folder=None,
        write_protected=False,
        status="running",
        metadata=Raw(b'{"seed":7,"rate":0.5}'),
    )


def _recorded(owner: str, number: int) -> TenantEpisodeRecorded:
    return TenantEpisodeRecorded(
        id=f"ep_{owner}_{number}",
        type="message",
        content=TEXT,
        source="notes",
        timestamp=_NOON,
        metadata=Raw(b'{"priority":"high"}'),
    )
