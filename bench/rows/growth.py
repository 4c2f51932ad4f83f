"""Rows 9 and 10: what a deep page costs, and what an event costs as episodes, tenants and partitions grow in number."""

import asyncio
import functools
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import httpx

from bench.events import Log, Record, write
from bench.harness import (
    Candidate,
    Options,
    Row,
    RowResult,
    Sample,
    Target,
    interleave,
    measured,
    median_of,
    ratio_of,
)
from bench.load.generators import COUNTER, Request, closed_loop, open_loop
from bench.stacks import PROJECT, TEXT, Size, Stack, created, founding, open_stack, user
from shared.codec import encode_command
from shared.commands import EpisodeFields, UpsertEpisode
from shared.events import ProjectEpisodeDeleted
from shared.ids import namespace_stream, new_command_id
from shared.kafka import SESSION_TIMEOUT_MS, partition_of
from shared.settings import COMMANDS

PAGE = 50
_OWNER = "alice"
_WHOLE, _GAPS = "whole", "gaps"
_DELETED = 0.1
_PAGES_A_SECOND = 50


async def deep_pages(options: Options) -> RowResult:
    """A list's last page beside its first."""
    episodes = options.count(200_000, 2_000)
    last = episodes // PAGE
    size = Size(episodes, tenants=1, partitions=4)
    async with open_stack(size, _lists(size)) as stack:
        headers = {"Authorization": f"Bearer {stack.cluster.token(_OWNER)}"}
        gateway = stack.cluster.processes["gateway"]
        assert gateway.pid is not None
        seconds = options.count(3, 1)

        async def read(path: str) -> Sample:
            with measured([gateway.pid or 0]) as used:
                load = await closed_loop(stack.cluster.url, [Request(path, headers)], callers=1, seconds=seconds)
            opened = await open_loop(stack.cluster.url, [Request(path, headers)], rate=_PAGES_A_SECOND, seconds=seconds)
            assert not load.refused + opened.refused, path
            return Sample(load.rate, 1000 * used.cpu / (load.rate * seconds), opened.latency)

        candidates: dict[str, Candidate] = {}
        for project, what in ((_WHOLE, "none deleted"), (_GAPS, "10 % deleted")):
            for page in (1, last):
                path = f"/namespaces/{_OWNER}/projects/{project}/episodes?page={page}&pageSize={PAGE}"
                await _check_page(stack, path, headers)
                candidates[f"page {page:,}, {what}"] = partial(read, path)
        samples = await _warmed_up(candidates, options.rounds)
    targets = []
    for letter, what in (("a", "none deleted"), ("b", "10 % deleted at random")):
        key = what.removesuffix(" at random")
        deep, first = samples[f"page {last:,}, {key}"], samples[f"page 1, {key}"]
        ratio, p50 = ratio_of(deep, first, "p50"), median_of(deep, "p50")
        measured_text = f"{ratio.text('.2f')} x (p50 {p50.median * 1e3:.2f} ms)"
        name = f"list page {last:,} of {episodes:,} episodes, {what}"
        targets.append(Target(f"9{letter}", name, "≤ 1.5 x page 1", measured_text, met=ratio.median <= 1.5))
    note = (
        f"Pages of {PAGE} at the HTTP API, with authentication: one caller in a closed loop, and for the latency an "
        f"open loop of {_PAGES_A_SECOND} a second. Where episodes are deleted, {episodes:,} live, so that the page is "
        "full. CPU seconds are the gateway's."
    )
    return RowResult(targets, samples, [note], unit="pages")


def _lists(size: Size) -> Iterator[tuple[int, list[Record]]]:
    """Two projects: one whole, and one with as many left after every tenth was deleted."""
    log, stream, chance = Log(size.partitions), namespace_stream(_OWNER), random.Random(1)  # noqa: S311
    yield from log.append(stream, founding(_OWNER, _WHOLE, _GAPS), "UpsertEpisode")
    for number in range(size.episodes):
        yield from log.append(stream, [created(_OWNER, _WHOLE, number)], "UpsertEpisode")
    made = round(size.episodes / (1 - _DELETED))
    for number in range(made):
        yield from log.append(stream, [created(_OWNER, _GAPS, number)], "UpsertEpisode")
    for number in chance.sample(range(made), made - size.episodes):
        gone = ProjectEpisodeDeleted(f"{_OWNER}-{_GAPS}-{number}", f"{_OWNER}-{_GAPS}", _GAPS, f"run-{number}")
        yield from log.append(stream, [gone], "DeleteEpisode")
    yield from log.rest()


async def _check_page(stack: Stack, path: str, headers: Mapping[str, str]) -> None:
    async with httpx.AsyncClient(base_url=stack.cluster.url, timeout=30, trust_env=False) as http:
        answer = await http.get(path, headers=dict(headers))
    assert answer.is_success, answer.text
    assert len(answer.json()["episodes"]) == PAGE, f"{path} is not full"


async def _warmed_up(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, list[Sample]]:
    """Samples in turns, after one of each that does not count."""
    for candidate in candidates.values():
        await candidate()
    return await interleave(candidates, rounds)


HTTP, BACKLOG = "single writes", "backlog"
_CALLERS = 64
_DIFFERENT = 10_000
_COMMANDS_PER_BATCH = 500
_FROZEN_SECONDS = SESSION_TIMEOUT_MS / 1000 / 2
"""So long an ingestor may be frozen; its group still waits for it."""
_MOST = 1.3


class Growing:
    """The two loads on one stack. Both change episodes that are there, chosen at random, so that it does not grow."""

    def __init__(self, stack: Stack, options: Options) -> None:
        self._stack = stack
        self._seconds = options.either(3, 1)
        self._backlog = options.count(30_000, 2_000)
        self._random = random.Random(1)  # noqa: S311
        self._token = functools.cache(stack.cluster.token)

    async def singly(self) -> Sample:
        """Upserts over HTTP, from 64 callers; others than in the sample before."""
        requests = [
            Request(
                f"/namespaces/{owner}/projects/{PROJECT}/episodes",
                {"Authorization": f"Bearer {self._token(owner)}"},
                f'{{"name":"{name}","description":"{TEXT}{COUNTER}"}}'.encode(),
            )
            for owner, name in self._some(_DIFFERENT)
        ]

        async def ask() -> Mapping[str, float]:
            load = await closed_loop(self._stack.cluster.url, requests, callers=_CALLERS, seconds=self._seconds)
            return {"refused": load.refused}

        return await self._measure(ask, 1)

    async def backlog(self) -> Sample:
        """Commands that stand in Kafka all at once, as after an outage: ingestor and projector, without the gateway.

        The ingestor is frozen while they are written.
        """
        commands, ingestor = [*self._commands()], self._stack.cluster.processes["ingestor"]
        ingestor.pause()
        async with asyncio.timeout(_FROZEN_SECONDS):
            await write(self._stack.kafka, COMMANDS, commands)

        async def go_on() -> Mapping[str, float]:
            ingestor.resume()
            return {}

        return await self._measure(go_on, self._backlog)

    async def _measure(self, load: Callable[[], Awaitable[Mapping[str, float]]], least: int) -> Sample:
        """From the start of the load until the read models have what came of it, ``least`` events or more."""
        before = await self._stack.wait_level()
        with measured(self._stack.pids) as used:
            extra = await load()
            events = await self._stack.wait_level(before + least) - before
        return Sample(events / used.seconds, 1000 * used.cpu / events, extra=extra)

    def _some(self, count: int) -> Iterator[tuple[str, str]]:
        size = self._stack.size
        for _ in range(count):
            yield user(self._random.randrange(size.tenants)), f"run-{self._random.randrange(size.of_each)}"

    def _commands(self) -> Iterator[tuple[int, list[Record]]]:
        """As a gateway writes them, but that nobody waits for their answers."""
        waiting: defaultdict[int, list[Record]] = defaultdict(list)
        for number, (owner, name) in enumerate(self._some(self._backlog)):
            command = UpsertEpisode(
                command_id=new_command_id(),
                actor=owner,
                request_hash="",
                namespace=owner,
                project=PROJECT,
                name=name,
                owner=True,
                fields=EpisodeFields(description=f"{TEXT}{number} {self._random.random()}"),
            )
            key = command.stream.encode()
            partition = partition_of(key, self._stack.size.partitions)
            waiting[partition].append((key, encode_command(command), datetime.now(UTC)))
            if len(waiting[partition]) == _COMMANDS_PER_BATCH:
                yield partition, waiting.pop(partition)
        yield from waiting.items()


async def growth(options: Options) -> RowResult:
    """What an event costs, in CPU seconds of our processes and in time, along three axes."""
    middle = options.count(100_000, 2_000)
    base = Size(middle, tenants=options.count(1_000, 50))
    small, large = replace(base, episodes=middle // 10), replace(base, episodes=middle * 10)
    one = replace(base, partitions=1)
    targets: list[Target] = []
    samples: dict[str, list[Sample]] = {}

    async def measure(letter: str, what: str, *stacks: Stack) -> None:
        taken = await _one_axis(stacks, options)
        targets.append(_target(letter, what, [_name(stack.size) for stack in stacks], taken))
        samples.update({f"{what}: {name}": each for name, each in taken.items()})

    async with open_stack(base) as at_base:
        async with open_stack(small) as at_small, open_stack(large) as at_large:
            what = f"{small.episodes:,} → {base.episodes:,} → {large.episodes:,} episodes"
            await measure("a", what, at_small, at_base, at_large)
        async with open_stack(one) as at_one:
            async with open_stack(replace(one, tenants=1)) as at_lonely:
                await measure("b", f"1 → {one.tenants:,} tenants in one partition", at_lonely, at_one)
            await measure("c", f"1 → {base.partitions} partitions", at_one, at_base)
    return RowResult(targets, samples, [*_NOTES], unit="events")


async def _one_axis(stacks: Sequence[Stack], options: Options) -> dict[str, list[Sample]]:
    candidates: dict[str, Candidate] = {}
    for stack in stacks:
        load = Growing(stack, options)
        candidates |= {f"{HTTP}, {_name(stack.size)}": load.singly, f"{BACKLOG}, {_name(stack.size)}": load.backlog}
    return await _warmed_up(candidates, options.rounds)


def _name(size: Size) -> str:
    return f"{size.episodes:,} episodes, {size.tenants:,} tenants, {size.partitions} partitions"


def _target(letter: str, what: str, names: Sequence[str], taken: Mapping[str, list[Sample]]) -> Target:
    """The dearest of the later sizes beside the first, round by round; the worst of both loads, in CPU and in time."""
    parts, worst = [], 0.0
    for load in (HTTP, BACKLOG):
        first, *others = (taken[f"{load}, {name}"] for name in names)
        for kind, cost in (("CPU", _cpu), ("time", _time)):
            spread = max((ratio_of(other, first, cost) for other in others), key=lambda ratio: ratio.median)
            parts.append(f"{load} {kind} {spread.text('.2f')} x")
            worst = max(worst, spread.median)
    return Target(f"10{letter}", f"cost per event, {what}", f"≤ {_MOST} x", "; ".join(parts), met=worst <= _MOST)


def _cpu(sample: Sample) -> float | None:
    return sample.cpu


def _time(sample: Sample) -> float:
    return 1 / sample.rate


_NOTES = (
    (
        "Both loads change episodes that are there, chosen at random, so that a size stays what it is. *Single "
        f"writes*: upserts over HTTP from {_CALLERS} callers, until they can be read. *Backlog*: 30,000 upserts that "
        "were written to Kafka while the ingestor was frozen, from when it goes on until they can be read; the gateway "
        "has no part in it."
    ),
    (
        "CPU seconds are those of gateway, ingestor and projector, one process each. The sizes of one axis run side by "
        "side on servers of their own and are measured in turns, after one that does not count; those that are not "
        "measured are idle."
    ),
    "All writes of one tenant go through one partition, so one partition is all there is where tenants are compared.",
)

ROWS: Mapping[str, Row] = {"9": deep_pages, "10": growth}
