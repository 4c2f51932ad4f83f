"""The chaos suite: clients work on a real service while everything that can break is broken, and nothing may be wrong.

`python -m tests.chaos --duration 900 --seed 1`. Exits with 1 if anything was found.
"""

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import uvloop
from rich.console import Console

from local.process import ROOT
from tests.chaos.faults import QUICK, Pace
from tests.chaos.report import show
from tests.chaos.stack import Layout
from tests.chaos.suite import Options, kinds_of, run

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    *,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of faults.")] = 900,
    seed: Annotated[int | None, typer.Option(help="Of the clients and the faults; the time if not given.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="That work at once.")] = 12,
    only: Annotated[str, typer.Option(help="Kinds of faults, or beginnings of their names, with commas.")] = "",
    quick: Annotated[bool, typer.Option(help="Short faults and short rests.")] = False,
    brokers: Annotated[int, typer.Option(help="Nodes of Kafka: 1 or 3.")] = 1,
    members: Annotated[int, typer.Option(help="Members of MongoDB's replica set: 1 or 3.")] = 1,
    code: Annotated[Path, typer.Option(help="The folder with the service's packages.")] = ROOT,
    report: Annotated[Path | None, typer.Option(help="Where to write the report, as JSON.")] = None,
) -> None:
    """Run the suite."""
    kinds = [name for name in only.split(",") if name]
    try:
        kinds_of(kinds)
    except LookupError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from None
    options = Options(
        seconds=duration,
        seed=int(time.time()) if seed is None else seed,
        clients=clients,
        only=kinds,
        pace=QUICK if quick else Pace(),
        layout=Layout(brokers=brokers, members=members, code=code.resolve()),
    )
    result = uvloop.run(run(options))
    console = Console()
    show(result, console if console.is_terminal else Console(width=120))
    if report is not None:
        report.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    raise typer.Exit(1 if result.findings else 0)


if __name__ == "__main__":
    app()
