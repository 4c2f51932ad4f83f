"""``python -m ingestor``: settings → probes, replies, one writer per partition of ours."""

import asyncio

import structlog

from ingestor.replies import open_replies
from ingestor.settings import IngestorSettings
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
        writer = Writer(kafka, settings, replies, status)
        await supervise(
            kafka,
            topic=COMMANDS,
            group="episodes-ingestor",
            instance_id=settings.instance_id,
            status=status,
            run_partition=writer.run,
        )


if __name__ == "__main__":
    configure_logging("ingestor")
    run_process(_main)
