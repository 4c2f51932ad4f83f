"""Where the time goes: what each process uses for one write, and a flame graph of each of ours.

    python -m bench.profile [--seconds 10] [--out docs/benchmarks/profiles]

Five loads of writes, a projector that begins behind a backlog, and a rebuild of all that was written. Each runs twice:
once for the numbers, and once with py-spy beside it for the flame graphs, which show only the time in which Python ran
(``--gil``). Needs wrk, Go for vegeta, and py-spy (``pip install py-spy``), which must be
allowed to look into other processes: as root, or with ``kernel.yama.ptrace_scope`` 0.
"""

import argparse
import asyncio
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.harness import LeftOutError, cpu_seconds
from bench.load.generators import Load, closed_loop, open_loop
from bench.services import PARTITIONS, Bench, Service, ours, running
from local.process import ROOT
from shared.kafka import ends, open_consumer
from shared.settings import EVENTS, KafkaSettings

_WARM_UP_SECONDS = 40
_SAMPLES_PER_SECOND = 200
_GENERATOR = "generator"
_TITLE = re.compile(r'(<text id="title"[^>]*>)[^<]*<')


@dataclass(frozen=True)
class Scenario:
    """A load: what it is called, how many events are in a request, and how it is put on the service."""

    name: str
    events: int
    run: Callable[[float], Coroutine[Any, Any, Load]]


def scenarios(service: Service) -> list[Scenario]:
    """Those of the targets for writes."""
    closed = partial(closed_loop, service.url)
    return [
        Scenario("64-callers", 1, lambda seconds: closed(service.singles, callers=64, seconds=seconds)),
        Scenario("one-caller", 1, lambda seconds: closed(service.singles, callers=1, seconds=seconds)),
        Scenario("400-a-second", 1, lambda seconds: open_loop(service.url, service.singles, rate=400, seconds=seconds)),
        Scenario("batches-of-100", 100, lambda seconds: closed(service.batches(100), callers=8, seconds=seconds)),
        Scenario("batches-of-1000", 1_000, lambda seconds: closed(service.batches(1_000), callers=4, seconds=seconds)),
    ]


async def main(seconds: float, out: Path) -> None:
    """Print a table, and write the flame graphs."""
    spy = shutil.which("py-spy")
    if spy is None:
        raise LeftOutError("py-spy is not installed (pip install py-spy)")
    with running() as bench:
        service = ours(bench)
        await closed_loop(service.url, service.singles, callers=64, seconds=_WARM_UP_SECONDS)
        await closed_loop(service.url, service.batches(100), callers=8, seconds=_WARM_UP_SECONDS / 4)
        names = [*_used(bench, service), _GENERATOR, "idle"]
        print(f"| load | events/s | p50, ms | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}", flush=True)
        for scenario in scenarios(service):
            await service.settle()
            print(await _measured(bench, service, scenario, seconds), flush=True)
            await service.settle()
            await _drawn(spy, service, scenario, seconds, out)
        print(await _backlog(bench, service, seconds), flush=True)
        file = out / "backlog-projector.svg"
        await _backlog(bench, service, seconds, [*_recording(spy, file), "--duration", str(round(seconds))])
        _entitle(file, "projector, backlog")
        print(await _rebuild(bench, service), flush=True)
        file = out / "rebuild-projector.svg"
        await _rebuild(bench, service, [*_recording(spy, file), "--subprocesses", "--"])
        _entitle(file, "rebuild")


class _Watch:
    """What is used from its beginning on."""

    def __init__(self, bench: Bench, service: Service) -> None:
        self._bench = bench
        self._service = service
        self._before, self._idle, self._began = _used(bench, service), psutil.cpu_times().idle, time.monotonic()
        self.seconds = self._idled = 0.0

    def stop_the_clock(self) -> None:
        """End what rates and idle cores are counted over; CPU is counted on."""
        self.seconds = time.monotonic() - self._began
        self._idled = (psutil.cpu_times().idle - self._idle) / self.seconds

    def line(self, name: str, events: float, *, rate: float, p50: str = "", **more: float) -> str:
        """A line of the table: milliseconds of CPU for each event, by process, and cores of the machine that idled."""
        used = {name: used - self._before.get(name, 0) for name, used in _used(self._bench, self._service).items()}
        used |= {name: used.get(name, 0) + cpu for name, cpu in ({_GENERATOR: 0.0} | more).items()}
        columns = [f"{rate:,.0f}", p50, *(f"{cpu / events * 1e3:.3f}" for cpu in used.values())]
        return f"| {name} | {' | '.join(columns)} | {self._idled:.2f} |"


async def _measured(bench: Bench, service: Service, scenario: Scenario, seconds: float) -> str:
    watch = _Watch(bench, service)
    load = await scenario.run(seconds)
    watch.stop_the_clock()
    await service.settle()
    events = load.rate * round(seconds) * scenario.events
    generator, p50 = load.generator_cores * round(seconds), f"{load.latency.p50 * 1e3:.1f}"
    return watch.line(scenario.name, events, rate=load.rate * scenario.events, p50=p50, **{_GENERATOR: generator})


async def _backlog(bench: Bench, service: Service, seconds: float, recording: Sequence[str] = ()) -> str:
    """A projector that was away while others wrote as fast as they could, until it has caught up."""
    projector = bench.cluster.processes["projector"]
    await asyncio.to_thread(projector.stop)
    load = await closed_loop(service.url, service.batches(1_000), callers=4, seconds=2 * seconds)
    projector.start()
    watch = _Watch(bench, service)
    spy = [await _quietly(*recording, "--pid", str(projector.pid))] if recording else []
    await service.settle()
    watch.stop_the_clock()
    for each in spy:
        await _well(each)
    events = load.rate * round(2 * seconds) * 1_000
    return watch.line("backlog", events, rate=events / watch.seconds)


async def _rebuild(bench: Bench, service: Service, recording: Sequence[str] = ()) -> str:
    """All that is in the log, by one worker."""
    kafka = KafkaSettings(bootstrap_servers=bench.servers.kafka_bootstrap)
    async with open_consumer(kafka, EVENTS) as consumer:
        events = sum((await ends(consumer, EVENTS, range(PARTITIONS))).values())
    watch, before = _Watch(bench, service), resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [*recording, sys.executable, "-m", "projector", "rebuild", "--workers", "1"]
    await _well(await _quietly(*argv, env={**os.environ, **bench.servers.env}))
    watch.stop_the_clock()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return watch.line("rebuild", events, rate=events / watch.seconds, projector=cpu)


async def _drawn(spy: str, service: Service, scenario: Scenario, seconds: float, out: Path) -> None:
    files = {process.name: out / f"{scenario.name}-{process.name}.svg" for process in service.processes}
    length = ("--duration", str(round(seconds)))
    spies = [
        await _quietly(*_recording(spy, files[process.name]), *length, "--pid", str(process.pid))
        for process in service.processes
    ]
    await scenario.run(seconds + 2)
    for each in spies:
        await _well(each)
    for name, file in files.items():
        _entitle(file, f"{name}, {scenario.name}")


def _recording(spy: str, file: Path) -> Sequence[str]:
    return (spy, "record", "--gil", "--rate", str(_SAMPLES_PER_SECOND), "--output", str(file))


async def _quietly(*argv: str, env: Mapping[str, str] | None = None) -> asyncio.subprocess.Process:
    quiet = asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(*argv, stdout=quiet, stderr=quiet, env=env)


async def _well(process: asyncio.subprocess.Process) -> None:
    """Wait until it has ended, as it should."""
    if await process.wait():
        raise RuntimeError("py-spy or a rebuild failed: may py-spy look into other processes?")


def _entitle(file: Path, title: str) -> None:
    """Give a flame graph a title. py-spy writes its command line there, and this machine's paths at processes."""
    file.write_text(_TITLE.sub(rf"\g<1>{title}<", file.read_text().replace(sys.executable, "python")))


def _used(bench: Bench, service: Service) -> Mapping[str, float]:
    """Process → CPU seconds so far, also of the servers."""
    servers = {"Kafka": bench.servers.kafka, "MongoDB": bench.servers.mongodb}
    return service.cpu() | {
        name: cpu_seconds([pid]) for name, server in servers.items() if (pid := getattr(server, "pid", None))
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Where the time goes.")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "profiles")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(options.seconds, options.out))
