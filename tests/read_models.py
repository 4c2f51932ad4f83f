"""Read models of logs that a test writes itself, and the projector's commands on them."""

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument

from local.process import ROOT
from projector import generations
from projector.following import Following
from projector.loop import run
from projector.mongodb import open_documents
from projector.settings import ProjectorSettings
from projector.verify import Verdict, verify
from projector.views import INDEXES
from shared.kafka import open_producer, partition_of
from shared.mongo import META, Client, Database, generation_database, open_mongo
from shared.probes import Status
from shared.settings import EVENTS, KafkaSettings, MongoSettings
from tests.cluster import ThrowAwayServers
from tests.event_log import History, PartitionLog
from tests.topics import remake_topics

PARTITIONS = 3
WITHIN = 60.0
_RECORDS_AT_ONCE = 300


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def progress(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]


class Command:
    """A command of the projector that is running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._err: list[str] = []

    async def reached(self, phase: str, part: float = 0.0) -> dict[str, Any]:
        """Wait until it says that it is that far in a phase."""
        assert self.process.stderr is not None
        async with asyncio.timeout(WITHIN):
            while line := (await self.process.stderr.readline()).decode():
                self._err.append(line)
                if line.startswith("{"):
                    told: dict[str, Any] = json.loads(line)
                    if told["phase"].startswith(phase) and told["done"] >= part * told["of"]:
                        return told
        raise AssertionError(f"it ended before {phase}: {''.join(self._err)}")

    def send(self, number: int) -> None:
        """Send a signal to it, and to none of its workers."""
        self.process.send_signal(number)

    async def kill(self) -> None:
        """End it as a power cut would. Its workers are left to end by themselves."""
        self.send(signal.SIGKILL)
        await self.process.wait()

    async def said(self) -> Said:
        """Wait for its end."""
        async with asyncio.timeout(WITHIN):
            out, err = await self.process.communicate()
        return Said(self.process.returncode or 0, out.decode(), "".join(self._err) + err.decode())


@dataclass
class ReadModels:
    """Plays the ingestors, and runs projectors and their commands."""

    servers: ThrowAwayServers
    kafka: KafkaSettings
    mongo: MongoSettings
    producer: AIOKafkaProducer
    client: Client
    folder: Path
    logs: Mapping[int, PartitionLog] = field(
        default_factory=lambda: {number: PartitionLog() for number in range(PARTITIONS)}
    )
    written: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(PARTITIONS), 0))

    def history(self, partition: int, **options: Any) -> History:
        """Random events for the partition, of streams that belong there."""
        return History(self.logs[partition], random.Random(partition), prefix=prefix_for(partition), **options)  # noqa: S311

    def histories(self, steps: int, **options: Any) -> list[History]:
        """Random events in each partition, under several writers."""
        made = [self.history(partition, **options) for partition in range(PARTITIONS)]
        for history in made:
            for number in range(steps):
                history.step()
                if number % 97 == 0:
                    self.replace_writer(history)
        return made

    def replace_writer(self, history: History) -> None:
        """Let a writer take over from one that took over just before, and goes on writing."""
        log = history.log
        log.take_over()
        log.take_over()
        stream = next(iter(log.last_event_ids))
        log.append_fenced(stream, log.events[-1].event)
        history.log.note()

    async def write(self, *partitions: int) -> None:
        """Put what is new in the logs into the topic; the events of one command together."""
        for partition in partitions or range(PARTITIONS):
            log, start = self.logs[partition], self.written[partition]
            ends = [commit.cursor.offset for commit in log.commits] + [log.offset]
            for end in ends:
                if end - start >= _RECORDS_AT_ONCE or (end == log.offset and end > start):
                    builder = self.producer.create_batch()
                    for key, value in log.records[start:end]:
                        assert builder.append(key=key, value=value, timestamp=None) is not None
                    builder.close()
                    appended = await self.producer.send_batch(builder, EVENTS, partition=partition)
                    assert (await appended).offset == start
                    start = end
            self.written[partition] = start

    async def begin_anew(self) -> None:
        """Make the topics anew: the log is empty, and another one."""
        await remake_topics(self.kafka, PARTITIONS)
        self.logs = {number: PartitionLog() for number in range(PARTITIONS)}
        self.written = dict.fromkeys(range(PARTITIONS), 0)

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[Following]:
        """A projector of all partitions, in this process."""
        following = Following(self.client, self.kafka, ProjectorSettings(), Status())
        await following.begin()
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(following.look_on())]
            work += [tasks.create_task(following.run_partition(partition)) for partition in range(PARTITIONS)]
            yield following
            for each in work:
                each.cancel()

    async def project(self, generation: int = 1) -> None:
        """Apply all that is written to one generation, and to no other."""
        await generations.prepare(self.client)
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(
                    run(
                        partition,
                        kafka=self.kafka,
                        open_documents=partial(open_documents, self.client, generation),
                        status=Status(),
                        max_events=1_000,
                    )
                )
                for partition in range(PARTITIONS)
            ]
            await self.applied(generation)
            for each in work:
                each.cancel()

    async def applied(self, generation: int = 1, *, within: float = WITHIN) -> None:
        """Wait until a generation is at the ends of the logs."""

        async def is_there() -> bool:
            found = await generations.checkpoints(self.client, generation)
            return all(
                number in found and found[number].cursor == log.cursor
                for number, log in self.logs.items()
                if log.offset
            )

        await until(is_there, f"generation {generation} at the end of the log", within=within)

    def database(self, generation: int = 1) -> Database:
        return self.client[generation_database(generation)]

    async def content(self, generation: int = 1) -> dict[str, list[bytes]]:
        """Collection → each document as it is stored, without the order in which they are."""
        options: CodecOptions[Any] = CodecOptions(document_class=RawBSONDocument)
        return {
            name: sorted(
                [one.raw async for one in self.database(generation).get_collection(name, codec_options=options).find()]
            )
            for name in INDEXES
        }

    async def databases(self) -> set[str]:
        """The generations' databases that exist."""
        return {name for name in await self.client.list_database_names() if name.startswith("episodes_g")}

    async def verdict(self, generation: int = 1, **options: Any) -> Verdict:
        """What the verification finds."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return await verify(
                self.client,
                self.kafka,
                generation,
                Path(folder),
                workers=1,
                report=lambda phase, done, of: None,
                **options,
            )

    async def start(self, *arguments: str) -> Command:
        """Start a command of the projector, in a process group of its own."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "projector",
            *arguments,
            cwd=ROOT,
            env={**os.environ, **self.servers.env, "NO_COLOR": "1", "COLUMNS": "200", "TMPDIR": str(self.folder)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        return Command(process)

    async def cli(self, *arguments: str) -> Said:
        """Run a command of the projector."""
        return await (await self.start(*arguments)).said()

    async def forget_heartbeat(self) -> None:
        """Let the time pass after which a rebuild that was killed counts as dead."""
        await self.client[META][generations.GENERATIONS].update_many(
            {"build": {"$exists": True}}, {"$set": {"build.heartbeat_at": datetime(2026, 1, 1, tzinfo=UTC)}}
        )


@cache
def prefix_for(partition: int) -> str:
    """A prefix with which the names of a `History` lead to the partition."""
    names = ("namespace:{}n0", "namespace:{}n1", "namespace:{}n2", "tenant:{}t0", "tenant:{}t1", "tenant:{}t2")
    return next(
        prefix
        for prefix in map("x{}-".format, count())
        if all(partition_of(name.format(prefix).encode(), PARTITIONS) == partition for name in names)
    )


async def until(condition: Callable[[], Awaitable[bool]], what: str, *, within: float = WITHIN) -> None:
    """Wait for the condition."""
    deadline = time.monotonic() + within
    while not await condition():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def open_read_models(servers: ThrowAwayServers, folder: Path) -> AsyncIterator[ReadModels]:
    """Empty topics and an empty database."""
    kafka, mongo = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap), MongoSettings(url=servers.mongodb_url)
    await remake_topics(kafka, PARTITIONS)
    async with open_mongo(mongo) as client, open_producer(kafka, batch_bytes=8 * 1024**2) as producer:
        for name in await client.list_database_names():
            if name.startswith("episodes"):
                await client.drop_database(name)
        yield ReadModels(servers, kafka, mongo, producer, client, folder)
