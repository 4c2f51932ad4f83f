"""Row 7: how fast the read models are rebuilt, beside the same documents by bare `insert_many` and index builds."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
from pymongo import MongoClient

from bench.events import preload
from bench.floors.insert import Inserters, open_inserters
from bench.harness import (
    Options,
    Row,
    RowResult,
    Sample,
    Target,
    cpu_seconds,
    interleave,
    median_of,
    ratio_of,
    say,
)
from projector.views import INDEXES
from shared.mongo import generation_database
from shared.settings import KafkaSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import ThrowAwayServers, throw_away_servers

PARTITIONS = 4
OURS, FLOOR = "rebuild", "insert_many and indexes"
BARE = generation_database(99)
_SAMPLE_SECONDS = 0.5
_BEHIND_THE_LOAD = '"catching up"'
"""The phase of a rebuild that begins once the last index is built."""


@dataclass(frozen=True)
class Used:
    """What a command and its children used; of memory, as far as that could be seen every half second."""

    seconds: float
    load_cpu: float
    """CPU seconds of a rebuild from its start to its last index; 0 for other commands."""
    rss_sum: float
    """The most memory of all its processes together, in MiB."""
    rss_largest: float
    """The most of one of them, in MiB."""


def command(servers: ThrowAwayServers, folder: str, *arguments: str) -> tuple[Any, Used]:
    """What a command of the projector prints, and what it used."""
    began, most, largest = time.perf_counter(), 0.0, 0.0
    with (
        subprocess.Popen(
            [sys.executable, "-m", "projector", *arguments],
            env={**os.environ, **servers.env, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        ThreadPoolExecutor(1) as threads,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        program = psutil.Process(process.pid)
        listening = threads.submit(_listen, process.stderr, program)
        while process.poll() is None:
            sizes = [0.0]
            for each in _family(program):
                with contextlib.suppress(psutil.Error):
                    sizes.append(each.memory_info().rss / 2**20)
            most, largest = max(most, sum(sizes)), max(largest, *sizes)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        load_cpu, last_words = listening.result()
        printed = process.stdout.read()
        assert process.returncode == 0, last_words + printed
        return json.loads(printed) if "--json" in arguments else printed, Used(seconds, load_cpu, most, largest)


def _listen(stderr: Iterable[str], program: psutil.Process) -> tuple[float, str]:
    """The CPU seconds of the load, if the program says that it is over; the program's last words."""
    load_cpu, last = 0.0, deque[str](maxlen=20)
    for line in stderr:
        last.append(line)
        if not load_cpu and _BEHIND_THE_LOAD in line:
            ended = program.cpu_times()
            load_cpu = cpu_seconds([program.pid]) + ended.children_user + ended.children_system
    return load_cpu, "".join(last)


def _family(program: psutil.Process) -> list[psutil.Process]:
    try:
        return [program, *program.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class Bench:
    """Both candidates, on one Kafka with a log and one MongoDB."""

    def __init__(self, servers: ThrowAwayServers, events: int, workers: int, stack: contextlib.ExitStack) -> None:
        self.servers = servers
        self.events = events
        self.workers = workers
        self.documents = 0
        self._stack = stack
        self._folder = stack.enter_context(tempfile.TemporaryDirectory())
        self._inserters: Inserters | None = None

    def settle(self) -> None:
        """Let MongoDB finish what earlier rounds left to be written, so that nobody pays for the one before."""
        with MongoClient[dict[str, Any]](self.servers.mongodb_url) as client:
            client.drop_database(BARE)
            client.admin.command("fsync")

    def rebuild(self) -> Sample:
        """Ours: reading, folding, inserting, indexing. Verifying comes behind and is not in the rate."""
        self.settle()
        rebuilt, used = command(self.servers, self._folder, "rebuild", "--json", "--workers", str(self.workers))
        events = rebuilt["verdict"]["events"]
        self.events = events
        command(self.servers, self._folder, "drop", str(rebuilt["previous"]))
        if self._inserters is None:
            self.documents = sum(each["documents"] for each in rebuilt["verdict"]["content"].values())
            source = generation_database(rebuilt["generation"])
            inserters = open_inserters(self.servers.mongodb_url, source, INDEXES, self.workers)
            self._inserters = self._stack.enter_context(inserters)
        extra = {"seconds with verifying": used.seconds, "RSS MiB": used.rss_sum, "RSS MiB of one": used.rss_largest}
        return Sample(events / rebuilt["load_seconds"], 1000 * used.load_cpu / events, extra=extra)

    def bare(self) -> Sample:
        """The floor: as many processes, the documents in their memory. Only after a rebuild made them."""
        assert self._inserters is not None
        self.settle()
        seconds, cpu = self._inserters.run(BARE)
        return Sample(self.events / seconds, 1000 * cpu / self.events)

    def verify(self) -> tuple[Any, Used]:
        """What a verification of all documents says, and what it used."""
        self.settle()
        return command(self.servers, self._folder, "verify", "--json", "--workers", str(self.workers))


@contextlib.asynccontextmanager
async def open_bench(events: int, workers: int) -> AsyncIterator[Bench]:
    """Servers with so many events in four partitions."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(throw_away_servers())
        kafka, began = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap), time.perf_counter()
        await create_topics(kafka, TopicSettings(partitions=PARTITIONS))
        await preload(kafka, events)
        say(f"  {events:,} events written in {time.perf_counter() - began:.0f} s")
        yield Bench(servers, events, workers, stack)


async def rebuild(options: Options) -> RowResult:
    """Read models of a million events."""
    workers = os.cpu_count() or 1
    async with open_bench(options.count(1_000_000, 20_000), workers) as bench:
        candidates = {
            OURS: lambda: asyncio.to_thread(bench.rebuild),
            FLOOR: lambda: asyncio.to_thread(bench.bare),
        }
        samples = await interleave(candidates, options.rounds)
    ratio = ratio_of(samples[OURS], samples[FLOOR])
    rate, memory = median_of(samples[OURS]), median_of(samples[OURS], "RSS MiB")
    measured = f"{ratio.text('.2f')} x ({rate.text()} events/s)"
    what = f"rebuild of {bench.events:,} events, {bench.documents:,} documents"
    notes = [
        (
            f"{workers} worker processes each. The rebuild reads, folds, inserts and indexes; the floor has the "
            "documents in memory and inserts and indexes. Its rate counts the same events."
        ),
        (
            "CPU seconds of the rebuild are those of the whole command until its last index is built, the start of its "
            f"processes with them; at most {memory.max:,.0f} MiB in all of them together, also while they verify every "
            "document, which comes behind."
        ),
    ]
    target = Target("7", what, "≥ 0.75 x bare insert + index build", measured, met=ratio.median >= 0.75)
    return RowResult([target], samples, notes, unit="events")


ROWS: Mapping[str, Row] = {"7": rebuild}
