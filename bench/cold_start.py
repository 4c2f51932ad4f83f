"""How fast an ingestor without local state makes it again from the log.

    python -m bench.cold_start [--events 300000] [--days 90] [--rounds 3]

Starts its own Kafka and fills one partition with what the real rules make of a mixed history: half of the events from
the projects API, half from batches, over streams of very different size; half of the commands with an Idempotency-Key.
Each round recovers in a fresh process. ``--days`` is the span of the history: receipts that nobody can ask for any more
are not made again. ``--profile`` prints where the time goes instead.
"""

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from msgspec import Raw

from ingestor.recovery import recover
from ingestor.state import Checkpoint, open_state
from ingestor.tenure import Tenure
from shared.codec import encode_record
from shared.commands import Command, EpisodeFields, EpisodeItem, PatchEpisode, RecordEpisodes, UpsertEpisode
from shared.events import LoggedFence, WriterFenced
from shared.ids import CommandId
from shared.kafka import open_producer
from shared.log import Cursor
from shared.process import configure_logging, run_process
from shared.settings import EVENTS, KafkaSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import throw_away_servers
from tests.fakes import InMemoryStateStore

RETENTION = timedelta(days=7)
STREAMS = 1_000
RECORDS_PER_BATCH = 500

Record = tuple[bytes | None, bytes, datetime]


def commands(random: random.Random) -> Iterator[Command]:
    """Without end. Streams are Zipf-skewed."""
    weights = [1 / rank for rank in range(1, STREAMS + 1)]
    made: list[list[str]] = [[] for _ in range(STREAMS)]
    number = 0
    while True:
        for stream in random.choices(range(STREAMS), weights, k=1_000):
            number += 1
            common: dict[str, Any] = {
                "command_id": CommandId(f"01980e5a-7c00-7000-8000-{number:012d}"),
                "actor": "alice",
                "request_hash": "0123456789abcdef0123456789abcdef",
                "idempotency_key": f"request-{number}" if random.random() < 0.5 else None,
            }
            if number % 26 == 0:
                items = tuple(
                    EpisodeItem(
                        content="The arm drifted by two degrees and was calibrated again. " * 4,
                        source="notes",
                        metadata=Raw(b'{"priority":"high"}'),
                        idempotency_key=f"item-{number}-{index}" if random.random() < 0.2 else None,
                    )
                    for index in range(25)
                )
                yield RecordEpisodes(tenant_id=f"tenant-{stream}", items=items, **common)
                continue
            fields = EpisodeFields(
                description="What the arm did between noon and one. " * 4,
                tags=("arm", "calibration"),
                status=random.choice(("running", "completed", "failed")),
                metadata=Raw(b'{"seed":%d,"rate":0.5}' % number),
            )
            place: dict[str, Any] = {"namespace": f"team-{stream}", "project": "robotics", **common}
            if made[stream] and random.random() < 0.5:
                yield PatchEpisode(name=random.choice(made[stream]), fields=fields, **place)
            else:
                made[stream].append(f"run-{number}")
                yield UpsertEpisode(name=made[stream][-1], fields=fields, owner=True, **place)


class _Store(InMemoryStateStore):
    def forget_receipts(self, before: datetime) -> None:
        """Nothing: the fake would look through all there are after every batch."""


def history(events: int, days: float) -> list[Record]:
    """The records of one tenure with so many events, which ends now."""
    now = datetime.now(UTC)
    fence = WriterFenced("bench", "first")
    records: list[Record] = [(None, encode_record(LoggedFence(fence), at=now), now - timedelta(days=days))]
    tenure = Tenure(_Store(), Checkpoint(Cursor(1, 0), "first", -1), RETENTION)
    for offset, command in enumerate(commands(random.Random(1))):  # noqa: S311
        at = now - timedelta(days=days) * max(0.0, 1 - len(records) / events)
        tenure.decide(command, command_offset=offset, at=at, reply_to=None)
        if tenure.open_bytes > 200_000 or len(records) >= events:
            batch = tenure.close_batch()
            tenure.settle(batch, len(records))
            tenure.store(batch)
            records += batch.records
            if len(records) > events:
                return records
    raise AssertionError


async def preload(kafka: KafkaSettings, records: list[Record]) -> None:
    await create_topics(kafka, TopicSettings(partitions=1))
    async with open_producer(kafka, batch_bytes=8 * 1024**2) as producer:
        for first in range(0, len(records), RECORDS_PER_BATCH):
            builder = producer.create_batch()
            for key, value, at in records[first : first + RECORDS_PER_BATCH]:
                builder.append(key=key, value=value, timestamp=round(at.timestamp() * 1000))
            builder.close()
            await (await producer.send_batch(builder, EVENTS, partition=0))


async def recover_once(kafka: KafkaSettings, askable_since: datetime) -> dict[str, float]:
    """Play an ingestor that comes to an empty disk, up to where its first command would be decided."""
    with tempfile.TemporaryDirectory() as folder, open_state(Path(folder), 0, map_bytes=64 * 1024**3) as store:
        fence = WriterFenced("bench", str(uuid.uuid4()))
        async with open_producer(kafka) as producer:
            appended = await producer.send_and_wait(
                EVENTS, encode_record(LoggedFence(fence), at=datetime.now(UTC)), partition=0
            )
        cpu, began = time.process_time(), time.perf_counter()
        recovery = await recover(
            kafka,
            store,
            0,
            fence=fence,
            fence_offset=appended.offset,
            askable_since=askable_since,
            report=lambda _: None,
        )
        return {
            "events": recovery.events,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mib": _peak_mib(),
            "state_mib": (Path(folder) / "partition-0" / "data.mdb").stat().st_size / 1024**2,
        }


def _peak_mib() -> float:
    # not getrusage: what the parent used when it forked counts there
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return float(kib) / 1024


async def _report(askable_since: datetime) -> None:
    print(json.dumps(await recover_once(KafkaSettings(), askable_since)))


def main(events: int, days: float, rounds: int, *, profile: bool) -> None:
    records = history(events, days)
    size = sum(len(value) for _, value, _ in records) / len(records)
    print(f"{len(records)} records, {size:.0f} bytes each, over {days:g} days")
    askable_since = datetime.now(UTC) - RETENTION
    with throw_away_servers() as servers:
        kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap)
        asyncio.run(preload(kafka, records))
        records.clear()
        if profile:
            profiler = cProfile.Profile()
            profiler.runcall(asyncio.run, recover_once(kafka, askable_since))
            pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
            return
        rates = []
        for _ in range(rounds):
            command = [sys.executable, "-m", "bench.cold_start", "--recover", askable_since.isoformat()]
            env = {**os.environ, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            rates.append(found["events"] / found["cpu_seconds"])
            print(
                f"{found['events'] / found['seconds']:8.0f} events/s   {rates[-1]:8.0f} per CPU second"
                f"   peak {found['peak_mib']:.0f} MiB   state {found['state_mib']:.0f} MiB"
            )
    print(f"median {statistics.median(rates):.0f} events per CPU second, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--days", type=float, default=90)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--recover", type=datetime.fromisoformat, help=argparse.SUPPRESS)
    options = parser.parse_args()
    configure_logging("bench")
    if options.recover:
        run_process(lambda: _report(options.recover))
    else:
        main(options.events, options.days, options.rounds, profile=options.profile)
