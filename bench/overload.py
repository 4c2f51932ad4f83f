"""What modest callers notice while others ask for far too much, and what becomes of the processes' memory.

    python -m bench.overload [--seconds 10] [--only slow]

Starts its own servers and one gateway, ingestor and projector. Ten tenants write a little, ten times a second each,
begun whether or not the requests before are answered. Beside them, one after the other: processes that compute and ask
for nothing; ten callers with ten times the connections that the service can use; ten who begin ten times as many writes
as it can do, whatever it answers; one tenant who writes twenty times as often as each of the ten; one who sends all
that it can; thousands of idle connections; heads and bodies that dribble in; readers who do not read. After each, the
ten again with nobody else. Generators and servers share the machine's cores, so a part of what the ten notice is the
generator's. Prints a table and JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.harness import Latency
from bench.load.generators import COUNTER, Request, closed_loop, need_vegeta, write_targets
from local.services import api_keys_setting
from tests.cluster import Cluster, throw_away_cluster

TENANTS = [f"modest-{number}" for number in range(10)]
GREEDY = [f"greedy-{number}" for number in range(10)]
RATE = 100
IDLE = 10_000
DRIBBLING_HEADS, DRIBBLING_BODIES = 2_000, 500
SLOW_READERS = 300
EPISODE_BYTES = 6 * 1024 * 1024
CONNECTED_AT_ONCE = 200
_WARM_UP_SECONDS = 60


@dataclass(frozen=True)
class Noticed:
    """What the ten tenants saw, and the memory of the processes then."""

    scenario: str
    p50_ms: float
    p99_ms: float
    max_ms: float
    answers: dict[str, int]
    rss_mib: dict[str, int]
    others: dict[str, Any] = field(default_factory=dict)
    """What was answered to those beside them, and how long what was accepted took."""


class Measured:
    """One cluster, and its ten tenants."""

    def __init__(self, cluster: Cluster, seconds: float, most: float) -> None:
        self.cluster = cluster
        self.seconds = seconds
        self.most = most
        """Writes a second that it can do."""
        self.rows: list[Noticed] = []

    async def notice(self, scenario: str) -> None:
        """Let the ten tenants write, and note what they see."""
        requests = [write(tenant) for tenant in TENANTS]
        answers, latency = await open_loop(self.cluster.url, requests, RATE, self.seconds)
        row = Noticed(scenario, *(1000 * each for each in (latency.p50, latency.p99, latency.max)), answers, self.rss())
        self.rows.append(row)
        print(
            f"{scenario:34} p50 {row.p50_ms:6.1f} ms, p99 {row.p99_ms:7.1f}, max {row.max_ms:7.1f}, "
            f"answers {row.answers}, RSS {row.rss_mib}",
            flush=True,
        )

    def note(self, **others: Any) -> None:
        """Add to the last row what the others saw."""
        self.rows[-1].others.update(others)
        print("  the others: " + ", ".join(f"{name} {value}" for name, value in others.items()), flush=True)

    def rss(self) -> dict[str, int]:
        pids = {name: process.pid for name, process in self.cluster.processes.items()}
        return {name: psutil.Process(pid).memory_info().rss // 2**20 for name, pid in pids.items() if pid}


def write(tenant: str) -> Request:
    """One episode of a tenant, with their own key."""
    body = {"tenant_id": tenant, "episodes": [{"content": "x" * 300 + COUNTER}]}
    return Request("/v1/episodes", {"Authorization": f"Bearer key-of-{tenant}"}, json.dumps(body).encode())


async def open_loop(url: str, requests: Sequence[Request], rate: int, seconds: float) -> tuple[dict[str, int], Latency]:
    """Begin so many requests a second; how often which status came, and how long the good ones took."""
    with tempfile.TemporaryDirectory() as folder:
        targets, results = Path(folder, "targets"), Path(folder, "results")
        await asyncio.to_thread(write_targets, targets, url, requests, round(rate * seconds))
        attack = [need_vegeta(), "attack", "-format=json", f"-targets={targets}", f"-output={results}"]
        await _run(*attack, f"-rate={rate}/1s", f"-duration={seconds}s", "-timeout=30s", "-max-body=0")
        lines = await _run(need_vegeta(), "encode", "-to=json", str(results))
    hits = [json.loads(line) for line in lines.splitlines()]
    good = sorted(hit["latency"] / 1e9 for hit in hits if 200 <= hit["code"] < 300) or [float("nan")]
    at = [good[min(len(good) - 1, int(len(good) * part))] for part in (0.5, 0.95, 0.99)]
    return dict(Counter(str(hit["code"]) for hit in hits)), Latency(*at, good[-1])


async def _run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0, argv
    return printed.decode()


@contextlib.asynccontextmanager
async def beside(*loads: Awaitable[object]) -> AsyncIterator[list[asyncio.Future[object]]]:
    """Let the loads run during the block, and end with them."""
    running = [asyncio.ensure_future(load) for load in loads]
    await asyncio.sleep(2)  # until they are under way
    yield running
    await asyncio.gather(*running)


async def ten_times(measured: Measured) -> None:
    """Ten callers with 64 connections each; 64 in all are enough to use the service up."""
    url, seconds = measured.cluster.url, measured.seconds + 4
    loads = [closed_loop(url, [write(tenant)], callers=64, seconds=seconds) for tenant in GREEDY[:-1]]
    with_latency = open_loop(url, [write(GREEDY[-1])], 10 * RATE, seconds - 2)
    async with beside(with_latency, *loads) as running:
        await measured.notice("640 connections of ten others")
    (answers, latency), *done = [load.result() for load in running]  # type: ignore[misc]
    measured.note(
        writes_per_second=round(sum(one.rate for one in done)),  # type: ignore[attr-defined]
        refused=round(sum(one.refused for one in done) / len(done), 2),  # type: ignore[attr-defined]
        answers_to_one=answers,  # type: ignore[has-type]
        accepted_p50_ms=round(latency.p50 * 1e3),  # type: ignore[has-type]
        accepted_p99_ms=round(latency.p99 * 1e3),  # type: ignore[has-type]
    )


async def ten_times_the_rate(measured: Measured) -> None:
    """Ten callers who together begin ten times as many writes a second as can be done, whatever they are answered."""
    rate = round(10 * measured.most)
    requests = [write(tenant) for tenant in GREEDY]
    async with beside(open_loop(measured.cluster.url, requests, rate, measured.seconds + 4)) as running:
        await measured.notice(f"{rate:,} writes/s begun by ten others")
    answers, latency = running[0].result()  # type: ignore[misc]
    measured.note(
        answers=answers,  # type: ignore[has-type]
        accepted_p50_ms=round(latency.p50 * 1e3),  # type: ignore[has-type]
        accepted_p99_ms=round(latency.p99 * 1e3),  # type: ignore[has-type]
    )


async def one_of_them(measured: Measured) -> None:
    """One tenant who sends all that it can."""
    load = closed_loop(measured.cluster.url, [write(GREEDY[0])], callers=256, seconds=measured.seconds + 4)
    async with beside(load) as running:
        await measured.notice("one tenant with 256 connections")
    done = running[0].result()
    measured.note(writes_per_second=round(done.rate), refused=round(done.refused, 2))  # type: ignore[attr-defined]


async def twenty_times(measured: Measured) -> None:
    """One tenant who asks twenty times as often as each of the ten."""
    rate = 20 * RATE // len(TENANTS)
    async with beside(open_loop(measured.cluster.url, [write(GREEDY[0])], rate, measured.seconds + 4)) as running:
        await measured.notice(f"one tenant with {rate} writes/s")
    answers, latency = running[0].result()  # type: ignore[misc]
    measured.note(
        answers=answers,  # type: ignore[has-type]
        accepted_p50_ms=round(latency.p50 * 1e3, 1),  # type: ignore[has-type]
        accepted_p99_ms=round(latency.p99 * 1e3, 1),  # type: ignore[has-type]
    )


async def busy_cores(measured: Measured) -> None:
    """No other caller at all, and as many processes that compute as there are cores: what is the machine's part."""
    argv = (sys.executable, "-c", "while True: pass")
    others = [await asyncio.create_subprocess_exec(*argv) for _ in range(psutil.cpu_count() or 1)]
    try:
        await measured.notice(f"{len(others)} processes that compute")
    finally:
        for other in others:
            other.kill()
            await other.wait()


async def idle(measured: Measured) -> None:
    async with connections(measured.cluster.url, IDLE, b"") as open_ones:
        await measured.notice(f"{len(open_ones)} idle connections")


async def dribble(measured: Measured) -> None:
    """Heads and bodies of which a byte comes each second."""
    head = b"POST /v1/episodes HTTP/1.1\r\nHost: gateway\r\nX-Slow: "
    body = (
        b"POST /v1/episodes HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer key-of-greedy-0\r\n"
        b"Content-Type: application/json\r\nContent-Length: 8000000\r\n\r\n{"
    )
    url = measured.cluster.url
    async with connections(url, DRIBBLING_HEADS, head) as heads, connections(url, DRIBBLING_BODIES, body) as bodies:
        began = time.monotonic()

        async def drip() -> None:
            while (passed := time.monotonic() - began) < 75:
                slow = [*(heads if passed < 15 else []), *(bodies if passed < 50 else [])]
                for _, writer in slow:
                    writer.write(b"x")
                await asyncio.sleep(1)

        async with beside(drip()):
            await measured.notice(f"{len(heads)} slow heads, {len(bodies)} slow bodies")
        answers = Counter([await _status(reader) for reader, _ in heads])
        print(f"  the heads were answered {dict(answers)}")
        answers = Counter([await _status(reader) for reader, _ in bodies])
        print(f"  the bodies were answered {dict(answers)}")


async def _status(reader: asyncio.StreamReader) -> str:
    try:
        async with asyncio.timeout(5):
            return (await reader.readline()).decode()[9:12]
    except (OSError, TimeoutError) as error:
        return type(error).__name__


async def slow_readers(measured: Measured) -> None:
    """Large episodes that are asked for and not read."""
    tenant, url = GREEDY[0], measured.cluster.url
    ids = await store_large(url, tenant, 8)
    asks = [
        f"GET /v1/episodes/{one}?tenant_id={tenant} HTTP/1.1\r\nHost: gateway\r\n"
        f"Authorization: Bearer key-of-{tenant}\r\n\r\n".encode()
        for one in ids
    ]
    async with contextlib.AsyncExitStack() as stack:
        for ask in asks:
            await stack.enter_async_context(connections(url, SLOW_READERS // len(asks), ask))
        await asyncio.sleep(2)
        await measured.notice(f"{SLOW_READERS} who do not read 6 MiB")
        reads = [
            Request(f"/v1/episodes/{one}?tenant_id=modest-0", {"Authorization": "Bearer key-of-modest-0"})
            for one in await store_small(url, "modest-0")
        ]
        answers, latency = await open_loop(url, reads, RATE, measured.seconds)
        print(
            f"  reads of others meanwhile: {answers}, p50 {latency.p50 * 1000:.1f} ms, p99 {latency.p99 * 1000:.1f} ms"
        )


async def store_large(url: str, tenant: str, number: int) -> list[str]:
    """Episodes whose metadata is long; their ids."""
    return await _store(url, tenant, number, {"text": "x" * EPISODE_BYTES})


async def store_small(url: str, tenant: str) -> list[str]:
    return await _store(url, tenant, 1, {})


async def _store(url: str, tenant: str, number: int, metadata: object) -> list[str]:
    ids = []
    async with httpx.AsyncClient(timeout=30) as http:
        for _ in range(number):
            body = {"tenant_id": tenant, "episodes": [{"content": "large", "metadata": metadata}]}
            headers = {"Authorization": f"Bearer key-of-{tenant}"}
            answer = await http.post(f"{url}/v1/episodes?wait=projected", json=body, headers=headers)
            answer.raise_for_status()
            ids += answer.json()["episode_ids"]
    return ids


Open = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connections(url: str, number: int, first: bytes) -> AsyncIterator[list[Open]]:
    """So many connections on which ``first`` was sent, and of which nobody reads."""
    port = int(url.rpartition(":")[2])
    made: list[Open] = []

    async def connect() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(first)
        made.append((reader, writer))

    for start in range(0, number, CONNECTED_AT_ONCE):
        await asyncio.gather(*(connect() for _ in range(min(CONNECTED_AT_ONCE, number - start))))
    try:
        yield made
    finally:
        for _, writer in made:
            writer.transport.abort()


SCENARIOS = (busy_cores, ten_times, ten_times_the_rate, twenty_times, one_of_them, idle, dribble, slow_readers)


async def main(seconds: float, only: str) -> None:
    keys = api_keys_setting({f"key-of-{tenant}": [tenant] for tenant in [*TENANTS, *GREEDY]})
    with throw_away_cluster(settings={"API_KEYS": keys}) as cluster:
        warm_up = [write(tenant) for tenant in GREEDY]  # Kafka compiles itself for a minute
        await closed_loop(cluster.url, warm_up, callers=64, seconds=_WARM_UP_SECONDS)
        can_do = await closed_loop(cluster.url, warm_up, callers=64, seconds=5)
        measured = Measured(cluster, seconds, can_do.rate)
        await measured.notice("nobody else")
        for scenario in (one for one in SCENARIOS if one.__name__.startswith(only)):
            await scenario(measured)
            await measured.notice("  nobody else, right after")
        print(
            json.dumps({"load_average": os.getloadavg()[0], "rows": [asdict(row) for row in measured.rows]}, indent=1)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", default="", help="the beginning of a scenario's name")
    options = parser.parse_args()
    asyncio.run(main(options.seconds, options.only))
