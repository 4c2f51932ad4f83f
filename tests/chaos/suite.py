"""One run of the suite: a stack, clients at work, faults, and then the question whether everything is as it must be."""

import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from local.process import NotReadyError
from tests.chaos.canary import Canary, NoService
from tests.chaos.checker import check
from tests.chaos.faults import KINDS, Kind, Pace, Schedule
from tests.chaos.history import History
from tests.chaos.model import Finding, read_all
from tests.chaos.report import Report, counted, statuses
from tests.chaos.stack import ChaosStack, Layout, chaos_stack
from tests.chaos.workload import run_workload, settle

_WARM_UP = 2.0
_READY_SECONDS = 120.0
_LAST_WORDS_SECONDS = 2.0


def tell(line: str) -> None:
    """Show a line of progress at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Options:
    """What to run."""

    seconds: float = 900.0
    seed: int = 1
    clients: int = 12
    only: Sequence[str] = ()
    """Kinds of faults, or beginnings of their names; all if empty."""
    once_each: bool = False
    """Every kind once, in random order and sometimes two at once, instead of for so many seconds."""
    pace: Pace = field(default_factory=Pace)
    layout: Layout = field(default_factory=Layout)
    say: Callable[[str], None] = tell


def kinds_of(only: Sequence[str]) -> list[Kind]:
    """Give the kinds of faults that are meant.

    Raises:
        LookupError: one of the names is that of none.
    """
    for name in only:
        if not any(kind.startswith(name) for kind in KINDS):
            raise LookupError(f"{name}: there are {', '.join(KINDS)}")
    return [kind for name, kind in KINDS.items() if not only or any(name.startswith(each) for each in only)]


async def run(options: Options) -> Report:
    """Run everything once. The folder of the run stays if there are findings, and the report names it."""
    folder = Path(tempfile.mkdtemp(prefix="episodes-chaos-")).resolve()
    try:
        report = await _run(options, folder)
        (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    except BaseException:
        options.say(f"history and logs: {folder}")
        raise
    if report.findings:
        report.kept = str(folder)
        for bulky in ("servers", "state", "rebuild", "logs"):
            await asyncio.to_thread(shutil.rmtree, folder / bulky, ignore_errors=True)
    else:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    return report


async def _run(options: Options, folder: Path) -> Report:
    history = History(folder / "history.ndjson")
    say = options.say
    async with chaos_stack(folder, options.layout) as stack, Canary(stack) as canary:
        missing = {kind.name: why for kind in kinds_of(options.only) if (why := kind.missing(stack)) is not None}
        kinds = [kind for kind in kinds_of(options.only) if kind.name not in missing]
        schedule = Schedule(stack, canary, seed=options.seed, kinds=kinds, pace=options.pace, say=say)
        say(f"{options.clients} clients, {len(kinds)} kinds of faults, seed {options.seed}; in {folder}")
        stop = asyncio.Event()
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run_workload(stack, history, seed=options.seed, clients=options.clients, stop=stop))
            await asyncio.sleep(_WARM_UP)
            if options.once_each:
                await schedule.run_once_each()
            elif kinds:
                await schedule.run(began + options.seconds)
            else:
                await asyncio.sleep(options.seconds)
            stop.set()
        seconds = time.monotonic() - began
        say("no more faults; waiting until everything is level")
        findings = [Finding("no_service", problem) for problem in schedule.problems]
        findings += await _settled(stack, canary, history)
        verified, said = await stack.run_command("projector", "verify", "--workers", "1", "--folder", str(folder))
        if verified != 0:
            findings.append(Finding("verify", f"python -m projector verify: {said[-1500:]}"))
        log, models = await asyncio.to_thread(read_all, stack.kafka_bootstrap, stack.mongodb_url)
        findings += [Finding("process", crash) for crash in stack.crashes]
    history.close()
    say(f"checking {len(history.operations):,} operations")
    findings += check(history.operations, log, models)
    layout = options.layout
    return Report(
        seed=options.seed,
        seconds=seconds,
        layout=f"{layout.brokers} Kafka, {layout.members} MongoDB, {layout.gateways} gateways, "
        f"{layout.ingestors} ingestors, {layout.projectors} projectors, {options.clients} clients",
        faults=schedule.records,
        skipped=missing,
        calls=counted(history.operations),
        statuses=statuses(history.operations),
        findings=findings,
    )


async def _settled(stack: ChaosStack, canary: Canary, history: History) -> list[Finding]:
    """Wait until everything serves, and read everything once more; give what stood in the way of that."""
    for proxies in stack.proxies.values():
        for proxy in proxies:
            await proxy.heal()
    findings = []
    try:
        await canary.wait_service(time.monotonic(), within=_READY_SECONDS)
    except NoService as error:
        findings.append(Finding("no_service", f"when all faults had ended: {error}"))
    for process in stack.processes.values():
        try:
            await asyncio.to_thread(process.wait_ready, _READY_SECONDS)
        except NotReadyError as error:
            process.signal(signal.SIGABRT)
            await asyncio.sleep(_LAST_WORDS_SECONDS)
            where = process.log_tail(80)
            findings.append(Finding("not_ready", f"when all faults had ended: {error}\nWhere it was: {where}"))
    await settle(stack, history)
    return findings
