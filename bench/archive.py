"""Export, check and import of a log, each as the tool that an operator runs: events/s, and the most memory.

    python -m bench.archive [--events 100000]

Starts its own Kafka. The times are of the whole process, from its start.
"""

import argparse
import asyncio
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared.archive.files import read_manifest
from shared.kafka import open_producer
from shared.settings import EVENTS, KafkaSettings
from tests.cluster import throw_away_servers
from tests.event_log import History, PartitionLog
from tests.topics import remake_topics


async def preload(kafka: KafkaSettings, events: int) -> None:
    """Half projects API, half batches of 100; about 300 bytes of text each; in one partition."""
    await remake_topics(kafka, 1)
    log = PartitionLog()
    history = History(log, random.Random(1), namespaces=50, tenants=50, content_bytes=300)  # noqa: S311
    async with open_producer(kafka) as producer:
        while log.position < events:
            for _ in range(50):
                history.step()
            history.record(100)
            for key, value in log.records:
                await producer.send(EVENTS, value, key=key, partition=0)
            log.records.clear()
            log.commits.clear()
        await producer.flush()


def run(kafka: KafkaSettings, command: str, folder: Path) -> tuple[float, float, int]:
    """Seconds, seconds of a core, and the most memory in MiB."""
    argv = [sys.executable, "-m", "shared.archive", command, str(folder)]
    env = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers}
    began, cpu_before, kib = time.perf_counter(), cpu_of_children(), 0
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        # getrusage would tell of this process too, from which that one was forked.
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        kib = int(found[1]) if found else kib
        time.sleep(0.02)
    assert process.returncode == 0, command
    return time.perf_counter() - began, cpu_of_children() - cpu_before, kib // 1024


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    events: int = parser.parse_args().events
    with throw_away_servers() as servers, tempfile.TemporaryDirectory() as made:
        kafka, folder = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap), Path(made) / "archive"
        asyncio.run(preload(kafka, events))
        for command in ("export", "check", "import"):
            if command == "import":
                asyncio.run(remake_topics(kafka, 4))
            seconds, cpu, mib = run(kafka, command, folder)
            done = read_manifest(folder).events
            print(f"{command:<7}{seconds:6.1f} s {done / seconds:9,.0f}/s {done / cpu:9,.0f}/s of a core {mib:5} MiB")
        manifest = read_manifest(folder)
        size = sum(entry.bytes for entry in manifest.files)
        print(f"{manifest.events:,} events, {size / 2**20:.1f} MiB, {size / manifest.events:.0f} bytes an event")


if __name__ == "__main__":
    main()
