"""What is done to the service: every kind of fault, and a random schedule of them.

A `Fault` is injected, lasts, and is healed. `KINDS` has a maker for each kind, which draws the target and all else
from a random source. `run_faults` goes through a shuffled deck of kinds, sometimes two at once, and asks the canary
after each when the service was back.
"""

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from local.process import ManagedProcess, NotReadyError
from local.services import SERVICES
from tests.chaos.canary import Canary, NoService
from tests.chaos.proxy import Delay, Direction, Drip, Hold, Proxy, Reset, Swallow, Toxic
from tests.chaos.stack import FAKETIME, ChaosStack, Member, SmallDisk
from tests.cluster import wait_until

Act = Callable[[], Awaitable[None]]
Say = Callable[[str], None]

HOUR = 3600
DAY = 24 * HOUR
_RESTART_SECONDS = 180
"""A broker takes to be there again, on a machine that much else uses too."""


@dataclass(frozen=True)
class Pace:
    """How long faults last, in seconds."""

    outage: tuple[float, float] = (0.0, 8.0)
    """What is down, cut or slow."""
    freeze: tuple[float, float] = (11.0, 40.0)
    """What is stopped or silent: longer than a session of Kafka's (10), a reply (10) and a request (5); at the long end
    also than a socket (30) and a transaction (20) of MongoDB's."""
    rest: tuple[float, float] = (0.5, 4.0)
    """Between two faults."""


QUICK = Pace(outage=(0.0, 2.0), freeze=(11.0, 12.0), rest=(0.2, 0.5))


@dataclass
class Fault:
    """One fault, with its target chosen."""

    kind: str
    where: str
    uses: frozenset[str]
    """What no other fault may touch meanwhile: names of processes, servers and ways."""
    lasts: float
    inject: Act
    heal: Act
    work: bool = False
    """It is something that operators do, over when `inject` returns, and nobody should notice."""


class Record(msgspec.Struct):
    """A fault that was, with times in seconds from the start of the schedule."""

    kind: str
    where: str
    alone: bool
    injected: float
    healed: float
    from_fault: float | None
    """Seconds from the fault until everything worked again, be it by itself or when it was healed."""
    from_heal: float | None
    """The same from the healing on; `None` if it did not within the time given."""


Maker = Callable[[ChaosStack, random.Random, Pace], Fault]
Need = Callable[[ChaosStack], str | None]
"""Says why a kind of fault cannot be, or `None`."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    make: Maker
    missing: Need


class Schedule:
    """Runs faults on a stack until it is time to stop, and keeps the records."""

    def __init__(
        self, stack: ChaosStack, canary: Canary, *, seed: int, kinds: Sequence[Kind], pace: Pace, say: Say
    ) -> None:
        self.records: list[Record] = []
        self.problems: list[str] = []
        """One line for each time that the service did not come back, or a server did not."""
        self._stack = stack
        self._canary = canary
        self._random = random.Random(f"faults/{seed}")  # noqa: S311 - no secret
        self._kinds = kinds
        self._pace = pace
        self._say = say
        self._began = time.monotonic()

    async def run(self, until: float) -> None:
        """Inject faults until the monotonic clock says `until`; the last may end later."""
        self._began = time.monotonic()
        deck: list[Kind] = []
        while time.monotonic() < until:
            await self._play(deck or self._shuffle(deck))

    async def run_once_each(self) -> None:
        """Inject a fault of each kind."""
        self._began = time.monotonic()
        deck = self._shuffle([])
        while deck:
            await self._play(deck)

    def _shuffle(self, deck: list[Kind]) -> list[Kind]:
        deck[:] = self._random.sample(self._kinds, len(self._kinds))
        return deck

    async def _play(self, deck: list[Kind]) -> None:
        """Take one kind from the deck, sometimes two if they go together, and have a rest."""
        faults: list[Fault] = []
        for kind in deck[: -3 if self._random.random() < 0.3 else -2 : -1]:
            fault = kind.make(self._stack, self._random, self._pace)
            if all(fault.uses.isdisjoint(other.uses) for other in faults):
                faults.append(fault)
                deck.remove(kind)
        await self.run_together(faults)
        await asyncio.sleep(self._random.uniform(*self._pace.rest))

    async def run_together(self, faults: Sequence[Fault]) -> None:
        """Inject these faults at once, heal each in its time, and wait until the service is back."""
        times: dict[int, tuple[float, float]] = {}
        from_fault: dict[int, float] = {}

        async def one(number: int, fault: Fault) -> None:
            injected = time.monotonic()
            self._say(f"{injected - self._began:7.1f}  {fault.kind:<20} {fault.where}  {fault.lasts:.1f} s")
            watch: asyncio.Task[float] | None = None
            try:
                await fault.inject()
                if not fault.work:
                    watch = asyncio.ensure_future(self._canary.wait_service(injected))
                await asyncio.sleep(fault.lasts)
                await fault.heal()
            except (NotReadyError, PyMongoError, TimeoutError) as error:
                self._note(f"{fault.kind} of {fault.where} went wrong: {error}")
            times[number] = injected, time.monotonic()
            if watch is not None:
                with suppress(NoService):
                    from_fault[number] = await watch

        async with asyncio.TaskGroup() as tasks:
            for number, fault in enumerate(faults):
                tasks.create_task(one(number, fault))
        healed = max(healed for _, healed in times.values())
        from_heal: float | None = None
        try:
            from_heal = await self._canary.wait_service(healed)
            self._say(f"{time.monotonic() - self._began:7.1f}  serves again, {from_heal:.1f} s after")
        except NoService as error:
            what = " and ".join(f"{fault.kind} of {fault.where}" for fault in faults)
            self._note(f"after {what}: {error}")
        for number, fault in enumerate(faults):
            began, ended = times[number]
            self.records.append(
                Record(
                    kind=fault.kind,
                    where=fault.where,
                    alone=len(faults) == 1,
                    injected=began - self._began,
                    healed=ended - self._began,
                    from_fault=from_fault.get(number),
                    from_heal=from_heal,
                )
            )

    def _note(self, problem: str) -> None:
        self.problems.append(problem)
        self._say(f"         {problem}")


# ---- processes -------------------------------------------------------------------------------------------------------


def kill(kind: str) -> Maker:
    """SIGKILL, and a start a little later; at times so much later that others have taken over."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(stack.names(kind))
        lasts = draw.uniform(*pace.freeze) if draw.random() < 0.2 else draw.uniform(*pace.outage)
        return _of_program(stack, f"kill-{kind}", name, lasts, stack.kill)

    return make


def terminate(kind: str) -> Maker:
    """SIGTERM, and a start a little later. It must end by itself, without an error."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(stack.names(kind))
        return _of_program(stack, f"term-{kind}", name, draw.uniform(*pace.outage) / 2, stack.end)

    return make


def freeze(kind: str) -> Maker:
    """SIGSTOP for longer than every timeout, then SIGCONT: a zombie that believes that it is still what it was."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(stack.names(kind))
        return _frozen(stack, f"stop-{kind}", name, draw.uniform(*pace.freeze))

    return make


def _of_program(stack: ChaosStack, kind: str, name: str, lasts: float, end: Callable[[str], object]) -> Fault:
    async def inject() -> None:
        await asyncio.to_thread(end, name)

    async def heal() -> None:
        await asyncio.to_thread(stack.start, name)

    return Fault(kind, name, frozenset({name}), lasts, inject, heal)


def _frozen(stack: ChaosStack, kind: str, name: str, lasts: float) -> Fault:
    async def inject() -> None:
        stack.program(name).pause()

    async def heal() -> None:
        stack.program(name).resume()

    return Fault(kind, name, frozenset({name}), lasts, inject, heal)


# ---- servers ---------------------------------------------------------------------------------------------------------


def _servers(stack: ChaosStack, server: str) -> list[str]:
    return [each.name for each in (stack.brokers if server == "kafka" else stack.members)]


def kill_server(server: str) -> Maker:
    """SIGKILL of a broker or a member, and a start on the same port and data."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(_servers(stack, server))
        return _of_program(stack, f"kill-{server}", name, draw.uniform(*pace.outage), stack.kill)

    return make


def restart_server(server: str) -> Maker:
    """SIGTERM of a broker or a member, and a start on the same port and data."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(_servers(stack, server))
        return _of_program(stack, f"term-{server}", name, draw.uniform(*pace.outage) / 2, stack.stop)

    return make


def freeze_server(server: str) -> Maker:
    """SIGSTOP of a broker or a member, then SIGCONT."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(_servers(stack, server))
        return _frozen(stack, f"stop-{server}", name, draw.uniform(*pace.freeze))

    return make


def step_down(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Ask the primary of MongoDB to step down."""

    async def inject() -> None:
        if (primary := await asyncio.to_thread(_primary, stack.members)) is not None:
            with suppress(PyMongoError):
                await asyncio.to_thread(primary.command, "replSetStepDown", 10, secondaryCatchUpPeriodSecs=2)

    return Fault("step-down", "the primary", frozenset(_servers(stack, "mongodb")), 0, inject, _nothing)


def roll_back(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Let a primary take writes that no other member has, die, and come back to be told that they did not happen."""
    old: Member | None = None

    async def inject() -> None:
        nonlocal old
        old = await asyncio.to_thread(_wait_primary, stack.members)
        others = [each for each in stack.members if each is not old]
        for other in others:
            other.pause()
        for proxy in stack.proxies["any-mongodb"]:  # what they have asked for would still be sent to them
            proxy.cut()
        try:
            await asyncio.to_thread(_write_alone, old)
            await asyncio.sleep(1.5)  # the projector's transactions stand in its log, and wait for a majority
            await asyncio.to_thread(stack.kill, old.name)
        finally:
            for other in others:
                other.resume()

    async def heal() -> None:
        assert old is not None
        await asyncio.to_thread(_wait_primary, [each for each in stack.members if each is not old])
        await asyncio.to_thread(stack.start, old.name)
        await asyncio.to_thread(_wait_rolled_back, old)

    uses = frozenset({*_servers(stack, "mongodb"), "any-mongodb"})
    return Fault("roll-back", "the primary", uses, 0, inject, heal)


def _primary(members: Sequence[Member]) -> Member | None:
    return next((member for member in members if member.is_primary), None)


def _wait_primary(members: Sequence[Member]) -> Member:
    return cast(Member, wait_until(lambda: _primary(members), timeout=60))


def _write_alone(member: Member) -> None:
    with _alone(member) as collection:
        collection.replace_one({"_id": 1}, {"lone": True}, upsert=True)


def _wait_rolled_back(member: Member) -> None:
    """Wait until the member has found its place in the set again, and the write is gone from it.

    Raises:
        TimeoutError: the write is still there. This fault was none, then.
    """

    def rolled_back() -> bool:
        with suppress(PyMongoError), _alone(member) as collection:
            return bool((member.hello() or {}).get("secondary")) and collection.find_one({"_id": 1}) is None
        return False

    wait_until(rolled_back, timeout=60)


@contextmanager
def _alone(member: Member) -> Iterator[Collection[dict[str, Any]]]:
    with MongoClient[dict[str, Any]](member.url, serverSelectionTimeoutMS=2000, socketTimeoutMS=5000) as client:
        yield client["chaos"].get_collection("alone", write_concern=WriteConcern(w=1, j=True))


def move_leaders(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Restart the brokers one after the other, each with a kill: every partition changes its leader, some twice."""
    names = [broker.name for broker in stack.brokers]

    async def inject() -> None:
        for name in draw.sample(names, len(names)):
            await asyncio.to_thread(stack.kill, name)
            await asyncio.sleep(draw.uniform(*pace.outage))
            await asyncio.to_thread(stack.start, name)
            await asyncio.to_thread(stack.program(name).wait_ready, _RESTART_SECONDS)
            await asyncio.sleep(5)  # time to be in sync again: with two away the log takes nothing, by design

    return Fault("move-leaders", "all brokers", frozenset(names), 0, inject, _nothing, work=True)


async def _nothing() -> None:
    pass


# ---- ways ------------------------------------------------------------------------------------------------------------


def _links(stack: ChaosStack, server: str) -> list[str]:
    return [link for link in stack.links if link.endswith(f"-{server}")]


def cut(server: str) -> Maker:
    """Close all connections of a way at once, and refuse new ones for a while."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        link = draw.choice(_links(stack, server))
        proxies = _some(stack.proxies[link], draw)
        lasts = draw.choice([0.0, draw.uniform(*pace.outage)])

        async def inject() -> None:
            for proxy in proxies:
                if lasts:
                    await proxy.refuse()
                proxy.cut()

        async def heal() -> None:
            for proxy in proxies:
                await proxy.accept()

        return Fault(f"cut-{server}", _names(proxies), frozenset({link}), lasts, inject, heal)

    return make


def toxic(name: str, server: str, make_toxic: Callable[[random.Random], tuple[Toxic, Direction]]) -> Maker:
    """Give the proxies of a way a toxic for a while, for all or half of the connections."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        link = draw.choice(_links(stack, server))
        proxies = _some(stack.proxies[link], draw)
        poison, direction = make_toxic(draw)
        share, seed = draw.choice([1.0, 1.0, 0.5]), str(draw.random())
        given: list[tuple[Proxy, Any]] = []

        async def inject() -> None:
            given.extend((proxy, proxy.add(poison, direction, share=share, seed=seed)) for proxy in proxies)

        async def heal() -> None:
            for proxy, what in given:
                proxy.remove(what)

        long = isinstance(poison, Hold | Swallow) and draw.random() < 0.5
        lasts = draw.uniform(*(pace.freeze if long else pace.outage))
        where = f"{_names(proxies)} {direction.name.lower() if direction.name else ''} {poison}"
        return Fault(f"{name}-{server}", where, frozenset({link}), lasts, inject, heal)

    return make


def _delayed(draw: random.Random) -> tuple[Toxic, Direction]:
    seconds = draw.choice([0.02, 0.1, 0.5])
    return Delay(seconds, jitter=seconds), _direction(draw)


def _dripping(draw: random.Random) -> tuple[Toxic, Direction]:
    return Drip(draw.choice([200.0, 2_000.0, 20_000.0])), _direction(draw)


def _held(draw: random.Random) -> tuple[Toxic, Direction]:
    return Hold(), _direction(draw)


def _swallowed(draw: random.Random) -> tuple[Toxic, Direction]:
    return Swallow(), _direction(draw)


def _reset(draw: random.Random) -> tuple[Toxic, Direction]:
    return Reset(after_bytes=draw.randint(1, 1500)), draw.choice([Direction.DOWN, Direction.DOWN, Direction.UP])


def _direction(draw: random.Random) -> Direction:
    return draw.choice([Direction.UP, Direction.DOWN, Direction.BOTH])


def _some(proxies: Sequence[Proxy], draw: random.Random) -> list[Proxy]:
    return [*proxies] if draw.random() < 0.5 else [draw.choice(proxies)]


def _names(proxies: Sequence[Proxy]) -> str:
    return "+".join(proxy.name for proxy in proxies)


# ---- disks and state -------------------------------------------------------------------------------------------------


def full_disk_of_state(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Leave an ingestor no room for its state."""
    name = draw.choice(stack.names("ingestor"))
    return _full("full-disk-state", name, stack.disks[name], draw.uniform(*pace.outage))


def full_disk_of_logs(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Leave the processes no room for what they log."""
    return _full("full-disk-logs", "logs", stack.disks["logs"], draw.uniform(*pace.outage))


def _full(kind: str, where: str, disk: SmallDisk, lasts: float) -> Fault:
    async def inject() -> None:
        await asyncio.to_thread(disk.fill)

    async def heal() -> None:
        disk.free()

    return Fault(kind, where, frozenset({where}), lasts, inject, heal)


def full_disk_of_kafka(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Leave a broker no room for its log. It ends, and is started again when there is room."""
    broker = draw.choice(stack.brokers)

    async def inject() -> None:
        stack.expect_end(broker.name)
        await asyncio.to_thread(broker.disk.fill)

    async def heal() -> None:
        await asyncio.to_thread(stack.kill, broker.name)
        broker.disk.free()
        await asyncio.to_thread(stack.start, broker.name)

    return Fault("full-disk-kafka", broker.name, frozenset({broker.name}), draw.uniform(*pace.outage), inject, heal)


def damage(kind: str, harm: Callable[[Path, random.Random], None]) -> Maker:
    """Stop an ingestor, do something to its state, and start it."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(stack.names("ingestor"))
        end: Callable[[str], object] = stack.kill if draw.random() < 0.5 else stack.stop

        async def inject() -> None:
            await asyncio.to_thread(end, name)
            await asyncio.to_thread(harm, stack.state_folder(name), draw)

        async def heal() -> None:
            await asyncio.to_thread(stack.start, name)

        return Fault(kind, name, frozenset({name}), 0, inject, heal)

    return make


def _partitions(folder: Path) -> list[Path]:
    return sorted(data.parent for data in folder.glob("partition-*/data.mdb"))


def delete_files(folder: Path, draw: random.Random) -> None:
    """Delete an ingestor's whole state, or one file of that of each partition."""
    whole = draw.random() < 0.5
    for place in _partitions(folder):
        if whole:
            shutil.rmtree(place)
        else:
            (place / draw.choice(["data.mdb", "stamp"])).unlink(missing_ok=True)


def cut_files(folder: Path, draw: random.Random) -> None:
    """Cut the state of each partition off somewhere."""
    for place in _partitions(folder):
        size = (place / "data.mdb").stat().st_size
        with (place / "data.mdb").open("r+b") as file:
            file.truncate(draw.choice([0, 4096, size // 2, max(0, size - 4096), draw.randrange(size + 1)]))


def swap_files(folder: Path, draw: random.Random) -> None:
    """Give each partition the state of another one, of this or of another ingestor."""
    everything = {data.parent: data.read_bytes() for data in sorted(folder.parent.glob("*/partition-*/data.mdb"))}
    for place in _partitions(folder):
        others = [content for other, content in everything.items() if other.name != place.name]
        if others:
            (place / "data.mdb").write_bytes(draw.choice(others))


def old_state(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Give an ingestor the state back that it had some seconds ago."""
    name = draw.choice(stack.names("ingestor"))
    old = stack.folder / f"old-state-of-{name}"

    async def inject() -> None:
        await asyncio.to_thread(stack.stop, name)
        await asyncio.to_thread(_copy, stack.state_folder(name), old)
        await asyncio.to_thread(stack.start, name)

    async def heal() -> None:
        await asyncio.to_thread(stack.kill, name)
        for place in _partitions(old):
            target = stack.state_folder(name) / place.name
            await asyncio.to_thread(_copy, place, target)
        await asyncio.to_thread(stack.start, name)

    return Fault("state-old", name, frozenset({name}), draw.uniform(*pace.outage) + 2, inject, heal)


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


# ---- clocks ----------------------------------------------------------------------------------------------------------


def jump(kind: str) -> Maker:
    """Let a process's wall clock jump, and jump back."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        name = draw.choice(stack.names(kind))
        jumps = [-DAY, -HOUR, -20, 20, HOUR]
        if kind != "gateway":  # its callers' tokens would have expired
            jumps.append(8 * DAY)
        seconds = draw.choice(jumps)

        async def inject() -> None:
            stack.set_clock(name, seconds)

        async def heal() -> None:
            stack.set_clock(name, 0)

        where = f"{name} {seconds:+d} s"
        return Fault(f"clock-{kind}", where, frozenset({name}), draw.uniform(*pace.outage) + 2, inject, heal)

    return make


# ---- what operators do -----------------------------------------------------------------------------------------------


def rebuild(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Rebuild the read models and switch; then go back and drop the new ones, or drop the old ones."""
    goes_back = draw.random() < 0.6
    killed_after = draw.uniform(0.5, 3) if draw.random() < 0.3 else None
    folder = str(stack.folder / "rebuild")

    async def inject() -> None:
        if killed_after is not None:
            with suppress(TimeoutError):
                await stack.run_command(
                    "projector", "rebuild", "--workers", "1", "--folder", folder, within=killed_after
                )
        before = await _generation(stack)
        await _insist(stack, "projector", "rebuild", "--workers", "1", "--folder", folder)
        made = await _generation(stack)
        await asyncio.sleep(draw.uniform(0, 2))
        if made == before:  # the run that was killed had switched already
            return
        if goes_back:
            await _insist(stack, "projector", "rollback")
            await asyncio.sleep(draw.uniform(0, 2))
            await _insist(stack, "projector", "drop", str(made))
        else:
            await _insist(stack, "projector", "drop", str(before))

    where = "back and drop the new" if goes_back else "drop the old"
    if killed_after is not None:
        where += f", killed after {killed_after:.1f} s"
    return Fault("rebuild", where, frozenset({"generations"}), 0, inject, _nothing, work=True)


async def _generation(stack: ChaosStack) -> int:
    said = await _insist(stack, "projector", "generations", "--json")
    generations: list[dict[str, Any]] = msgspec.json.decode(said.strip().splitlines()[-1])
    return int(next(each["number"] for each in generations if each["in_use"]))


async def _insist(stack: ChaosStack, *command: str) -> str:
    """Run a command again until it succeeds; what other faults do to it meanwhile is not its fault."""
    deadline = time.monotonic() + 90
    while True:
        code, said = await stack.run_command(*command)
        if code == 0:
            return said
        if time.monotonic() > deadline:
            stack.crashes.append(f"python -m {' '.join(command)} does not succeed: {said[-600:]}")
            return said
        await asyncio.sleep(1)


def scale(kind: str) -> Maker:
    """Have one of a kind, then three, then one, then as many as before."""

    def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
        count = len(stack.names(kind))

        async def to(wanted: int) -> None:
            while len(names := stack.names(kind)) > wanted:
                await stack.remove(draw.choice(names))
            while len(names := stack.names(kind)) < wanted:
                added = await stack.add(next(name for n in range(1, 9) if (name := f"{kind}-{n}") not in names))
                await asyncio.to_thread(_ready, added)
            await asyncio.sleep(draw.uniform(1, 3))

        async def inject() -> None:
            for wanted in (1, 3, 1, count):
                await to(wanted)

        uses = frozenset(f"{kind}-{n}" for n in range(1, 9)) | frozenset(_links(stack, "gateway"))
        return Fault(f"scale-{kind}", "1, 3, 1", uses, 0, inject, _nothing, work=True)

    return make


def _ready(process: ManagedProcess) -> None:
    with suppress(NotReadyError):  # another fault may keep it from being so; the canary looks at the end
        process.wait_ready(20)


def rolling_restart(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
    """Restart every process in the order of an upgrade, each when the one before is ready."""
    names = [name for kind in ("projector", "ingestor", "gateway") for name in stack.names(kind)]

    async def inject() -> None:
        for name in names:
            await asyncio.to_thread(stack.end, name)
            await asyncio.to_thread(stack.start, name)
            await asyncio.to_thread(_ready, stack.processes[name])

    return Fault("rolling-restart", "all", frozenset(names), 0, inject, _nothing, work=True)


# ---- all of them -----------------------------------------------------------------------------------------------------


def _always(_: ChaosStack) -> str | None:
    return None


def _a_set(stack: ChaosStack) -> str | None:
    return None if len(stack.members) > 1 else "needs --members 3"


def _brokers(stack: ChaosStack) -> str | None:
    return None if len(stack.brokers) > 1 else "needs --brokers 3"


def _faketime(_: ChaosStack) -> str | None:
    return None if FAKETIME is not None else "libfaketime is not installed (Debian: apt-get install faketime)"


def _mounts(stack: ChaosStack) -> str | None:
    return None if stack.disks["logs"].mounted else "this user may not mount a small disk"


def _all_kinds() -> list[Kind]:
    kinds: list[Kind] = []
    for service in SERVICES:
        kinds += [
            Kind(f"kill-{service}", kill(service), _always),
            Kind(f"term-{service}", terminate(service), _always),
            Kind(f"stop-{service}", freeze(service), _always),
            Kind(f"clock-{service}", jump(service), _faketime),
        ]
    for server in ("kafka", "mongodb"):
        kinds += [
            Kind(f"kill-{server}", kill_server(server), _always),
            Kind(f"term-{server}", restart_server(server), _always),
            Kind(f"stop-{server}", freeze_server(server), _always),
        ]
    for end in ("gateway", "kafka", "mongodb"):
        kinds += [
            Kind(f"cut-{end}", cut(end), _always),
            Kind(f"delay-{end}", toxic("delay", end, _delayed), _always),
            Kind(f"drip-{end}", toxic("drip", end, _dripping), _always),
            Kind(f"late-{end}", toxic("late", end, _held), _always),
            Kind(f"half-open-{end}", toxic("half-open", end, _swallowed), _always),
            Kind(f"reset-{end}", toxic("reset", end, _reset), _always),
        ]
    return [
        *kinds,
        Kind("step-down", step_down, _a_set),
        Kind("roll-back", roll_back, _a_set),
        Kind("move-leaders", move_leaders, _brokers),
        Kind("full-disk-state", full_disk_of_state, _mounts),
        Kind("full-disk-logs", full_disk_of_logs, _mounts),
        Kind("full-disk-kafka", full_disk_of_kafka, _mounts),
        Kind("state-deleted", damage("state-deleted", delete_files), _always),
        Kind("state-cut", damage("state-cut", cut_files), _always),
        Kind("state-swapped", damage("state-swapped", swap_files), _always),
        Kind("state-old", old_state, _always),
        Kind("rebuild", rebuild, _always),
        Kind("scale-gateway", scale("gateway"), _always),
        Kind("scale-ingestor", scale("ingestor"), _always),
        Kind("rolling-restart", rolling_restart, _always),
    ]


KINDS = {kind.name: kind for kind in _all_kinds()}
"""Every kind of fault by its name."""
