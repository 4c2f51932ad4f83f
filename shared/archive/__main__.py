"""Backup and restore of the event log."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shared.archive.export import export_log
from shared.archive.files import Manifest
from shared.archive.restore import check_archive, import_archive
from shared.errors import EpisodesError
from shared.ids import StreamId
from shared.settings import EVENTS, KafkaSettings

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The archive: a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")]

_PLAIN_SECONDS = 5.0
_BAR_SECONDS = 0.1


@app.command("export")
def export_command(
    folder: Folder,
    *,
    stream: Annotated[
        str | None, typer.Option(help="Only this stream: namespace:<slug> or tenant:<tenant_id>.", metavar="S")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what is in the log now into a new folder, while everything runs."""
    with _Reporter() as report:
        manifest = _run("export", export_log(KafkaSettings(), folder, StreamId(stream) if stream else None, report))
    _tell(manifest, f"exported to {folder}", as_json=as_json)


@app.command("check")
def check_command(folder: Folder, *, as_json: AsJson = False) -> None:
    """Read all of an archive, and exit with 1 if it is not what was exported."""

    async def check() -> Manifest:
        return check_archive(folder, report)

    with _Reporter() as report:
        manifest = _run("check", check())
    _tell(manifest, f"in {folder}, all as they were exported", as_json=as_json)


@app.command("import")
def import_command(folder: Folder, *, as_json: AsJson = False) -> None:
    """Bring an archive into an empty log. No ingestor may run until this is done."""
    with _Reporter() as report:
        manifest = _run("import", import_archive(KafkaSettings(), folder, report))
    _tell(manifest, f"imported into {EVENTS}: the ingestors may start", as_json=as_json)


class _Reporter:
    """Progress on stderr: a bar per file on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        pause = _PLAIN_SECONDS if self._bars.disable else _BAR_SECONDS
        self._began.setdefault(what, now)
        if now - self._told < pause and done < total:
            return
        self._told = now
        rate = f"{done / max(now - self._began[what], 0.001):,.0f}"
        if not self._bars.disable:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, rate=rate)
            self._bars.update(self._tasks[what], completed=done, total=total, rate=rate)
        else:
            typer.echo(f"{what}: {done:,} of {total:,}, {rate}/s", err=True)


def _run(command: str, work: Coroutine[Any, Any, Manifest]) -> Manifest:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what it says is in the error
    try:
        return asyncio.run(work)
    except (EpisodesError, OSError) as error:
        typer.echo(f"python -m shared.archive {command}: {error}", err=True)
        raise typer.Exit(1) from None


def _tell(manifest: Manifest, what: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.encode(manifest).decode())
    else:
        typer.echo(f"{manifest.events:,} events, {manifest.records - manifest.events:,} kept answers {what}")


if __name__ == "__main__":
    app()
