"""How fast the read models are rebuilt, beside the same documents by bare `insert_many` and index builds, in turns.

    python -m bench.rebuild [--events 100000] [--rounds 2] [--workers 2]

Starts its own Kafka and MongoDB. The ceiling has as many processes as the rebuild, its documents in memory, and nothing
else to do. The rate is that of the load: reading, folding, inserting, indexing. Prints JSON: rates, ratio, and the
most memory (RSS, MiB) that rebuild and verify had, as the sum over their processes and in the largest of them.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from pymongo import MongoClient, WriteConcern

from bench.events import preload
from projector import generations
from projector.views import INDEXES
from shared.mongo import open_mongo
from shared.process import configure_logging
from shared.settings import KafkaSettings, MongoSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import ThrowAwayServers, throw_away_servers

PARTITIONS = 4
BARE = 99
"""The number of the generation that the ceiling is put into."""
_AT_ONCE = 1_000
_SAMPLE_SECONDS = 0.1

Portions = Sequence[tuple[str, Sequence[dict[str, Any]]]]


@dataclass
class Memory:
    """The most that a command had, in MiB."""

    sum: float = 0.0
    largest: float = 0.0


def command(servers: ThrowAwayServers, folder: str, *arguments: str) -> tuple[Any, float, Memory]:
    """What a command of the projector prints, the seconds it takes, and its memory."""
    memory, began = Memory(), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "projector", *arguments],
        env={**os.environ, **servers.env, "TMPDIR": folder},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        program = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = [0.0]
            for each in [program, *program.children(recursive=True)]:
                try:
                    sizes.append(each.memory_info().rss / 1024**2)
                except psutil.Error:
                    continue
            memory = Memory(max(memory.sum, sum(sizes)), max(memory.largest, *sizes))
            time.sleep(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        assert process.stdout is not None
        printed = process.stdout.read()
        assert process.returncode == 0, printed
        return json.loads(printed) if "--json" in arguments else printed, seconds, memory


def portions(url: str, generation: int) -> Portions:
    """All documents of a generation, as they are inserted."""
    database = MongoClient[dict[str, Any]](url, tz_aware=True)[f"episodes_g{generation}"]
    made = []
    for collection in INDEXES:
        documents = list(database[collection].find())
        made += [(collection, documents[start : start + _AT_ONCE]) for start in range(0, len(documents), _AT_ONCE)]
    return made


def insert(url: str, some: Portions) -> None:
    """One process of the ceiling."""
    database = MongoClient[dict[str, Any]](url, tz_aware=True)[f"episodes_g{BARE}"]
    for collection, documents in some:
        database[collection].with_options(write_concern=WriteConcern(w=1, j=False)).insert_many(
            documents, ordered=False
        )


async def build_indexes(url: str) -> None:
    async with open_mongo(MongoSettings(url=url)) as client:
        await generations.create_indexes(client, BARE)


async def empty(url: str) -> None:
    async with open_mongo(MongoSettings(url=url)) as client:
        await client.drop_database(f"episodes_g{BARE}")
        await generations.create_collections(client, BARE)


def settle(url: str) -> None:
    """Let MongoDB finish what earlier rounds left to be written, so that nobody pays for the one before."""
    asyncio.run(empty(url))
    MongoClient[dict[str, Any]](url).admin.command("fsync")


def bare(url: str, documents: Portions, workers: int) -> float:
    """Seconds for the ceiling."""
    settle(url)
    fork = multiprocessing.get_context("fork")  # the documents are there already
    processes = [fork.Process(target=insert, args=(url, documents[number::workers])) for number in range(workers)]
    began = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    asyncio.run(build_indexes(url))
    return time.perf_counter() - began


async def fill(kafka: KafkaSettings, events: int) -> None:
    await create_topics(kafka, TopicSettings(partitions=PARTITIONS))
    await preload(kafka, events)


def main(events: int, rounds: int, workers: int) -> None:
    load_before = os.getloadavg()[0]
    with throw_away_servers() as servers, tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        asyncio.run(fill(KafkaSettings(bootstrap_servers=servers.kafka_bootstrap), events))
        filled = time.perf_counter() - began
        options = ("--json", "--workers", str(workers))
        documents: Portions = ()
        ours, ceilings, memories = [], [], []
        for number in range(rounds):
            settle(servers.mongodb_url)
            rebuilt, _, memory = command(servers, folder, "rebuild", *options)
            events = rebuilt["verdict"]["events"]
            ours.append(events / rebuilt["load_seconds"])
            memories.append(memory)
            command(servers, folder, "drop", str(rebuilt["previous"]))
            if not documents:
                documents = portions(servers.mongodb_url, rebuilt["generation"])
                gc.freeze()
            ceilings.append(events / bare(servers.mongodb_url, documents, workers))
            print(f"round {number + 1}: {ours[-1]:.0f}/s beside {ceilings[-1]:.0f}/s", file=sys.stderr)
        asyncio.run(empty(servers.mongodb_url))
        verified, seconds, verify_memory = command(servers, folder, "verify", *options)
    assert verified["events"] == events
    print(
        json.dumps(
            {
                "events": events,
                "documents": sum(each["documents"] for each in verified["content"].values()),
                "preload_events_per_second": round(events / filled),
                "rebuild_events_per_second": [round(rate) for rate in ours],
                "ceiling_events_per_second": [round(rate) for rate in ceilings],
                "ratio": round(statistics.median(ours) / statistics.median(ceilings), 2),
                "verify_events_per_second": round(events / seconds),
                "rebuild_rss_mib": {
                    "sum": round(max(each.sum for each in memories)),
                    "largest": round(max(each.largest for each in memories)),
                },
                "verify_rss_mib": {"sum": round(verify_memory.sum), "largest": round(verify_memory.largest)},
                "workers": workers,
                "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    configure_logging("bench")
    main(given.events, given.rounds, given.workers)
