"""What the projector's commands show: progress, and what they came to."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from projector.generations import Generation, Verified
from projector.rebuild import Rebuilt
from projector.verify import Report, Verdict


@contextmanager
def reporting(*, as_json: bool) -> Iterator[Report]:
    """A progress bar per phase on a terminal, lines elsewhere, JSON lines where that is asked for. All on stderr."""
    if as_json or not sys.stderr.isatty():
        said: dict[str, int] = {}

        def tell(phase: str, done: int, of: int) -> None:
            step = min(20, 20 * done // of) if of else 20
            if said.get(phase) != step:
                said[phase] = step
                line = {"phase": phase, "done": done, "of": of}
                text = json.dumps(line) if as_json else f"{phase}: {done} of {of}"
                typer.echo(text, err=True)

        yield tell
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        phases: dict[str, TaskID] = {}

        def show(phase: str, done: int, of: int) -> None:
            if phase not in phases:
                phases[phase] = bars.add_task(phase, total=of)
            bars.update(phases[phase], completed=done, total=max(of, done))

        yield show


def show_rebuilt(rebuilt: Rebuilt) -> None:
    """What was built, how fast, and what is kept."""
    verb = "is in use" if rebuilt.switched else "was built, verified and dropped again"
    rate = rebuilt.verdict.events / rebuilt.load_seconds if rebuilt.load_seconds else 0
    typer.echo(
        f"generation {rebuilt.generation} {verb}: {rebuilt.verdict.events} events in {rebuilt.load_seconds:.1f} s "
        f"({rate:,.0f}/s), and every document is as the log says"
    )
    if rebuilt.switched:
        typer.echo(f"generation {rebuilt.previous} is kept up to date: `rollback` returns to it, `drop` removes it")


def show_verdict(verdict: Verdict) -> None:
    """What the collections hold, what differs, and what to do about it."""
    shown = Table("collection", "documents", "content hash", title=f"generation {verdict.generation}, by the log")
    for collection, content in verdict.content.items():
        shown.add_row(collection, str(content.documents), content.hash)
    Console().print(shown)
    typer.echo(f"{verdict.events} events, and {verdict.dropped} records of replaced writers that did not happen")
    for finding in verdict.findings:
        typer.echo(f"LOG  {finding}")
    for each in verdict.differences:
        typer.echo(f"{each.kind.upper()}  {each.collection}/{each.key}  of {each.stream}")
        for name, (wanted, found) in each.fields.items():
            typer.echo(f"    {name}: must be {wanted}, is {found}")
    if verdict.different:
        streams = sorted({each.stream for each in verdict.differences if each.stream})
        typer.echo(
            f"{verdict.different} documents differ. `history STREAM` shows how they came to be; "
            f"`rebuild --stream STREAM` mends a stream in place ({', '.join(streams[:5])}…), `rebuild` all of them"
        )
    elif verdict.good:
        typer.echo("every document is as the log says")


def show_generations(found: Sequence[Generation]) -> None:
    """One line each."""
    shown = Table("generation", "state", "position", "documents", "size", "made", "content hash when last verified")
    for each in found:
        position = sum(checkpoint.cursor.position for checkpoint in each.checkpoints.values())
        state = "in use" if each.in_use else {"live": "kept up to date"}.get(each.state, each.state)
        made = f"{each.created_at:%Y-%m-%d %H:%M:%S}"
        size = decimal(each.bytes)
        shown.add_row(str(each.number), state, str(position), str(each.documents), size, made, _verified(each.verified))
    Console().print(shown)


def _verified(verified: Verified | None) -> str:
    if verified is None:
        return "not verified yet"
    what = verified.hash or "it differed from the log"
    return f"{what}, at position {verified.position}, {verified.at:%Y-%m-%d %H:%M:%S}"


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f}/s")
