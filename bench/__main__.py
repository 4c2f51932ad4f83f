"""Measure the service against bare floors and what one would use instead: ``make bench``, ``python -m bench``."""

import asyncio
import importlib
import logging
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import report
from bench.harness import LeftOutError, Options, Row, RowResult, Target, environment, host, say
from local.process import ROOT
from shared.process import configure_logging
from tests.cluster import throw_away_servers

MODULES = ("writes", "reads", "projection", "rebuild", "growth", "recovery", "transactions")
"""In `bench.rows`; each has `ROWS`: the numbers of the targets that a row measures, as ``4,5`` → the row."""


def main(
    *,
    only: Annotated[str, typer.Option(help="Rows to measure, as 1,3; all if not given. 0 is the floors alone.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often each candidate has its turn.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny numbers, one round: only to see that it runs.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what OUT has of the rows not measured now.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json, README.md and the plots.")] = (
        ROOT / "docs" / "benchmarks"
    ),
) -> None:
    """Measure, and write what was found. Ends with 1 if a row could not be measured."""
    configure_logging("bench")
    for chatty in ("httpx", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # httpx logs each request
    options = Options(rounds=1 if quick else rounds, quick=quick)
    wanted = {number.strip() for number in only.split(",") if number.strip()}
    broken = asyncio.run(_measure(_rows(wanted), options, out, keep=keep))
    if broken:
        raise typer.Exit(1)


def _rows(wanted: set[str]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name in MODULES:
        module: Mapping[str, Row] = importlib.import_module(f"bench.rows.{name}").ROWS
        rows |= module
    if unknown := wanted - {number for key in rows for number in key.split(",")}:
        raise typer.BadParameter(f"there is no row {', '.join(sorted(unknown))}")
    ordered = sorted(rows.items(), key=lambda row: int(row[0].split(",")[0]))
    return {key: row for key, row in ordered if not wanted or wanted & {*key.split(",")}}


async def _measure(rows: Mapping[str, Row], options: Options, out: Path, *, keep: bool) -> bool:
    with throw_away_servers() as servers:
        machine = await environment(servers)
    for line in report.machine_lines(machine):
        say(line)
    results: dict[str, Any] = {"environment": machine, "options": {"rounds": options.rounds, "quick": options.quick}}
    results["rows"] = report.load(out) if keep else {}
    broken, started = False, time.monotonic()
    for key, row in rows.items():
        say(f"row {key}")
        began, load_before = time.monotonic(), host()["load_average"]
        try:
            result = await row(options)
        except LeftOutError as error:
            result = RowResult([_not_measured(key, str(error))], {}, [str(error)])
            broken = True
        except Exception as error:  # noqa: BLE001 - the other rows are measured all the same
            traceback.print_exc()
            result = RowResult([_not_measured(key, f"{type(error).__name__}: {error}")], {}, [repr(error)])
            broken = True
        for target in result.targets:
            say(f"  {target.number} {'met' if target.met else 'NOT MET'}: {target.what}: {target.measured}")
        results["rows"][key] = report.row(result, machine["commit"], load_before, time.monotonic() - began)
        report.write(out, results)
    say(f"written to {out} after {(time.monotonic() - started) / 60:.0f} minutes")
    return broken


def _not_measured(key: str, why: str) -> Target:
    return Target(key, "not measured", "", why.splitlines()[0] if why else "it broke off", met=False)


if __name__ == "__main__":
    typer.run(main)
