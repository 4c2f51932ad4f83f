"""What a run came to: as JSON for machines, as tables for people."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import Record
from tests.chaos.history import Operation
from tests.chaos.model import Finding

_SHOWN = 40


class Calls(msgspec.Struct):
    """How many calls there were."""

    operations: int
    writes: int
    acknowledged: int
    """Writes that were answered 2xx."""
    refused: int
    """Writes that were answered with a no: by a rule, or because the service was away."""
    unknown: int
    """Writes whose outcome their callers were not told."""


class Report(msgspec.Struct, kw_only=True):
    """One run."""

    seed: int
    seconds: float
    """How long faults were injected."""
    layout: str
    faults: list[Record]
    skipped: dict[str, str]
    """Kind of fault → why there were none."""
    calls: Calls
    statuses: dict[str, int]
    """Answers by method and status code; "none" if there was none."""
    findings: list[Finding]
    kept: str | None = None
    """The folder with the history and the logs, if there was anything to find."""


def counted(operations: Sequence[Operation]) -> Calls:
    """Count the calls."""
    outcomes = Counter(operation.outcome for operation in operations if operation.method != "GET")
    return Calls(len(operations), outcomes.total(), outcomes["ok"], outcomes["refused"], outcomes["unknown"])


def statuses(operations: Iterable[Operation]) -> dict[str, int]:
    """Count the answers by method and status code."""
    found = Counter(
        f"{'read' if operation.method == 'GET' else 'write'} {operation.status or 'none'}" for operation in operations
    )
    return dict(sorted(found.items()))


def show(report: Report, console: Console) -> None:
    """Print a report."""
    calls = report.calls
    console.print(_faults(report))
    if report.skipped:
        console.print("not injected: " + "; ".join(f"{kind}: {why}" for kind, why in report.skipped.items()))
    console.print(
        f"seed {report.seed}, {report.layout}: {report.seconds:.0f} s of faults, {len(report.faults)} faults, "
        f"{calls.operations:,} operations, of them {calls.writes:,} writes: {calls.acknowledged:,} acknowledged, "
        f"{calls.refused:,} refused, {calls.unknown:,} unknown; {len(report.findings)} findings"
    )
    console.print(", ".join(f"{what}: {count:,}" for what, count in report.statuses.items()))
    for finding in report.findings[:_SHOWN]:
        console.print(f"FOUND {finding.kind}: {finding.detail}", style="red", markup=False)
    if len(report.findings) > _SHOWN:
        console.print(f"… and {len(report.findings) - _SHOWN} more")
    if report.kept is not None:
        console.print(f"history and logs: {report.kept}", markup=False)


def _faults(report: Report) -> Table:
    table = Table(title="faults, and seconds until everything worked again: p50 and max of those that were alone")
    table.add_column("kind", no_wrap=True)
    for heading in ("faults", "alone", "from fault", "max", "from heal", "max"):
        table.add_column(heading, justify="right")
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in report.faults:
        by_kind[record.kind].append(record)
    for kind, records in sorted(by_kind.items()):
        alone = [record for record in records if record.alone]
        table.add_row(
            kind,
            str(len(records)),
            str(len(alone)),
            *_times([record.from_fault for record in alone]),
            *_times([record.from_heal for record in alone]),
        )
    together = [record for record in report.faults if not record.alone]
    table.add_section()
    table.add_row("two at once", str(len(together)), "", "", "", *_times([record.from_heal for record in together]))
    return table


def _times(seconds: Iterable[float | None]) -> tuple[str, str]:
    known = [each for each in seconds if each is not None]
    return (f"{median(known):.1f}", f"{max(known):.1f}") if known else ("", "")
