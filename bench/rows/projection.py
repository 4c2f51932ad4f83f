"""Row 6: the live projector on a log that is full already, beside bare transactions and what one would use instead."""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from pymongo import IndexModel, MongoClient

from bench.floors import bulk
from bench.harness import LeftOutError, Options, Row, RowResult, Sample, Target, interleave, median_of, ratio_of, say
from bench.peers.mongo_connector import peer as connector
from bench.peers.quix import peer as quix
from local.process import ROOT
from projector import generations
from projector.commits import CommitSource
from projector.fold import Writes, fold, found, touched_by
from projector.loop import run
from projector.mongodb import open_documents
from projector.views import INDEXES, no_documents
from shared.kafka import client_options, open_partition, open_producer
from shared.log import Cursor
from shared.mongo import META, generation_database, open_mongo
from shared.probes import Status
from shared.process import configure_logging, run_process
from shared.read_models import CHECKPOINTS, PROJECT_EPISODES
from shared.settings import EVENTS, KafkaSettings, MongoSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import ThrowAwayServers, throw_away_servers
from tests.event_log import History, PartitionLog

Candidate = Callable[[], Coroutine[Any, Any, Sample]]

BATCH = 1_000
PEER_TOPIC, PEER_DATABASE, PEER_COLLECTION = "bench.documents", "peer", "episodes"
LAST_KEY = "the-last-one"

OURS, FLOOR, READING = "projector", "bare transactions", "reading and decoding alone"
QUIX, QUIX_BARE, CONNECTOR = "Quix MongoDBSink", "Quix MongoDBSink without indexes", "MongoDB Kafka sink connector"
PEERS = (QUIX, QUIX_BARE, CONNECTOR)
_CHILD_SECONDS = 300.0


class PeerError(Exception):
    """A peer failed; the message says which, and how."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name


def a_log(events: int) -> PartitionLog:
    """Half projects API, half batches, of which half are of 100, the others of up to five; 300 bytes of text each."""
    log = PartitionLog()
    history = History(log, random.Random(1), namespaces=50, tenants=50, content_bytes=300)  # noqa: S311
    while log.position < events:
        for _ in range(200):
            history.step()
        history.record(100)
    return log


async def preload(kafka: KafkaSettings, log: PartitionLog) -> int:
    """Write the log, and the topic of the peers; how many records that has.

    The peers get the same values in the same order under the key that their upserts are made with: the document's.
    """
    await create_topics(kafka, TopicSettings(partitions=1))
    admin = AIOKafkaAdminClient(**client_options(kafka))
    await admin.start()
    try:
        await admin.create_topics([NewTopic(PEER_TOPIC, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()
    decoder, records = msgspec.json.Decoder(), 0
    async with open_producer(kafka) as producer:
        sent = [await producer.send(EVENTS, value, key=key, partition=0) for key, value in log.records]
        for key, value in log.records:
            if key is not None:
                subject = decoder.decode(value)["subject"]
                sent.append(await producer.send(PEER_TOPIC, value, key=subject.encode(), partition=0))
                records += 1
        sent.append(await producer.send(PEER_TOPIC, b'{"data":{"id":"last"}}', key=LAST_KEY.encode(), partition=0))
        for each in sent:
            await each
    return records + 1


def batches(log: PartitionLog) -> list[bulk.Batch]:
    """What the projector writes for the log in full batches."""
    documents, result, waiting, events = no_documents(), [], [], 0
    for commit in log.commits:
        waiting.append(commit)
        events += len(commit.events)
        if events >= BATCH or commit is log.commits[-1]:
            touches = touched_by(waiting)
            writes = fold(found(touches, Writes({}, {}), _only(documents, touches)), waiting)
            for part in (writes.new, writes.changed):
                for name, there in part.items():
                    documents[name].update(there)
            result.append(bulk.Batch(writes.new, writes.changed))
            waiting, events = [], 0
    return result


def _only(documents: Any, touches: Any) -> Any:
    return {
        name: {key: documents[name][key] for key in keys if key in documents[name]} for name, keys in touches.items()
    }


class Bench:
    """The candidates, on one Kafka and one MongoDB that are filled already."""

    def __init__(self, servers: ThrowAwayServers, events: int, peer_records: int) -> None:
        self.servers = servers
        self._events = events
        self._peer_records = peer_records

    async def bare(self) -> Sample:
        """The floor: one transaction a batch, with a checkpoint in it, in a process of its own."""
        await self._empty()
        return await self._child("write")

    async def projector(self) -> Sample:
        """Ours: `projector.loop.run` in a process of its own."""
        await self._empty()
        return await self._child("project")

    async def reading(self) -> Sample:
        """Fetching and decoding alone, in a process of its own."""
        return await self._child("read")

    async def quix(self, python: Path, *, indexes: bool) -> Sample:
        """Quix Streams' sink."""
        await self._empty_peer(indexes=indexes)
        servers = self.servers
        done = await quix.project(
            python,
            servers.kafka_bootstrap,
            servers.mongodb_url,
            PEER_TOPIC,
            PEER_DATABASE,
            PEER_COLLECTION,
            self._peer_records,
        )
        self._check_peer()
        return self._sample(self._peer_records, done.seconds, done.cpu)

    async def connector(self, worker: connector.Worker) -> Sample:
        """MongoDB's connector."""
        await self._empty_peer(indexes=True)
        done = await worker.project(PEER_TOPIC, PEER_DATABASE, PEER_COLLECTION, self._peer_records, last_key=LAST_KEY)
        self._check_peer()
        return self._sample(done.records, done.seconds, done.cpu)

    def _sample(self, events: int, seconds: float, cpu: float) -> Sample:
        return Sample(events / seconds, 1000 * cpu / events)

    async def _child(self, what: str) -> Sample:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.rows.projection", what, str(self._events)),
            env={**os.environ, **self.servers.env},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_CHILD_SECONDS):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, what
        return self._sample(self._events, **json.loads(printed))

    async def _empty(self) -> None:
        async with open_mongo(MongoSettings(url=self.servers.mongodb_url)) as client:
            await client.drop_database(generation_database(1))
            await client.drop_database(META)
            await generations.prepare(client)
            await client.admin.command("fsync")  # nobody pays for what the round before left to be written

    async def _empty_peer(self, *, indexes: bool) -> None:
        """Drop what the peer wrote; give its collection the indexes of our episodes, which tenants' are not in."""
        async with open_mongo(MongoSettings(url=self.servers.mongodb_url)) as client:
            await client.drop_database(PEER_DATABASE)
            await client.drop_database(generation_database(1))
            collection = client[PEER_DATABASE][PEER_COLLECTION]
            if indexes:
                project_only = {"project_id": {"$exists": True}}
                await collection.create_indexes(
                    [IndexModel([*each], partialFilterExpression=project_only) for each in INDEXES[PROJECT_EPISODES]]
                )
            await client.admin.command("fsync")

    def _check_peer(self) -> None:
        with MongoClient[bulk.Document](self.servers.mongodb_url) as client:
            assert client[PEER_DATABASE][PEER_COLLECTION].find_one({"_id": LAST_KEY}), "the peer did not write all"


@contextlib.asynccontextmanager
async def open_bench(events: int) -> AsyncIterator[Bench]:
    """Servers with so many events in them."""
    log = a_log(events)
    with throw_away_servers() as servers:
        records = await preload(KafkaSettings(bootstrap_servers=servers.kafka_bootstrap), log)
        bench = Bench(servers, log.position, records)
        say(f"  {log.position:,} events of {_size(log):,.0f} bytes")
        del log
        yield bench


def _size(log: PartitionLog) -> float:
    return sum(len(value) for _, value in log.records) / log.position


async def projection(options: Options) -> RowResult:
    """The projector alone: as fast as bare transactions of the same documents, nearly; faster than the peers."""
    notes, configuration = [*_NOTES], {QUIX: quix.CONFIGURATION, CONNECTOR: connector.CONFIGURATION}
    async with contextlib.AsyncExitStack() as stack:
        bench = await stack.enter_async_context(open_bench(options.count(100_000, 5_000)))
        candidates: dict[str, Candidate] = {FLOOR: bench.bare, OURS: bench.projector}
        try:
            python = await asyncio.to_thread(quix.install)
            candidates[QUIX] = partial(_peer, QUIX, partial(bench.quix, python, indexes=True))
            candidates[QUIX_BARE] = partial(_peer, QUIX_BARE, partial(bench.quix, python, indexes=False))
        except LeftOutError as error:
            notes.append(f"Left out: {error}")
        try:
            jars = await asyncio.to_thread(connector.install)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            worker = await stack.enter_async_context(
                connector.open_worker(jars, bench.servers.kafka_bootstrap, bench.servers.mongodb_url, folder)
            )
            candidates[CONNECTOR] = partial(_peer, CONNECTOR, partial(bench.connector, worker))
        except LeftOutError as error:
            notes.append(f"Left out: {error}")
        candidates[READING] = bench.reading
        samples = await _in_turns(candidates, options.rounds, notes)
    return RowResult(_targets(samples), samples, notes, configuration, unit="events")


async def _peer(name: str, candidate: Candidate) -> Sample:
    """A peer's sample.

    Raises:
        PeerError: it failed.
    """
    try:
        return await candidate()
    except (LeftOutError, AssertionError, httpx.HTTPError) as error:
        raise PeerError(name, f"{type(error).__name__}: {error}") from error


async def _in_turns(candidates: dict[str, Candidate], rounds: int, notes: list[str]) -> dict[str, list[Sample]]:
    """Each peer once uncounted, then all in turns. Without a peer that fails all begin anew, and a note says so."""
    while True:
        try:
            for name in [peer for peer in PEERS if peer in candidates]:
                await candidates[name]()
            return await interleave(candidates, rounds)
        except PeerError as error:
            say(f"  left out: {error}")
            notes.append(f"Left out: {error}")
            del candidates[error.name]


_NOTES = (
    (
        "One partition, so nothing but the projector's own pipelining helps it. CPU seconds are those of the process "
        "that projects; for the floor, of the one that writes, whose interpreter is tuned as the projector's is and "
        "which has all batches in memory before its time begins."
    ),
    (
        "The peers read the same values from a topic of their own, under the document's id as key, and upsert the "
        "event's `data`, at least once. They fold nothing, keep no counters, no versions and no position beside the "
        "documents, and write one collection where the projector keeps seven up to date. The first gets the "
        "indexes that our episodes have (project, name; project, ordinal); *without indexes* has only `_id`."
    ),
    (
        "A peer's time begins with its first record (Quix) or its first visible documents (the connector), so that "
        "starting up and joining a group are not in it; the projector's begins before it connects."
    ),
)


def _targets(samples: Mapping[str, list[Sample]]) -> list[Target]:
    floor = ratio_of(samples[OURS], samples[FLOOR])
    rate = f"{median_of(samples[OURS]).text()} events/s"
    targets = [
        Target(
            "6a",
            "projector alone, beside bare bulk in a transaction",
            "≥ 0.8 x",
            f"{floor.text('.2f')} x ({rate})",
            met=floor.median >= 0.8,
        )
    ]
    if QUIX in samples:
        ratio = ratio_of(samples[OURS], samples[QUIX])
        measured = f"{ratio.text('.2f')} x"
        if QUIX_BARE in samples:
            measured += f"; {ratio_of(samples[OURS], samples[QUIX_BARE]).text('.2f')} x the sink without the indexes"
        targets.append(
            Target("6b", "projector alone, beside the Quix sink", "≥ 1.2 x", measured, met=ratio.median >= 1.2)
        )
    else:
        targets.append(Target("6b", "projector alone, beside the Quix sink", "≥ 1.2 x", "not measured", met=False))
    return targets


ROWS: Mapping[str, Row] = {"6": projection}


async def _write(events: int) -> dict[str, float]:
    """The batches of the same log, from memory."""
    prepared = batches(a_log(events))
    gc.freeze()  # the projector has no such heap for the collector to walk
    with MongoClient[bulk.Document](MongoSettings().url, tz_aware=True) as client:
        cpu, began = time.process_time(), time.perf_counter()
        bulk.write(client, generation_database(1), prepared)
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


async def _project(events: int) -> dict[str, float]:
    """From the start of the loop until all is applied."""
    async with open_mongo(MongoSettings()) as client:
        checkpoints = client[generation_database(1)][CHECKPOINTS]
        cpu, began = time.process_time(), time.perf_counter()
        loop = asyncio.create_task(
            run(
                0,
                kafka=KafkaSettings(),
                open_documents=partial(open_documents, client, 1),
                status=Status(),
                max_events=BATCH,
            )
        )
        while not await checkpoints.find_one({"_id": 0, "position": events}):
            if loop.done():
                loop.result()
            await asyncio.sleep(0.02)
        took = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        loop.cancel()
        await asyncio.wait([loop])
    return took


async def _read(events: int) -> dict[str, float]:
    cpu, began = time.process_time(), time.perf_counter()
    async with open_partition(KafkaSettings(), EVENTS, 0) as consumer:
        source, position = CommitSource(consumer, 0, Cursor()), 0
        while position < events:
            portion = await source.take(max_events=BATCH, max_bytes=10**8)
            if portion.end is not None:
                raise portion.end.error
            position = portion.cursor.position
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


RUNS: Mapping[str, Callable[[int], Coroutine[Any, Any, dict[str, float]]]] = {
    "write": _write,
    "project": _project,
    "read": _read,
}


async def _report(what: str, events: int) -> None:
    print(json.dumps(await RUNS[what](events)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One run of a candidate, in the process that `Bench` starts for it.")
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("events", type=int)
    given = parser.parse_args()
    configure_logging("bench")
    run_process(lambda: _report(given.what, given.events))
