"""aiokafka's producer alone: records of 500 bytes into a topic, acks=all and idempotent, as fast as it takes them.

    python -m bench.floors.producer --bootstrap HOST:PORT --topic NAME --seconds 5 [--records 1000]

Without ``--records`` each record is sent by itself, and aiokafka makes the batches; with it, so many at a time are put
into explicit record batches, one in flight for each partition. Runs as our processes do: uvloop, the interpreter and
the allocator tuned alike. Prints JSON: records a second, CPU seconds per 1,000.
"""

import argparse
import asyncio
import json
import time
from collections import deque

import uvloop
from aiokafka import AIOKafkaProducer

from bench.floors.relay import make_producer
from shared.process import tune_allocator, tune_interpreter

BYTES = 500
_IN_FLIGHT = 4_000


async def singly(producer: AIOKafkaProducer, topic: str, seconds: float) -> int:
    """Send record after record; how many were acknowledged."""
    value, sent, until = b"x" * BYTES, 0, time.perf_counter() + seconds
    waiting: deque[asyncio.Future[object]] = deque()
    while time.perf_counter() < until:
        waiting.append(await producer.send(topic, value))
        sent += 1
        while len(waiting) > _IN_FLIGHT:
            await waiting.popleft()
    for future in waiting:
        await future
    return sent


async def in_batches(producer: AIOKafkaProducer, topic: str, seconds: float, records: int) -> int:
    """Send explicit record batches; how many records were acknowledged."""
    value, until = b"x" * BYTES, time.perf_counter() + seconds

    async def fill(partition: int) -> int:
        sent = 0
        while time.perf_counter() < until:
            builder = producer.create_batch()
            for _ in range(records):
                builder.append(key=None, value=value, timestamp=None)
            builder.close()
            await (await producer.send_batch(builder, topic, partition=partition))
            sent += records
        return sent

    return sum(await asyncio.gather(*map(fill, await producer.partitions_for(topic))))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--records", type=int, default=0)
    options = parser.parse_args()
    producer = make_producer(options.bootstrap)
    await producer.start()
    try:
        cpu, began = time.process_time(), time.perf_counter()
        if options.records:
            sent = await in_batches(producer, options.topic, options.seconds, options.records)
        else:
            sent = await singly(producer, options.topic, options.seconds)
        rate = sent / (time.perf_counter() - began)
        print(json.dumps({"rate": rate, "cpu": (time.process_time() - cpu) / sent * 1_000}))
    finally:
        await producer.stop()


if __name__ == "__main__":
    tune_interpreter()
    tune_allocator()
    uvloop.run(main())
