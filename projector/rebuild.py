"""Builds the next generation of read models from the start of the log, while the one in use serves and stays live.

Spill the log, fold and insert range by range, index, hand over to the projectors, let them catch up, verify against the
log, and move the pointer in one step. What is done is noted, so a rebuild that was stopped or killed goes on.
"""

import asyncio
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from msgspec import Struct

from projector import generations
from projector.documents import Checkpoint
from projector.generations import WrongGeneration
from projector.jobs import load_job
from projector.replay import Plan, Spilled
from projector.verify import Report, Verdict, make_plan, report_folded, spill_all, verify, watching
from projector.workers import Workers, open_workers
from shared.errors import EpisodesError
from shared.kafka import describe_topic, ends, open_partition
from shared.mongo import Client, Document
from shared.settings import EVENTS, KafkaSettings, MongoSettings
from shared.supervisor import gravest

_HEARTBEAT_SECONDS = 1.0
_ALIVE = timedelta(seconds=10)
"""A rebuild that has not noted anything for so long is dead, and another process may go on with it."""
_LEAST_RANGES = 40
"""What one kill undoes is at most the ranges that were being loaded: a small part of the whole."""
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
_NO_PROJECTOR_SECONDS = 20.0
_LOOK_SECONDS = 0.2
_HOLDING = "holding still until the read models in use have caught up"


class RebuildRunning(EpisodesError):
    """Another rebuild is at work."""


class RebuildFailed(EpisodesError):
    """The generation was built and is not put to use."""

    def __init__(self, reason: str, verdict: Verdict | None = None) -> None:
        super().__init__(reason)
        self.verdict = verdict


class Rebuilt(Struct, frozen=True):
    """What a rebuild came to."""

    generation: int
    previous: int
    switched: bool
    verdict: Verdict
    load_seconds: float
    """From the first record read to the last index built, in this run."""


async def rebuild(
    client: Client,
    mongo: MongoSettings,
    kafka: KafkaSettings,
    folder: Path,
    *,
    workers: int,
    most_lag: int | None,
    dry_run: bool,
    report: Report,
) -> Rebuilt:
    """Build the next generation, or go on with one whose rebuild ended early, and put it to use.

    The spilled log goes into ``folder`` and is about as large as the log; ``workers`` processes read, fold and insert,
    and hold still while the generation in use is more than ``most_lag`` records behind. With ``dry_run`` the generation
    is built and verified, then dropped.

    Raises:
        RebuildRunning: another one is at work. Whether it is shows within seconds, after a kill within ten.
        RebuildFailed: it was built, and is not as the log says, or nobody keeps it up to date.
        PoisonRecord, RecordsLost: the log cannot be replayed.
        Unavailable: Kafka or MongoDB does not answer; call again to go on.
    """
    began = time.monotonic()
    _, partitions = await describe_topic(kafka, EVENTS)
    await generations.prepare(client)
    async with _begun(client, kafka, partitions, report) as build:
        place = folder / build.name
        place.mkdir(parents=True, exist_ok=True)
        if not build.is_loaded:
            await generations.create_collections(client, build.number)
            async with (
                open_workers(workers, slots=build.plan.slots) as pool,
                _throttled(client, kafka, pool, build, partitions, most_lag),
            ):
                spilled = await spill_all(pool, kafka, build.plan, place, build.report)
                await _load(pool, mongo, build, spilled, place)
            build.report("building the indexes", 0, 1)
            await generations.create_indexes(client, build.number)
            cursors = {number: Checkpoint(each.cursor) for number, each in spilled.items()}
            await generations.enliven(client, build.number, build.owner, cursors)
        load_seconds = time.monotonic() - began
        shutil.rmtree(place)
        old = await generations.in_use(client)
        await _catch_up(client, build)
        place.mkdir()
        try:
            verdict = await verify(client, kafka, build.number, place, workers=workers, report=build.report)
        finally:
            shutil.rmtree(place)
        if not verdict.good:
            raise RebuildFailed(
                f"generation {build.number} is not as the log says, and is not put to use; "
                f"look at the differences, then drop it (drop {build.number}) or verify it again (rebuild)",
                verdict,
            )
        if not dry_run:
            await _catch_up(client, build)
            await generations.switch(client, old=old, new=build.number)
    if dry_run:
        await generations.drop(client, build.number)
    return Rebuilt(build.number, old, not dry_run, verdict, load_seconds)


async def _load(
    pool: Workers, mongo: MongoSettings, build: "_Build", spilled: Mapping[int, Spilled], place: Path
) -> None:
    plan, before = build.plan, frozenset(build.loaded)
    events = [sum(each.events[number] for each in spilled.values()) for number in range(plan.ranges)]
    waiting = [number for number in range(plan.ranges) if number not in build.loaded]
    waiting.sort(key=lambda number: -events[number])  # the longest first, so that none is left over at the end
    jobs = [(mongo, build.number, plan, number, place, plan.slots_of(number)) for number in waiting]
    async with watching(lambda: report_folded("loading", pool, plan, spilled, build.report, before)):
        async for number in pool.run(load_job, jobs):
            await build.note_loaded(number)


async def _catch_up(client: Client, build: "_Build") -> None:
    """Wait until the generation is as far as the one in use.

    Raises:
        RebuildFailed: no projector follows it.
    """
    farthest, moved_at = -1, time.monotonic()
    while True:
        behind = await generations.events_behind(client, build.number)
        own = await generations.checkpoints(client, build.number)
        position = sum(each.cursor.position for each in own.values())
        build.report("catching up", position, position + behind)
        if not behind:
            return
        stopped = next((each.stopped for each in own.values() if each.stopped), None)
        if position > farthest:
            farthest, moved_at = position, time.monotonic()
        elif stopped is not None or time.monotonic() - moved_at > _NO_PROJECTOR_SECONDS:
            why = "no projector runs" if stopped is None else f"it is stopped: {stopped.reason}"
            raise RebuildFailed(
                f"generation {build.number} is loaded and {behind} events behind, and {why}. "
                "Mend that and call rebuild again: it goes on here"
            )
        await asyncio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def _throttled(
    client: Client, kafka: KafkaSettings, pool: Workers, build: "_Build", partitions: int, most_lag: int | None
) -> AsyncIterator[None]:
    """Hold the workers still while the generation in use is too far behind the log."""
    if most_lag is None:
        yield
        return

    async def watch() -> None:
        async with open_partition(kafka, EVENTS, 0) as consumer:
            while True:
                log_ends = await ends(consumer, EVENTS, range(partitions))
                there = await generations.checkpoints(client, await generations.in_use(client))
                lag = sum(end - there.get(number, Checkpoint()).cursor.offset for number, end in log_ends.items())
                pool.hold(still=lag > most_lag)
                build.report_holding(max(0, lag - most_lag))
                await asyncio.sleep(_LOOK_SECONDS)

    async with asyncio.TaskGroup() as tasks:
        watching_lag = tasks.create_task(watch())
        yield
        watching_lag.cancel()


class _Build:
    """What a rebuild notes of itself, so that others see it, and go on with it when it is dead."""

    def __init__(self, client: Client, number: int, found: Document, report: Report) -> None:
        self._client = client
        self._report = report
        self._now = ("", 0, 0)
        self._excess = self._most_excess = 0
        self.owner: str = found["build"]["owner"]
        self.name: str = found["build"]["name"]
        """The same for each process that goes on with it, and no other build's."""
        self.number = number
        self.is_loaded = found["state"] == generations.LOADED
        self.plan = msgspec.json.decode(found["build"]["plan"], type=Plan)
        self.loaded: set[int] = set(found["build"]["loaded"])
        """Ranges whose documents are inserted."""

    def report(self, phase: str, done: int, of: int) -> None:
        """Tell the caller, and with the next heartbeat everybody, how far this is."""
        self._now = (phase, done, of)
        self._report(phase, done, of)

    def report_holding(self, excess: int) -> None:
        """Tell that the workers hold still until the generation in use has applied so many records more, or go on."""
        if excess or self._excess:
            self._most_excess = max(self._most_excess, excess) if excess else 0
            self._report(_HOLDING, self._most_excess - excess, self._most_excess)
        self._excess = excess

    async def note_loaded(self, number: int) -> None:
        self.loaded.add(number)
        await self.heartbeat()

    async def heartbeat(self) -> None:
        """Note that this goes on, and how far it is.

        Raises:
            WrongGeneration: it is somebody else's now, or was dropped.
        """
        phase, done, of = self._now
        if self._excess:
            phase = f"{_HOLDING} ({self._excess} records more); {phase}"
        await generations.note_build(
            self._client,
            self.number,
            self.owner,
            {"heartbeat_at": datetime.now(UTC), "phase": phase, "done": done, "of": of, "loaded": sorted(self.loaded)},
        )

    async def let_go(self) -> None:
        """Note that nobody is at work any more, so that the next rebuild need not wait."""
        with suppress(EpisodesError):
            await generations.note_build(self._client, self.number, self.owner, {"heartbeat_at": _LONG_AGO})


@asynccontextmanager
async def _begun(client: Client, kafka: KafkaSettings, partitions: int, report: Report) -> AsyncIterator[_Build]:
    """A build that is ours while this lasts: a new one, or one whose process is dead."""
    owner = str(uuid.uuid4())
    found = await generations.being_built(client)
    if found is None:
        async with open_partition(kafka, EVENTS, 0) as consumer:
            plan = make_plan(await ends(consumer, EVENTS, range(partitions)), at_least=_LEAST_RANGES)
        await generations.begin(
            client,
            {
                "owner": owner,
                "name": str(uuid.uuid4()),
                "heartbeat_at": datetime.now(UTC),
                "plan": msgspec.json.encode(plan).decode(),
                "loaded": [],
            },
        )
    else:
        await _wait_dead(client, found)
        await generations.take_over(client, found["_id"], found["build"]["owner"], owner)
    found = await generations.being_built(client)
    if found is None or found["build"]["owner"] != owner:
        raise WrongGeneration("another rebuild was quicker")
    build = _Build(client, found["_id"], found, report)

    async def beat() -> None:
        while True:
            await build.heartbeat()
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    try:
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(beat())
            yield build
            beating.cancel()
    except ExceptionGroup as group:
        raise gravest(group) from group
    finally:
        await build.let_go()


async def _wait_dead(client: Client, found: Document) -> None:
    """Wait until it is sure that nobody works on the build.

    Raises:
        RebuildRunning: somebody does.
    """
    first, began = found["build"], time.monotonic()
    while datetime.now(UTC) - first["heartbeat_at"] < _ALIVE and time.monotonic() - began < _ALIVE.total_seconds():
        now = await generations.being_built(client)
        if now is None or now["build"]["heartbeat_at"] != first["heartbeat_at"]:
            noted = first if now is None else now["build"]
            raise RebuildRunning(
                f"generation {found['_id']} is being built already: {noted.get('phase') or 'it just began'}, "
                f"{noted.get('done', 0)} of {noted.get('of', 0)}"
            )
        await asyncio.sleep(_LOOK_SECONDS)
