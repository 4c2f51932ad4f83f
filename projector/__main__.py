"""The projector: ``run`` keeps the read models up to date with the log, ``status`` says how far they are."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Annotated

import msgspec
import structlog
import typer
from rich.console import Console

from projector.documents import DocumentStore, open_documents, prepare_generation
from projector.loop import run as run_partition
from projector.settings import ProjectorSettings
from projector.status import GROUP, ProjectorStatus, read_status, table
from shared.errors import Unavailable
from shared.mongo import Client, open_mongo
from shared.probes import Status, serve_probes
from shared.process import configure_logging, run_process
from shared.settings import EVENTS, KafkaSettings, MongoSettings, ProbeSettings
from shared.supervisor import backoff, supervise

_log = structlog.get_logger(__name__)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run() -> None:
    """Apply the events of the partitions that are ours, until stopped."""
    configure_logging("projector")
    run_process(_run)


@app.command()
def status(
    *, as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False
) -> None:
    """Show how far each partition is, and exit with 1 unless all of them go on."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what it says is in the error
    found = asyncio.run(_status())
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        Console().print(table(found))
    if not found.good:
        raise typer.Exit(1)


async def _run() -> None:
    settings, kafka = ProjectorSettings(), KafkaSettings()
    status = Status()
    _log.info("projector starts", instance_id=settings.instance_id, kafka=kafka.bootstrap_servers)
    async with open_mongo(MongoSettings()) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_probes(status, host=ProbeSettings().host, port=settings.probe_port))
        generation = await _wait_for_generation(client, status)

        def documents_of(partition: int) -> AbstractAsyncContextManager[DocumentStore]:
            return open_documents(client, generation, partition)

        async def run_one(partition: int) -> None:
            await run_partition(
                partition,
                kafka=kafka,
                open_documents=documents_of,
                status=status,
                max_events=settings.max_batch_events,
            )

        await supervise(
            kafka,
            topic=EVENTS,
            group=GROUP,
            instance_id=settings.instance_id,
            status=status,
            run_partition=run_one,
        )


async def _wait_for_generation(client: Client, status: Status) -> int:
    attempt = 0
    status.waiting_for["mongodb"] = "it has not answered yet"
    while True:
        try:
            generation = await prepare_generation(client)
        except Unavailable as error:
            status.waiting_for["mongodb"] = str(error)
            _log.warning("waiting for MongoDB", reason=str(error))
            attempt += 1
            await asyncio.sleep(backoff(attempt))
        else:
            del status.waiting_for["mongodb"]
            _log.info("read models are ready", generation=generation)
            return generation


async def _status() -> ProjectorStatus:
    try:
        return await read_status(KafkaSettings(), MongoSettings())
    except Unavailable as error:
        typer.echo(f"python -m projector status: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
