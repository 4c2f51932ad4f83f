"""What readers and writers notice of a rebuild, a switch and a rollback of a large log: errors, mixed pages, lag.

    python -m bench.serving [--events 1000000] [--reads 200] [--workers 1]

Starts its own servers, one gateway, ingestor and projector. First, with nobody there, the content hash of the live read
models, of rebuilt ones and of ones whose rebuild was killed half-way. Then ``--reads`` requests a second, begun whether
or not the ones before are answered, lists and single episodes, and ten writes a second that wait until they can be
read: what they wait is the lag. Everything, this load too, shares the machine's cores. Prints JSON; exits with 1 if a
hash differs, a reader got an error or two generations in one answer, or a write waited for over two seconds.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
from pymongo import MongoClient

from bench.events import preload
from shared.process import configure_logging
from shared.settings import KafkaSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import Cluster, throw_away_cluster, throw_away_servers

PARTITIONS = 4
EPISODES, PAGE = 60, 20
QUIET, BUSY = "/namespaces/alice/projects/quiet/episodes", "/namespaces/alice/projects/busy/episodes"
WRITES_PER_SECOND = 10
MOST_LAG_SECONDS = 2.0
BY_THE_LOG, OLD = "by the log", "old generation"
OTHER = {BY_THE_LOG: OLD, OLD: BY_THE_LOG}


class Projector:
    """The projector's commands, on the servers of a cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._env = {**os.environ, **cluster.env, "TMPDIR": str(folder)}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "projector", *arguments],
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    async def run(self, *arguments: str) -> str:
        """What the command prints."""
        process = self.start(*arguments)
        printed, complaint = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0, complaint
        return printed

    async def rebuild(self, workers: int) -> Any:
        return json.loads(await self.run("rebuild", "--json", "--workers", str(workers)))

    async def hash_of(self, generation: int) -> str:
        await self.run("verify", "--json", "--generation", str(generation))
        listed = json.loads(await self.run("generations", "--json"))
        return str(next(each["verified"]["hash"] for each in listed if each["number"] == generation))

    async def kill_half_way(self, workers: int) -> None:
        """Start a rebuild, and kill it while it loads."""
        process = self.start("rebuild", "--json", "--workers", str(workers))
        assert process.stderr is not None
        while line := await asyncio.to_thread(process.stderr.readline):
            told = json.loads(line)
            if told["phase"].startswith("loading") and told["done"] * 2 > told["of"]:
                break
        process.kill()
        await asyncio.to_thread(process.communicate)


class Load:
    """Readers and a writer, and what they met."""

    def __init__(self, cluster: Cluster) -> None:
        headers = {"Authorization": f"Bearer {cluster.token('alice')}"}
        limits = httpx.Limits(max_connections=50)
        self.http = httpx.AsyncClient(base_url=cluster.url, headers=headers, timeout=30, trust_env=False, limits=limits)
        self.answers: Counter[int] = Counter()
        self.odd: list[str] = []
        self.seen: list[tuple[float, float, str]] = []
        """When a reader began and ended, and the state of the quiet project that it saw."""
        self.seconds: list[float] = []
        self.lags: list[float] = []

    async def prepare(self) -> None:
        for number in range(EPISODES):
            body = {"name": f"quiet-{number}", "description": BY_THE_LOG}
            made = await self.http.post(QUIET, json=body)
            assert made.status_code == HTTPStatus.CREATED, made.text
        made = await self.http.post(BUSY, params={"wait": "projected"}, json={"name": "run-0"})
        assert made.headers["X-Projected"] == "true"

    async def read(self, number: int) -> None:
        began, page = time.perf_counter(), 1 + number % 3
        if number % 2:
            found = await self.http.get(QUIET, params={"page": page, "pageSize": PAGE})
        else:
            found = await self.http.get(f"{BUSY}/run-0")
        self.seconds.append(time.perf_counter() - began)
        self.answers[found.status_code] += 1
        if found.status_code != HTTPStatus.OK:
            self.odd.append(f"{found.request.url}: {found.status_code} {found.text}")
        elif number % 2:
            episodes = found.json()["episodes"]
            seen = {episode["description"] for episode in episodes}
            names = [f"quiet-{index}" for index in range(PAGE * (page - 1), PAGE * page)]
            if len(seen) != 1 or [episode["name"] for episode in episodes] != names:
                self.odd.append(f"a mixed page: {episodes}")
            self.seen.extend((began, time.perf_counter(), state) for state in seen)

    async def write(self, number: int) -> None:
        body, began = {"name": f"run-{number % 50}", "tags": [str(number)]}, time.perf_counter()
        made = await self.http.post(BUSY, params={"wait": "projected"}, json=body)
        self.lags.append(time.perf_counter() - began)
        if not made.is_success or made.headers["X-Projected"] != "true":
            self.odd.append(f"write {number}: {made.status_code} {made.text}")


@asynccontextmanager
async def going_on(work: Callable[[int], Coroutine[Any, Any, None]], per_second: float) -> AsyncIterator[None]:
    """Begin a call so many times a second, whatever became of the ones before."""

    async def begin() -> None:
        began, number = time.perf_counter(), 0
        async with asyncio.TaskGroup() as calls:
            while not stopping.is_set():
                number += 1
                calls.create_task(work(number))
                await asyncio.sleep(max(0, began + number / per_second - time.perf_counter()))

    stopping = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(begin())
        yield
        stopping.set()


async def level(projector: Projector) -> float:
    """Seconds until the live read models have all of the log."""
    began = time.perf_counter()
    while True:
        status = json.loads(await projector.run("status", "--json"))
        if not sum(each["lag"] for each in status["partitions"]):
            return time.perf_counter() - began
        await asyncio.sleep(0.5)


def states(seen: Sequence[tuple[float, float, str]]) -> list[str]:
    """The fewest states, one after the other, that explain what was seen: each read is somewhere in its own time."""
    at, state, found = 0.0, min(seen)[2], [min(seen)[2]]
    while unexplained := [ended for began, ended, other in seen if other != state and began > at]:
        at, state = min(unexplained), OTHER[state]
        found.append(state)
    return found


def percentile(values: list[float], part: float) -> float:
    return round(sorted(values)[int(part * (len(values) - 1))], 3)


async def measure(events: int, reads: int, workers: int, folder: Path) -> dict[str, Any]:
    with throw_away_servers() as servers:
        kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap)
        await create_topics(kafka, TopicSettings(partitions=PARTITIONS))
        await preload(kafka, events)
        with throw_away_cluster(servers, {"TOPICS_PARTITIONS": str(PARTITIONS)}) as cluster:
            projector, load = Projector(cluster, folder), Load(cluster)
            live_seconds = await level(projector)
            await load.prepare()
            hashes = {"live": await projector.hash_of(1)}
            await projector.kill_half_way(workers)
            killed = await projector.rebuild(workers)
            hashes["rebuilt after a kill"] = await projector.hash_of(killed["generation"])
            await projector.run("drop", "1")
            rebuilt = await projector.rebuild(workers)
            hashes["rebuilt"] = await projector.hash_of(rebuilt["generation"])
            await projector.run("drop", str(rebuilt["previous"]))
            mongo = MongoClient[dict[str, Any]](servers.mongodb_url)
            episodes = mongo[f"episodes_g{rebuilt['generation']}"].project_episodes
            episodes.update_many({"description": BY_THE_LOG}, {"$set": {"description": OLD}})

            async with going_on(load.read, reads), going_on(load.write, WRITES_PER_SECOND):
                await asyncio.sleep(3)
                busy = await projector.rebuild(workers)
                await asyncio.sleep(3)
                for _ in range(2):
                    await projector.run("rollback")
                    await asyncio.sleep(3)
            await load.http.aclose()
    return {
        "events": events,
        "live_projection_events_per_second": round(events / live_seconds),
        "hashes": hashes,
        "same_hash": len({*hashes.values()}) == 1,
        "rebuild_events_per_second": {
            "alone": round(events / rebuilt["load_seconds"]),
            "while serving": round(events / busy["load_seconds"]),
        },
        "reads": len(load.seconds),
        "answers": dict(load.answers),
        "read_seconds": {"p50": percentile(load.seconds, 0.5), "p99": percentile(load.seconds, 0.99)},
        "writes": len(load.lags),
        "lag_seconds": {part: percentile(load.lags, float(part)) for part in ("0.5", "0.99", "1.0")},
        "states_seen": states(load.seen),
        "odd": load.odd[:5],
        "workers": workers,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main(events: int, reads: int, workers: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(events, reads, workers, Path(folder)))
    print(json.dumps(found, indent=2))
    good = (
        found["same_hash"]
        and not found["odd"]
        and found["states_seen"] == [OLD, BY_THE_LOG, OLD, BY_THE_LOG]
        and found["lag_seconds"]["1.0"] < MOST_LAG_SECONDS
    )
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=200, help="requests per second")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    configure_logging("bench")
    sys.exit(main(options.events, options.reads, options.workers))
