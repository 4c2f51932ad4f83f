"""Rows 11 and 12, on a million episodes: memory under ten minutes of load, and how soon an ingestor is back."""

import asyncio
import contextlib
import functools
import random
import statistics
import tempfile
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from bench.harness import Options, Row, RowResult, Sample, Target, interleave, latency_of, median_of, say
from bench.load.generators import COUNTER, Load, Request, need_vegeta, open_loop
from bench.stacks import PROJECT, TEXT, Size, Stack, open_stack, tenant, user
from local.process import ManagedProcess
from shared.ids import tenant_stream
from shared.kafka import SESSION_TIMEOUT_MS, partition_of

MOST_MIB = 250e6 / 2**20
"""250 MB."""
_FLAT = 1.1
"""The last fifth beside the second: more than this is growth."""
_SLICE_SECONDS = 30.0
_BATCHES, _SINGLES, _READS = 30, 200, 50
"""Requests a second: batches of 100, single writes, and reads of both kinds."""
_ITEMS = 100
_MOST_REFUSED = 0.01
"""With more refused, of any kind, the memory is not that of this load."""
_PATIENCE_SECONDS = 60.0


@dataclass
class Memory:
    """What one process had, second by second, in MiB."""

    rss: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    """Of that, what is not pages of files, which the system takes back when it needs them."""

    @property
    def growth(self) -> float:
        """The last fifth beside the second one; the first is for warming up."""
        fifth = max(1, len(self.rss) // 5)
        return statistics.median(self.rss[-fifth:]) / statistics.median(self.rss[fifth : 2 * fifth])


async def memory_and_recovery(options: Options) -> RowResult:
    """First the load, then what happens when ingestors stop."""
    await asyncio.to_thread(need_vegeta)
    size = Size(options.count(1_000_000, 2_000), tenants=options.count(1_000, 50), partitions=4)
    with tempfile.TemporaryDirectory() as folder:
        snapshots = {
            "INGESTOR_SNAPSHOT_URL": Path(folder).as_uri(),
            "INGESTOR_SNAPSHOT_EVERY": str(options.count(100_000, 200)),
        }
        async with open_stack(size, settings=snapshots) as stack:
            seconds = options.either(600, 10)
            memory, loads = await _load(stack, seconds)
            targets = _memory_targets(memory, loads, size.episodes, seconds)
            samples = {f"RSS of the {name}, MiB": [_memory_sample(one)] for name, one in memory.items()}
            try:
                back = await _recoveries(stack, options.rounds)
            except Exception as error:  # noqa: BLE001 - row 11 is measured all the same
                traceback.print_exc()
                why = f"not measured: {type(error).__name__}: {error}".splitlines()[0]
                targets.append(Target("12", f"recovery, {size.episodes:,} episodes", "", why, met=False))
            else:
                targets += _recovery_targets(back, size.episodes)
                samples |= {f"{what}, returns": each for what, each in back.items()}
    return RowResult(targets, samples, [*_load_notes(loads), *_NOTES], unit="MiB or returns")


async def _load(stack: Stack, seconds: float) -> tuple[dict[str, Memory], dict[str, list[Load]]]:
    """Put load on for so long, and watch the three processes."""
    url, token, chance = stack.cluster.url, functools.cache(stack.cluster.token), random.Random(1)  # noqa: S311
    loads: dict[str, list[Load]] = defaultdict(list)
    async with _watched(stack.cluster.processes) as memory:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 1:
            length, requests = round(min(_SLICE_SECONDS, left)), _requests(stack, token, chance)
            done = await asyncio.gather(
                *(open_loop(url, some, rate=rate, seconds=length) for rate, some in requests.values())
            )
            for name, load in zip(requests, done, strict=True):
                loads[name].append(load)
            now = ", ".join(f"{name} {one.rss[-1]:.0f} MiB" for name, one in memory.items())
            say(f"  {max(0.0, ends - time.monotonic()):.0f} s to go: {now}")
    await stack.wait_level()
    return memory, loads


def _requests(
    stack: Stack, token: Callable[[str], str], chance: random.Random
) -> dict[str, tuple[float, Sequence[Request]]]:
    """Name → requests a second, and what is asked, in an order of its own each time: not all may have their turn."""
    size = stack.size
    key = {"Authorization": f"Bearer {stack.cluster.api_key}"}
    item = f'{{"content":"{TEXT}{COUNTER}","source":"notes"}}'
    items = ",".join([f'{{"content":"{TEXT}","source":"notes"}}'] * (_ITEMS - 1) + [item])
    batches: list[Request] = []
    singles: list[Request] = []
    reads: list[Request] = []
    for number in chance.sample(range(size.tenants), size.tenants):
        path, bearer, owner = _episodes(number), {"Authorization": f"Bearer {token(user(number))}"}, tenant(number)
        batches.append(Request("/v1/episodes", key, f'{{"tenant_id":"{owner}","episodes":[{items}]}}'.encode()))
        singles += [
            Request(path, bearer, f'{{"name":"run-{name}","description":"{TEXT}{COUNTER}"}}'.encode())
            for name in (COUNTER, chance.randrange(size.of_each))
        ]
        reads += [
            Request(f"{path}?page=1&pageSize=50", bearer),
            Request(f"/v1/episodes/ep_{owner}_0?tenant_id={owner}", key),
        ]
    return {"batches": (_BATCHES, batches), "single writes": (_SINGLES, singles), "reads": (_READS, reads)}


def _episodes(number: int) -> str:
    return f"/namespaces/{user(number)}/projects/{PROJECT}/episodes"


@contextlib.asynccontextmanager
async def _watched(processes: Mapping[str, ManagedProcess]) -> AsyncIterator[dict[str, Memory]]:
    memory = {name: Memory() for name in processes}

    async def watch() -> None:
        while True:
            for name, process in processes.items():
                if process.pid is not None:
                    info = psutil.Process(process.pid).memory_info()
                    memory[name].rss.append(info.rss / 2**20)
                    memory[name].own.append((info.rss - info.shared) / 2**20)
            await asyncio.sleep(1)

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch())
        yield memory
        watching.cancel()


def _memory_targets(
    memory: Mapping[str, Memory], loads: Mapping[str, Sequence[Load]], episodes: int, seconds: float
) -> list[Target]:
    refused = {name: _refused(each) for name, each in loads.items()}
    too_many = [f"{share:.1%} of the {name}" for name, share in refused.items() if share > _MOST_REFUSED]
    targets = []
    for letter, (name, one) in zip("abc", memory.items(), strict=True):
        what = f"RSS of the {name} after {episodes:,} episodes and {seconds / 60:.3g} minutes of load"
        measured = f"most {max(one.rss):.0f} MiB ({max(one.own):.0f} without pages of files), grew {one.growth:.2f} x"
        if too_many:
            measured = f"not under the load that was meant: {' and '.join(too_many)} were refused ({measured})"
        met = not too_many and max(one.rss) <= MOST_MIB and one.growth <= _FLAT
        targets.append(Target(f"11{letter}", what, f"≤ 250 MB ({MOST_MIB:.0f} MiB) and flat", measured, met=met))
    return targets


def _refused(loads: Sequence[Load]) -> float:
    return statistics.mean(load.refused for load in loads)


def _memory_sample(one: Memory) -> Sample:
    extra = {"most MiB": max(one.rss), "most MiB of its own": max(one.own), "last MiB": one.rss[-1]}
    return Sample(max(one.rss), extra={**extra, "growth": one.growth})


def _load_notes(loads: Mapping[str, Sequence[Load]]) -> list[str]:
    told = [
        f"{name} {statistics.mean(load.rate for load in each):,.0f}/s, p99 "
        f"{1e3 * max(load.latency.p99 for load in each):.0f} ms in the worst half minute, "
        f"{100 * _refused(each):.2g} % refused"
        for name, each in loads.items()
    ]
    return [
        (
            f"The load was open-loop, from all tenants: {'; '.join(told)}. A batch has {_ITEMS} episodes; half of the "
            "single writes make an episode, the others change one of those that are there, chosen at random."
        )
    ]


WARM, WARM_KILLED, TAKEOVER = "warm start", "start again after kill -9", "takeover after kill -9"
_MOST_WARM_SECONDS = 2.0
_MOST_TAKEOVER_SECONDS = SESSION_TIMEOUT_MS / 1000 + 2


async def _recoveries(stack: Stack, rounds: int) -> dict[str, list[Sample]]:
    ingestors = Ingestors(stack)
    back = await interleave({WARM: ingestors.warm_start, WARM_KILLED: ingestors.restart_killed}, rounds)
    await ingestors.add_second()
    return back | await interleave({TAKEOVER: ingestors.take_over}, rounds)


def _recovery_targets(back: Mapping[str, Sequence[Sample]], episodes: int) -> list[Target]:
    targets = []
    for letter, what in (("a", WARM), ("b", WARM_KILLED)):
        taken = median_of(back[what], "seconds")
        measured, met = f"{taken.text('.2f')} s", taken.median <= _MOST_WARM_SECONDS
        name = f"{what}, {episodes:,} episodes"
        targets.append(Target(f"12{letter}", name, f"≤ {_MOST_WARM_SECONDS:g} s", measured, met=met))
    taken, cold = median_of(back[TAKEOVER], "seconds"), back[TAKEOVER][0].extra["seconds"]
    measured = (
        f"at most {taken.max:.2f} s, median {taken.median:.2f} s; "
        f"{cold:.2f} s where the other one never had these partitions"
    )
    limit = f"every one ≤ session timeout + 2 s = {_MOST_TAKEOVER_SECONDS:g} s"
    met = taken.max <= _MOST_TAKEOVER_SECONDS
    return [*targets, Target("12c", f"{TAKEOVER}, {episodes:,} episodes", limit, measured, met=met)]


class Ingestors:
    """Stops ingestors, and asks every partition by a write until all have answered."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._names = ["ingestor"]
        self._round = 0

    async def warm_start(self) -> Sample:
        """Stop the one in good order, and start it again."""
        process = self._stack.cluster.processes["ingestor"]
        await asyncio.to_thread(process.stop)
        return await self._again(process)

    async def restart_killed(self) -> Sample:
        """Kill the one, and start it again under its name at once."""
        process = self._stack.cluster.processes["ingestor"]
        await asyncio.to_thread(process.kill)
        return await self._again(process)

    async def _again(self, process: ManagedProcess) -> Sample:
        began = time.perf_counter()
        process.start()
        ready = asyncio.create_task(self._ready(process, began))
        answered = await self._answers(range(self._stack.size.partitions), began)
        return _back(max(answered.values()), {"ready": await ready})

    async def add_second(self) -> None:
        """Start another ingestor, with a disk of its own, and wait until each has some of the partitions."""
        self._names.append("ingestor-2")
        self._stack.cluster.add_process("ingestor", "ingestor-2").start()
        await self._shared_out()

    async def take_over(self) -> Sample:
        """Kill one of the two, in turns, and leave it dead until the other one has answered for it."""
        name = self._names[self._round % 2]
        self._round += 1
        process = self._stack.cluster.processes[name]
        lost = await self._partitions(name)
        kept = {*range(self._stack.size.partitions)} - lost
        assert lost, f"{name} has no partition"
        assert kept, f"{name} has all partitions"
        await asyncio.to_thread(process.kill)
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            others = tasks.create_task(self._answers(kept, began))
            answered = await self._answers(lost, began)
        process.start()
        await self._shared_out()
        return _back(max(answered.values()), {"the others": max(others.result().values())})

    async def _shared_out(self) -> None:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while True:
                have = [await self._partitions(name) for name in self._names]
                if all(have) and sum(map(len, have)) == self._stack.size.partitions:
                    return
                await asyncio.sleep(0.1)

    async def _partitions(self, name: str) -> set[int]:
        """Those that the ingestor runs, as it says."""
        try:
            async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
                told = (await http.get(f"{self._stack.cluster.url_of(name)}/readyz")).json()
        except httpx.HTTPError:
            return set()
        return {int(number) for number, state in told["partitions"].items() if state == "running"}

    async def _ready(self, process: ManagedProcess, began: float) -> float:
        await asyncio.to_thread(process.wait_ready)
        return time.perf_counter() - began

    async def _answers(self, partitions: Collection[int], began: float) -> dict[int, float]:
        """Partition → seconds until a write to it was answered with success. One that was not is sent again."""
        answered: dict[int, float] = {}
        async with (
            asyncio.timeout(_PATIENCE_SECONDS),
            httpx.AsyncClient(base_url=self._stack.cluster.url, timeout=30, trust_env=False) as http,
            asyncio.TaskGroup() as tasks,
        ):
            for partition_number in partitions:
                tasks.create_task(self._ask(http, partition_number, began, answered))
        return answered

    async def _ask(self, http: httpx.AsyncClient, number: int, began: float, answered: dict[int, float]) -> None:
        cluster, count = self._stack.cluster, self._stack.size.partitions
        there = next(
            name for name in map(tenant, range(1_000)) if partition_of(tenant_stream(name).encode(), count) == number
        )
        body = {"tenant_id": there, "episodes": [{"content": "Are you back?"}]}
        headers = {"Authorization": f"Bearer {cluster.api_key}", "Idempotency-Key": str(uuid.uuid4())}
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await http.post("/v1/episodes", json=body, headers=headers)
                if answer.is_success:
                    answered[number] = time.perf_counter() - began
                    return
            await asyncio.sleep(0.05)


def _back(seconds: float, more: Mapping[str, float]) -> Sample:
    return Sample(1 / seconds, latency=latency_of([seconds]), extra={"seconds": seconds, **more})


_NOTES = (
    (
        "Memory is RSS as the system tells it, once a second. The ingestor's state is a file that is mapped (LMDB): "
        "its pages count as RSS while there is memory to spare, and are no one's when there is none."
    ),
    (
        "An ingestor is back when a write to each of its partitions has been answered with success. The time begins "
        "with the start of the process (row 12a, b), or with the kill (12c). 12c: two ingestors share the partitions, "
        "one is killed and stays dead; its partitions wait for the group's session timeout of "
        f"{SESSION_TIMEOUT_MS / 1000:g} s. The first takeover is a cold one: the other ingestor never had these "
        "partitions. It counts as the others do, for the longest decides. Snapshots are on, in a folder that both "
        "reach, one every 100,000 records."
    ),
    (
        "What the rows of the table count stands in their names: the most MiB of memory, or returns a second, which is "
        "one divided by the seconds."
    ),
    "*The others* are the partitions of the ingestor that lived: how long a write to them took meanwhile.",
)

ROWS: Mapping[str, Row] = {"11,12": memory_and_recovery}
