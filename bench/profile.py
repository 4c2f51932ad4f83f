"""Where the time goes: what each process uses for one write, and a flame graph of each of ours.

    python -m bench.profile [--seconds 10] [--out docs/benchmarks/profiles]

Each load runs twice: once for the numbers, and once with py-spy beside it for the flame graphs, which show only the
time in which Python ran (``--gil``). Needs wrk, Go for vegeta, and py-spy (``pip install py-spy``), which must be
allowed to look into other processes: as root, or with ``kernel.yama.ptrace_scope`` 0.
"""

import argparse
import asyncio
import re
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.harness import LeftOutError, cpu_seconds
from bench.load.generators import Load, closed_loop, open_loop
from bench.services import Bench, Service, ours, running
from local.process import ROOT

_WARM_UP_SECONDS = 40
_SAMPLES_PER_SECOND = 200
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
        names = [*_used(bench, service), "generator", "idle"]
        print(f"| load | events/s | p50, ms | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}", flush=True)
        for scenario in scenarios(service):
            await service.settle()
            print(await _measured(bench, service, scenario, seconds), flush=True)
            await service.settle()
            await _drawn(spy, service, scenario, seconds, out)


async def _measured(bench: Bench, service: Service, scenario: Scenario, seconds: float) -> str:
    """A line of the table: milliseconds of CPU for each event, by process, and cores of the machine that idled."""
    before, idle, began = _used(bench, service), psutil.cpu_times().idle, time.monotonic()
    load = await scenario.run(seconds)
    idled = (psutil.cpu_times().idle - idle) / (time.monotonic() - began)
    await service.settle()
    events = load.rate * round(seconds) * scenario.events
    each = [(used - before[name]) / events * 1e3 for name, used in _used(bench, service).items()]
    each.append(load.generator_cores * round(seconds) / events * 1e3)
    columns = [f"{load.rate * scenario.events:,.0f}", f"{load.latency.p50 * 1e3:.1f}", *(f"{one:.3f}" for one in each)]
    return f"| {scenario.name} | {' | '.join(columns)} | {idled:.2f} |"


async def _drawn(spy: str, service: Service, scenario: Scenario, seconds: float, out: Path) -> None:
    files = {process.name: out / f"{scenario.name}-{process.name}.svg" for process in service.processes}
    spies = [
        await asyncio.create_subprocess_exec(
            *(spy, "record", "--gil", "--rate", str(_SAMPLES_PER_SECOND), "--duration", str(round(seconds))),
            *("--pid", str(process.pid), "--output", str(files[process.name])),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        for process in service.processes
    ]
    await scenario.run(seconds + 2)
    if any([await spy.wait() for spy in spies]):
        raise RuntimeError("py-spy failed: may it look into other processes?")
    for name, file in files.items():
        _entitle(file, f"{name}, {scenario.name}")


def _entitle(file: Path, title: str) -> None:
    """Give a flame graph a title. py-spy writes its command line there."""
    file.write_text(_TITLE.sub(rf"\g<1>{title}<", file.read_text()))


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
