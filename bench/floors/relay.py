"""The bare way of a write: HTTP → Kafka → relay → Kafka → HTTP, with the hops of the service and nothing else.

    python -m bench.floors.relay gateway --bootstrap HOST:PORT --port 9000
    python -m bench.floors.relay relay --bootstrap HOST:PORT [--split]

``POST /{key}`` publishes the body under that key to `COMMANDS` and answers with what comes
back on `REPLIES`. The relay copies each command to the same partition of `EVENTS`, waits for the acknowledgement, and
replies. With ``--split`` it writes one record for each item of the body's ``episodes``, in one record batch. Nothing is
checked, kept or numbered, and nobody is asked who they are. Both processes run as ours do: uvloop, httptools, the
interpreter and the allocator tuned alike.
"""

import argparse
import asyncio
import itertools
import json
from collections.abc import Sequence

import msgspec
import uvicorn
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shared.process import tune_allocator, tune_interpreter

COMMANDS, EVENTS, REPLIES = "bare.commands", "bare.events", "bare.replies"
SPLIT_COMMANDS, SPLIT_EVENTS, SPLIT_REPLIES = "split.commands", "split.events", "split.replies"
REPLY_PARTITION = 0
LARGEST = 64 * 1024 * 1024


class Batch(msgspec.Struct):
    """A body, as far as it is looked at."""

    episodes: list[msgspec.Raw]


def make_producer(bootstrap: str) -> AIOKafkaProducer:
    """acks=all, idempotent, and batches as large as the service's."""
    return AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        linger_ms=0,
        max_batch_size=900_000,
        max_request_size=LARGEST,
    )


def make_consumer(bootstrap: str) -> AIOKafkaConsumer:
    """Without a group; its caller assigns the partitions."""
    return AIOKafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, max_partition_fetch_bytes=4 * 1024 * 1024
    )


class Gateway:
    """Bodies in, replies out."""

    def __init__(self, bootstrap: str, topics: Sequence[str]) -> None:
        self._bootstrap = bootstrap
        self._commands, _, self._replies = topics
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._ids = itertools.count()

    async def serve(self, port: int) -> None:
        self._producer = make_producer(self._bootstrap)
        consumer = make_consumer(self._bootstrap)
        await self._producer.start()
        await consumer.start()
        partition = TopicPartition(self._replies, REPLY_PARTITION)
        consumer.assign([partition])
        await consumer.seek_to_end(partition)
        await consumer.position(partition)
        app = Starlette(routes=[Route("/{key}", self.post, methods=["POST"]), Route("/healthz", self.health)])
        config = uvicorn.Config(
            app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_config=None, access_log=False
        )
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._listen(consumer))
            await uvicorn.Server(config).serve()
            listening.cancel()

    async def health(self, _: Request) -> Response:
        return Response(b"{}", media_type="application/json")

    async def post(self, request: Request) -> Response:
        body = await request.body()
        correlation = b"%d" % next(self._ids)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = reply
        headers = [("correlation", correlation)]
        key = request.path_params["key"].encode()
        await self._producer.send(self._commands, body, key, headers=headers)
        return Response(await reply, 201, media_type="application/json")

    async def _listen(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            for records in (await consumer.getmany(timeout_ms=1_000)).values():
                for record in records:
                    waiting = self._waiting.pop(record.key, None)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(record.value)


class Relay:
    """Commands in, events and replies out."""

    def __init__(self, bootstrap: str, topics: Sequence[str], *, split: bool) -> None:
        self._bootstrap = bootstrap
        self._commands, self._events, self._replies = topics
        self._split = split

    async def run(self) -> None:
        self._producer = make_producer(self._bootstrap)
        consumer = make_consumer(self._bootstrap)
        await self._producer.start()
        await consumer.start()
        numbers = await self._producer.partitions_for(self._commands)
        partitions = [TopicPartition(self._commands, number) for number in numbers]
        consumer.assign(partitions)
        await consumer.seek_to_end(*partitions)
        for partition in partitions:
            await consumer.position(partition)
        print("ready", flush=True)
        async with asyncio.TaskGroup() as tasks:
            while True:
                for partition, records in (await consumer.getmany(timeout_ms=1_000)).items():
                    sent = [await self._append(record) for record in records]
                    tasks.create_task(self._reply(records, sent, partition))

    async def _append(self, record: ConsumerRecord) -> "asyncio.Future[object]":
        if not self._split:
            sent: asyncio.Future[object] = await self._producer.send(
                self._events, record.value, record.key, partition=record.partition
            )
            return sent
        builder = self._producer.create_batch()
        for item in msgspec.json.decode(record.value, type=Batch).episodes:
            builder.append(key=record.key, value=bytes(item), timestamp=None)
        builder.close()
        together: asyncio.Future[object] = await self._producer.send_batch(
            builder, self._events, partition=record.partition
        )
        return together

    async def _reply(
        self, records: Sequence[ConsumerRecord], sent: Sequence["asyncio.Future[object]"], partition: TopicPartition
    ) -> None:
        for record, future in zip(records, sent, strict=True):
            await future
            answer = json.dumps({"partition": partition.partition, "offset": record.offset}).encode()
            await self._producer.send(self._replies, answer, record.headers[0][1], partition=REPLY_PARTITION)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("gateway", "relay"))
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--split", action="store_true", help="one record for each item")
    options = parser.parse_args()
    topics = (SPLIT_COMMANDS, SPLIT_EVENTS, SPLIT_REPLIES) if options.split else (COMMANDS, EVENTS, REPLIES)
    if options.part == "gateway":
        await Gateway(options.bootstrap, topics).serve(options.port)
    else:
        await Relay(options.bootstrap, topics, split=options.split).run()


if __name__ == "__main__":
    tune_interpreter()
    tune_allocator()
    uvloop.run(main())
