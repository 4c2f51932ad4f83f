"""``python -m ingestor``: settings → probes, replies, snapshots, one writer per partition of ours."""

import asyncio

import structlog

from ingestor.replies import open_replies
from ingestor.settings import IngestorSettings
from ingestor.snapshot_store import open_snapshot_store
from ingestor.snapshots import Snapshots
from ingestor.writer import Writer
from shared.probes import Status, serve_probes
from shared.process import configure_logging, run_process
from shared.settings import COMMANDS, KafkaSettings, ProbeSettings
from shared.supervisor import supervise

_log = structlog.get_logger(__name__)


async def _main() -> None:
    settings, kafka = IngestorSettings(), KafkaSettings()
    status = Status()
    _log.info("ingestor starts", instance_id=settings.instance_id, kafka=kafka.bootstrap_servers)
    async with open_replies(kafka) as replies, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_probes(status, host=ProbeSettings().host, port=settings.probe_port))
        writer = Writer(kafka, settings, replies, status, _snapshots(settings))
        await supervise(
            kafka,
            topic=COMMANDS,
            group="episodes-ingestor",
            instance_id=settings.instance_id,
            status=status,
            run_partition=writer.run,
        )


def _snapshots(settings: IngestorSettings) -> Snapshots | None:
    if settings.snapshot_url is None:
        return None
    store = open_snapshot_store(settings.snapshot_url)
    return Snapshots(store, every=settings.snapshot_every, ahead=settings.snapshot_ahead)


if __name__ == "__main__":
    configure_logging("ingestor")
    run_process(_main)
