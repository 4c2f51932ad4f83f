"""The projector: keeps the read models up to date with the log, builds them anew, and proves that they are right."""

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
import typer
from rich.console import Console

from projector import generations
from projector.background import verify_on
from projector.console import reporting, show_generations, show_rebuilt, show_verdict
from projector.following import Following
from projector.history import history as read_history
from projector.rebuild import RebuildFailed, RebuildRunning
from projector.rebuild import rebuild as run_rebuild
from projector.repair import NothingToRepair, Repaired
from projector.repair import repair as run_repair
from projector.settings import ProjectorSettings
from projector.status import GROUP, read_status, table
from projector.verify import Report, Verdict
from projector.verify import verify as run_verify
from projector.views import INDEXES
from shared.errors import EpisodesError
from shared.ids import StreamId
from shared.mongo import Client, open_mongo
from shared.probes import Status, serve_probes
from shared.process import configure_logging, run_process
from shared.settings import EVENTS, KafkaSettings, MongoSettings, ProbeSettings
from shared.supervisor import supervise

_log = structlog.get_logger(__name__)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_CORES = os.cpu_count() or 1
_INTERRUPTED = 130
"""The exit status that shells give to what Ctrl-C ended."""

AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text for people.")]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes.")]
Folder = Annotated[Path | None, typer.Option(help="Where to spill the log to; about as large as the log.")]


@app.command()
def run() -> None:
    """Apply the events of the partitions that are ours, until stopped."""
    configure_logging("projector")
    run_process(_run)


@app.command()
def status(*, as_json: AsJson = False) -> None:
    """Show how far each partition is, and exit with 1 unless all of them go on."""
    found = _ask(lambda: read_status(KafkaSettings(), MongoSettings()))
    if as_json:
        _print_json(found)
    else:
        Console().print(table(found))
    if not found.good:
        raise typer.Exit(1)


@app.command()
def rebuild(
    *,
    throttle: Annotated[
        int | None, typer.Option(min=0, help="Hold still while the read models in use are more records behind.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Build and verify, then drop it again.")] = False,
    views: Annotated[list[str] | None, typer.Option(help=f"Mend only these, in place: {', '.join(INDEXES)}.")] = None,
    stream: Annotated[str | None, typer.Option(help="Mend only this stream, in place.")] = None,
    workers: Workers = _CORES,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Build the next generation from the start of the log while the present one serves, verify it, and switch to it.

    Interrupted, it goes on where it was when it is called again. With --stream or --views, mends in place what differs.
    """
    unknown = set(views or ()) - set(INDEXES)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(INDEXES)}", param_hint="--views")
    place = folder or Path(tempfile.gettempdir()) / "episodes-rebuild"  # it outlives us, so that another run goes on
    with reporting(as_json=as_json) as report:
        if stream is None and views is None:
            rebuilt = _ask(
                lambda: _with_mongo(
                    lambda client: run_rebuild(
                        client,
                        MongoSettings(),
                        KafkaSettings(),
                        place,
                        workers=workers,
                        most_lag=throttle,
                        dry_run=dry_run,
                        report=report,
                    )
                )
            )
            mended = None
        else:
            rebuilt = None
            with _spilling_to(folder) as spare:
                mended = _ask(lambda: _with_mongo(lambda client: _mend(client, spare, workers, report, stream, views)))
    if as_json:
        _print_json(rebuilt if rebuilt is not None else mended)
    elif rebuilt is not None:
        show_rebuilt(rebuilt)
    else:
        for each in mended or ():
            typer.echo(f"{each.stream}: {each.missing} put back, {each.different} mended, {each.extra} removed")
        if not mended:
            typer.echo("nothing differs")


@app.command()
def verify(
    *,
    generation: Annotated[int | None, typer.Option(help="Which one; that in use if not given.")] = None,
    workers: Workers = _CORES,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Replay the log and compare it with the read models, document by document. Exits with 1 if anything differs."""
    with _spilling_to(folder) as place, reporting(as_json=as_json) as report:
        verdict = _ask(lambda: _with_mongo(lambda client: _verify(client, generation, place, workers, report)))
    if as_json:
        _print_json(verdict)
    else:
        show_verdict(verdict)
    if not verdict.good:
        raise typer.Exit(1)


@app.command("generations")
def list_generations(*, as_json: AsJson = False) -> None:
    """List the generations: which is in use, and how far each is."""
    found = _ask(lambda: _with_mongo(generations.all_generations))
    if as_json:
        _print_json(found)
        return
    show_generations(found)


@app.command()
def rollback() -> None:
    """Let readers see the generation again that was in use before the present one."""
    old, new = _ask(lambda: _with_mongo(generations.roll_back))
    typer.echo(f"generation {new} is in use again; {old} is kept up to date")


@app.command()
def drop(number: Annotated[int, typer.Argument(help="The generation.")]) -> None:
    """Remove a generation, never the one in use."""
    _ask(lambda: _with_mongo(lambda client: generations.drop(client, number)))
    typer.echo(f"generation {number} is gone")


@app.command()
def history(
    stream: Annotated[str, typer.Argument(help="namespace:<slug> or tenant:<tenant_id>")],
    *,
    subject: Annotated[str | None, typer.Option(help="Only this: an id, or a name that it has or had.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a stream, or one thing in it, came to be: every event, who asked for it, and what it changed."""

    async def show() -> None:
        async for entry in read_history(KafkaSettings(), StreamId(stream), subject):
            if as_json:
                _print_json(entry)
            else:
                typer.echo(
                    f"{entry.at:%Y-%m-%d %H:%M:%S.%f}  event {entry.event_id}  {entry.type}  {entry.subject}\n"
                    f"    {entry.command} {entry.command_id} by {entry.actor}\n"
                    f"    {json.dumps(entry.changed, ensure_ascii=False)}"
                )

    _ask(show)


async def _run() -> None:
    settings, kafka = ProjectorSettings(), KafkaSettings()
    status = Status()
    _log.info("projector starts", instance_id=settings.instance_id, kafka=kafka.bootstrap_servers)
    async with open_mongo(MongoSettings()) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_probes(status, host=ProbeSettings().host, port=settings.probe_port))
        following = Following(client, kafka, settings, status)
        await following.begin()
        tasks.create_task(following.look_on())
        if settings.verify_every:
            tasks.create_task(verify_on(settings.verify_every, status))
        await supervise(
            kafka,
            topic=EVENTS,
            group=GROUP,
            instance_id=settings.instance_id,
            status=status,
            run_partition=following.run_partition,
        )


async def _with_mongo(work: Callable[[Client], Coroutine[Any, Any, Any]]) -> Any:
    async with open_mongo(MongoSettings()) as client:
        return await work(client)


async def _verify(client: Client, generation: int | None, place: Path, workers: int, report: Report) -> Verdict:
    number = await generations.in_use(client) if generation is None else generation
    return await run_verify(client, KafkaSettings(), number, place, workers=workers, report=report)


async def _mend(
    client: Client, place: Path, workers: int, report: Report, stream: str | None, views: list[str] | None
) -> list[Repaired]:
    number = await generations.in_use(client)
    collections = tuple(views or INDEXES)

    async def mend(streams: set[str]) -> list[Repaired]:
        return [
            await run_repair(client, KafkaSettings(), number, StreamId(each), collections) for each in sorted(streams)
        ]

    if stream is not None:
        return await mend({stream})
    repaired: list[Repaired] = []
    while True:
        spare = Path(tempfile.mkdtemp(dir=place))
        verdict = await run_verify(
            client, KafkaSettings(), number, spare, workers=workers, report=report, collections=collections
        )
        mended = await mend({each.stream for each in verdict.differences if each.stream is not None})
        repaired += mended
        if verdict.different == len(verdict.differences) or not any(
            each.missing or each.different or each.extra for each in mended
        ):
            return repaired


def _ask(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What the work comes to; or its error as one sentence, and status 1."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what it says is in the error
    _take_sigterm_for_ctrl_c()
    try:
        return asyncio.run(work())
    except RebuildFailed as error:
        if error.verdict is not None:
            show_verdict(error.verdict)
        reason = error
    except (RebuildRunning, NothingToRepair, EpisodesError) as error:
        reason = error  # type: ignore[assignment]
    except KeyboardInterrupt:
        typer.echo(f"python -m projector {sys.argv[1]}: interrupted; call it again to go on", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(f"python -m projector {sys.argv[1]}: {reason}", err=True)
    raise typer.Exit(1)


def _take_sigterm_for_ctrl_c() -> None:
    """Have what was spilled cleared away. A shell's ``&`` has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


@contextmanager
def _spilling_to(folder: Path | None) -> Iterator[Path]:
    """An empty folder to spill to, in ``folder`` if one is given, until this is over."""
    _take_sigterm_for_ctrl_c()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="episodes-replay-", dir=folder, ignore_cleanup_errors=True) as made:
        yield Path(made)


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.encode(value, enc_hook=str).decode())


if __name__ == "__main__":
    app()
