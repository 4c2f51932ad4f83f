"""The live projector on a log that is full already, beside bare transactions with the same documents, in turns.

    python -m bench.projector [--events 100000] [--rounds 3]

Starts its own Kafka and MongoDB. One partition, so nothing but the projector's own pipelining helps it.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from functools import partial
from typing import Any

from pymongo import InsertOne, ReplaceOne

from projector import generations
from projector.commits import CommitSource
from projector.documents import open_documents
from projector.fold import Writes, fold, found, touched_by
from projector.loop import run
from projector.views import no_documents
from shared.kafka import open_partition, open_producer
from shared.log import Cursor
from shared.mongo import DURABLE, META, Client, ReadConcern, generation_database, open_mongo
from shared.probes import Status
from shared.process import tune_interpreter
from shared.read_models import CHECKPOINTS
from shared.settings import EVENTS, KafkaSettings, MongoSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import throw_away_servers
from tests.event_log import History, PartitionLog

BATCH = 1_000


def a_log(events: int) -> PartitionLog:
    """Half projects API, half batches of 100; about 500 bytes of text each."""
    log = PartitionLog()
    history = History(log, random.Random(1), namespaces=50, tenants=50, content_bytes=300)  # noqa: S311
    while log.position < events:
        for _ in range(50):
            history.step()
        history.record(100)
    return log


async def preload(kafka: KafkaSettings, log: PartitionLog) -> None:
    await create_topics(kafka, TopicSettings(partitions=1))
    async with open_producer(kafka) as producer:
        for sent in [await producer.send(EVENTS, value, key=key, partition=0) for key, value in log.records]:
            await sent


def batches(log: PartitionLog) -> list[Writes]:
    """What the projector writes for the log in full batches."""
    documents, result, waiting, events = no_documents(), [], [], 0
    for commit in log.commits:
        waiting.append(commit)
        events += len(commit.events)
        if events >= BATCH or commit is log.commits[-1]:
            before = found(touched_by(waiting), Writes({}, {}), _only(documents, touched_by(waiting)))
            writes = fold(before, waiting)
            for part in (writes.new, writes.changed):
                for name, there in part.items():
                    documents[name].update(there)
            result.append(writes)
            waiting, events = [], 0
    return result


def _only(documents: Any, touches: Any) -> Any:
    return {
        name: {key: documents[name][key] for key in keys if key in documents[name]} for name, keys in touches.items()
    }


async def bare(client: Client, prepared: list[Writes]) -> tuple[float, float]:
    """One transaction per batch with a checkpoint in it, and nothing else: the floor."""
    await _empty(client)
    database = client[generation_database(1)]
    cpu, began = time.process_time(), time.perf_counter()
    async with await client.start_session() as session:
        for number, writes in enumerate(prepared):
            async with session.start_transaction(ReadConcern("snapshot"), DURABLE):
                await database[CHECKPOINTS].update_one(
                    {"_id": 0}, {"$set": {"position": number}}, upsert=True, session=session
                )
                for name in writes.new:
                    requests = [InsertOne(one) for one in writes.new[name].values()] + [
                        ReplaceOne({"_id": key}, one) for key, one in writes.changed[name].items()
                    ]
                    if requests:
                        await database[name].bulk_write(requests, ordered=False, session=session)
    return time.perf_counter() - began, time.process_time() - cpu


async def projector(client: Client, kafka: KafkaSettings, log: PartitionLog) -> tuple[float, float]:
    """Seconds from the start of the loop until all is applied, and CPU seconds of this process."""
    await _empty(client)
    cpu, began = time.process_time(), time.perf_counter()
    loop = asyncio.create_task(
        run(0, kafka=kafka, open_documents=partial(open_documents, client, 1), status=Status(), max_events=BATCH)
    )
    checkpoints = client[generation_database(1)][CHECKPOINTS]
    while not await checkpoints.find_one({"_id": 0, "position": log.position}):
        if loop.done():
            loop.result()
        await asyncio.sleep(0.02)
    took = time.perf_counter() - began, time.process_time() - cpu
    loop.cancel()
    await asyncio.wait([loop])
    return took


async def reading(kafka: KafkaSettings, log: PartitionLog) -> float:
    """Fetching and decoding alone."""
    began = time.perf_counter()
    async with open_partition(kafka, EVENTS, 0) as consumer:
        source = CommitSource(consumer, 0, Cursor())
        while (await source.take(max_events=BATCH, max_bytes=10**8)).cursor.position < log.position:
            pass
    return time.perf_counter() - began


async def _empty(client: Client) -> None:
    await client.drop_database(generation_database(1))
    await client.drop_database(META)
    await generations.prepare(client)


async def main(events: int, rounds: int) -> None:
    log = a_log(events)
    prepared = batches(log)
    writes = sum(len(there) for one in prepared for part in (one.new, one.changed) for there in part.values())
    tune_interpreter()  # as the processes do; and the collector should not walk through what only this bench holds
    size = sum(len(value) for _, value in log.records)
    each = size / log.position
    print(f"{log.position} events, {each:.0f} bytes each, {writes} document writes in {len(prepared)} batches")
    with throw_away_servers() as servers:
        kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap)
        await preload(kafka, log)
        async with open_mongo(MongoSettings(url=servers.mongodb_url)) as client:
            floors, ours = [], []
            for _ in range(rounds):
                seconds, bare_cpu = await bare(client, prepared)
                floors.append(log.position / seconds)
                seconds, cpu = await projector(client, kafka, log)
                ours.append(log.position / seconds)
                alone = log.position / await reading(kafka, log)
                print(
                    f"bare {floors[-1]:6.0f}/s, projector {ours[-1]:6.0f}/s ({ours[-1] / floors[-1]:.2f}), "
                    f"CPU {bare_cpu / log.position * 1e6:.1f} and {cpu / log.position * 1e6:.1f} µs/event, "
                    f"reading alone {alone:6.0f}/s"
                )
    print(
        f"median: bare {statistics.median(floors):.0f}/s, projector {statistics.median(ours):.0f}/s, "
        f"ratio {statistics.median(ours) / statistics.median(floors):.2f}, load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    asyncio.run(main(options.events, options.rounds))
