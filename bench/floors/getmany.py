"""aiokafka's `getmany` alone: how fast a topic is read from its start, with nothing done to the records.

    python -m bench.floors.getmany --bootstrap HOST:PORT --topic NAME

Runs as our processes do: uvloop, the interpreter and the allocator tuned alike. Prints JSON: records a second, CPU
seconds per 1,000.
"""

import argparse
import json
import time

import uvloop
from aiokafka import TopicPartition

from bench.floors.relay import make_consumer
from shared.process import tune_allocator, tune_interpreter


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    options = parser.parse_args()
    consumer = make_consumer(options.bootstrap)
    await consumer.start()
    try:
        await consumer.topics()
        partitions = [TopicPartition(options.topic, each) for each in consumer.partitions_for_topic(options.topic)]
        left = sum((await consumer.end_offsets(partitions)).values())
        consumer.assign(partitions)
        for partition in partitions:  # before aiokafka itself begins to look for where the end is
            consumer.seek(partition, 0)
        cpu, began, read = time.process_time(), time.perf_counter(), 0
        while read < left:
            read += sum(map(len, (await consumer.getmany(timeout_ms=1_000)).values()))
        rate = read / (time.perf_counter() - began)
        print(json.dumps({"rate": rate, "cpu": (time.process_time() - cpu) / read * 1_000}))
    finally:
        await consumer.stop()


if __name__ == "__main__":
    tune_interpreter()
    tune_allocator()
    uvloop.run(main())
