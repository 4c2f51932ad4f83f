"""Kafka clients with the settings that this service relies on, and Kafka's errors in our words.

aiokafka's defaults lose data (acks=1, "latest", auto-commit) or speed (16 kB batches); no client is built elsewhere.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar, copy_context
from datetime import datetime
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import aiokafka.conn
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import (
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    ProducerClosed,
    RecordListTooLargeError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.helpers import create_ssl_context
from aiokafka.partitioner import DefaultPartitioner, murmur2

from shared.errors import RecordsLost, Unavailable
from shared.settings import KafkaSettings

REQUEST_TIMEOUT_MS = 5_000
MAX_RECORD_BYTES = 64 * 1024 * 1024
SESSION_TIMEOUT_MS = 10_000
_METADATA_MS = 30_000
"""How old what a client knows of leaders and brokers may become. Not every answer that they have changed is told us."""
_SILENCE_SECONDS = 10.0
_UNANSWERED_SECONDS = 20.0
"""Longer than Kafka takes to name another leader for one that is frozen (9 s), and than two requests that time out."""
_LONGEST_LOOK_SECONDS = 1.0
_STOP_SECONDS = 5.0

_log = structlog.get_logger(__name__)

_made: ContextVar["WeakSet[_Connection] | None"] = ContextVar("made", default=None)

_BUGS = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidTopicError)


class _Connection(aiokafka.conn.AIOKafkaConnection):  # type: ignore[misc]  # aiokafka has no types
    """One that knows how uvloop tells that a connection is lost: by a RuntimeError for the next write to it.

    aiokafka takes that for a bug, until it has noticed the loss itself: the task that keeps its metadata up to date
    ends for good, and requests fail with what says nothing (https://github.com/aio-libs/aiokafka/issues/1038).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if (made := _made.get()) is not None:
            made.add(self)

    def send(self, request: Any, expect_response: bool = True) -> Any:  # noqa: FBT001, FBT002 - aiokafka's signature
        if self._writer is not None and self._writer.is_closing():
            self.close(reason=aiokafka.conn.CloseReason.CONNECTION_BROKEN)
        return super().send(request, expect_response)


aiokafka.conn.AIOKafkaConnection = _Connection


@lru_cache(4096)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a key, for ever: what Kafka's producers choose by default."""
    return int(murmur2(key) & 0x7FFFFFFF) % partitions


def _partitioner(key: bytes | None, partitions: Sequence[int], available: Sequence[int]) -> int:
    if key is None:
        return DefaultPartitioner()(key, partitions, available)  # type: ignore[no-any-return]
    return partitions[partition_of(key, len(partitions))]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise Kafka's errors in our words. ``what`` names the action for the person who reads the message.

    Raises:
        RecordsLost: records that are still needed are gone from the topic.
        Unavailable: Kafka does not answer, or not as it should.
    """
    try:
        yield
    except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
        raise RecordsLost(f"{what}: {error}") from error
    except _BUGS:
        raise
    except UnknownTopicOrPartitionError as error:
        raise Unavailable(f"{what}: the topic does not exist yet (run python -m shared.topics)") from error
    except (KafkaError, TimeoutError, OSError) as error:
        raise Unavailable(f"{what}: {str(error) or type(error).__name__}") from error


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """What every aiokafka client needs to connect."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "metadata_max_age_ms": _METADATA_MS,
    }
    if "SSL" in settings.security_protocol:
        options["ssl_context"] = create_ssl_context(cafile=settings.ssl_cafile)
    if settings.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.sasl_password,
        }
    return options


@asynccontextmanager
async def open_producer(
    settings: KafkaSettings,
    *,
    batch_bytes: int = 900_000,
    idempotent: bool = True,
    compression: str | None = "zstd",
) -> AsyncIterator[AIOKafkaProducer]:
    """A started producer with acks=all.

    Leaving with an error, or by cancellation, drops what is not sent yet: an idempotent aiokafka producer would
    otherwise keep on trying for ever, and the command would happen long after its caller was told otherwise.

    Raises:
        Unavailable: Kafka does not answer.
    """
    producer = AIOKafkaProducer(
        **client_options(settings),
        acks="all",
        enable_idempotence=idempotent,
        linger_ms=0,
        compression_type=compression,
        max_batch_size=batch_bytes,
        max_request_size=MAX_RECORD_BYTES,
        partitioner=_partitioner,
        retry_backoff_ms=50,
    )
    try:
        with translated("connecting a producer"):
            await _started(producer.start(), REQUEST_TIMEOUT_MS / 1000)
        yield producer
    except BaseException:
        await _abandon(producer)
        raise
    await producer.stop()


async def _started(start: Coroutine[Any, Any, None], seconds: float) -> None:
    made: WeakSet[_Connection] = WeakSet()
    context = copy_context()
    context.run(_made.set, made)
    starting = asyncio.get_running_loop().create_task(start, context=context)
    try:
        async with asyncio.timeout(seconds):
            await asyncio.shield(starting)  # a cancellation that arrives in there may be lost
    except BaseException:
        starting.cancel()
        try:
            if await _ended(starting):
                starting.exception()  # else asyncio complains that nobody looked at it
        finally:
            for connection in made:  # what aiokafka was just opening it forgets, and leaves open
                connection.close()
        raise


async def _abandon(producer: AIOKafkaProducer) -> None:
    # stop() alone flushes first, and waits for ever when Kafka is away; there is no public way around it.
    sender_task = producer._sender.sender_task  # noqa: SLF001
    if sender_task is not None:
        sender_task.cancel()
        await asyncio.wait([sender_task], timeout=2 * REQUEST_TIMEOUT_MS / 1000)
    waiting = producer._message_accumulator  # noqa: SLF001
    # Batches about to be tried again are missing here, and aiokafka stumbles over that when they fail.
    waiting._pending_batches |= {  # noqa: SLF001
        batch
        for batches in waiting._batches.values()  # noqa: SLF001
        for batch in batches
        if batch.retry_count
    }
    waiting.fail_all(ProducerClosed())
    await _stop(producer, producer.client)


async def partitions_of(producer: AIOKafkaProducer, topic: str) -> int:
    """How many partitions the topic has.

    Raises:
        Unavailable: Kafka does not answer, or has no such topic.
    """
    with translated(f"looking up {topic}"):
        async with asyncio.timeout(2 * REQUEST_TIMEOUT_MS / 1000):
            return len(await producer.partitions_for(topic))


async def append_together(
    producer: AIOKafkaProducer,
    topic: str,
    partition: int,
    records: Iterable[tuple[bytes | None, bytes, datetime]],
) -> "asyncio.Future[Any]":
    """Send keys, values and times as one record batch: all are appended or none is. The future is its metadata.

    Raises:
        Unavailable: Kafka does not take it.
    """
    builder = producer.create_batch()
    for key, value, at in records:
        if builder.append(key=key, value=value, timestamp=round(at.timestamp() * 1000)) is None:
            raise AssertionError(f"a record of {len(value)} bytes does not fit any more into one record batch")
    builder.close()
    with translated(f"appending to {topic}/{partition}"):
        return await producer.send_batch(builder, topic, partition=partition)  # type: ignore[no-any-return]


@asynccontextmanager
async def open_partition(settings: KafkaSettings, topic: str, partition: int) -> AsyncIterator[AIOKafkaConsumer]:
    """A started consumer of one partition, without a group. The caller seeks before the first read.

    Raises:
        Unavailable: Kafka does not answer.
    """
    async with open_consumer(settings, f"{topic}/{partition}") as consumer:
        consumer.assign([TopicPartition(topic, partition)])
        yield consumer


@asynccontextmanager
async def open_consumer(
    settings: KafkaSettings, what: str, *, longest_poll_ms: int = 500
) -> AsyncIterator[AIOKafkaConsumer]:
    """A started consumer of ``what``, without a group. Its caller assigns the partitions.

    An offset out of range is an error, never a silent jump.

    Raises:
        Unavailable: Kafka does not answer.
    """
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=4 * 1024 * 1024,
        fetch_max_wait_ms=longest_poll_ms,
        retry_backoff_ms=50,
    )
    try:
        with translated(f"connecting a consumer of {what}"):
            await _started(consumer.start(), REQUEST_TIMEOUT_MS / 1000)
        yield consumer
    finally:
        await _stop_consumer(consumer)


class Pulse:
    """Notices that Kafka no longer answers the fetches of a partition.

    aiokafka does not tell: while nothing comes it may be asking a broker that refuses each time, or not be asking at
    all since one of its tasks ended. The time of the last answer, with records or without, moves on otherwise.
    """

    def __init__(self, consumer: AIOKafkaConsumer, topic: str, partition: int) -> None:
        self._consumer = consumer
        self._partition = TopicPartition(topic, partition)
        self._answered_at: int | None = None
        self._looked_at = time.monotonic()
        self._silence = 0.0

    def look(self) -> None:
        """Look, about once a second while records are wanted and none come.

        Raises:
            Unavailable: for 20 seconds of ours there was no answer. A time when this process stood still is not ours.
        """
        now, answered_at = time.monotonic(), self._consumer.last_poll_timestamp(self._partition)
        if answered_at != self._answered_at:
            self._answered_at, self._silence = answered_at, 0.0
        else:
            self._silence += min(now - self._looked_at, _LONGEST_LOOK_SECONDS)
        self._looked_at = now
        if self._silence >= _UNANSWERED_SECONDS:
            topic, partition = self._partition
            raise Unavailable(f"reading {topic}/{partition}: Kafka does not answer")


async def _stop_consumer(consumer: AIOKafkaConsumer) -> None:
    await _stop(consumer, consumer._fetcher, consumer._client)  # noqa: SLF001


async def _stop(client: AIOKafkaConsumer | AIOKafkaProducer, *parts: Any) -> None:
    """Stop the client; if that does not work, close at least its parts."""
    # With a broker away, aiokafka lets the cancellation of its own fetch out and leaves its client open. In our task
    # that would look as if somebody had cancelled us, and the task would end without a word. And a member of a group
    # first ends what it has begun with the group's coordinator, however long that takes.
    stopping = asyncio.ensure_future(client.stop())
    try:
        await asyncio.wait([stopping], timeout=_STOP_SECONDS)
    finally:
        if not stopping.done():
            _log.warning("a client of Kafka does not stop by itself", client=type(client).__name__, after=_STOP_SECONDS)
        if await _ended(stopping):
            stopping.result()
        else:
            for part in parts:
                if part is not None:
                    await _ended(asyncio.ensure_future(part.close()), _STOP_SECONDS)


async def _close(client: AIOKafkaClient | AIOKafkaAdminClient) -> None:
    closing = asyncio.ensure_future(client.close())  # a cancellation that arrives in there is lost
    if await _ended(closing, _STOP_SECONDS):  # TLS says good-bye for up to 30 s
        closing.result()


async def _ended(task: "asyncio.Future[Any]", seconds: float = 0.0) -> bool:
    """Give the task so long, then cancel it. Whether it came to its end."""
    await asyncio.wait([task], timeout=seconds)
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_STOP_SECONDS)
    return task.done() and not task.cancelled()


@asynccontextmanager
async def open_client(settings: KafkaSettings, topic: str, *, timeout_ms: int) -> AsyncIterator[AIOKafkaClient]:
    """A connection for questions of whether Kafka answers, and who leads the topic's partitions.

    Raises:
        Unavailable: Kafka does not answer.
    """
    client = AIOKafkaClient(**client_options(settings) | {"request_timeout_ms": timeout_ms})
    try:
        with translated("connecting to Kafka"):
            await _started(client.bootstrap(), REQUEST_TIMEOUT_MS / 1000)
        client.set_topics([topic])
        yield client
    finally:
        await _close(client)


@asynccontextmanager
async def open_admin(settings: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started client for what concerns topics and groups.

    Raises:
        Unavailable: Kafka does not answer.
    """
    admin = AIOKafkaAdminClient(**client_options(settings))
    try:
        with translated("connecting to Kafka"):
            await _started(admin.start(), 2 * REQUEST_TIMEOUT_MS / 1000)
        yield admin
    finally:
        await _close(admin)


async def describe_topic(settings: KafkaSettings, topic: str) -> tuple[str | None, int]:
    """Kafka's id of the cluster, if it tells, and the topic's number of partitions.

    Raises:
        Unavailable: Kafka does not answer, or has no such topic.
    """
    async with open_admin(settings) as admin:
        with translated(f"asking Kafka for {topic}"):
            cluster = await admin.describe_cluster()
            [described] = await admin.describe_topics([topic])
            if described["error_code"]:
                raise for_code(described["error_code"])
    return cluster.get("cluster_id"), len(described["partitions"])


async def starts(consumer: AIOKafkaConsumer, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """Partition → offset of the first record that is still there.

    Raises:
        Unavailable: Kafka does not answer.
    """
    return await _offsets(consumer.beginning_offsets, topic, partitions)


async def ends(consumer: AIOKafkaConsumer, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """Partition → offset of its next record.

    Raises:
        Unavailable: Kafka does not answer.
    """
    return await _offsets(consumer.end_offsets, topic, partitions)


async def _offsets(
    ask: Callable[[list[TopicPartition]], Awaitable[dict[TopicPartition, int]]], topic: str, partitions: Iterable[int]
) -> dict[int, int]:
    with translated(f"finding the ends of {topic}"):
        async with asyncio.timeout(REQUEST_TIMEOUT_MS / 1000):
            found = await ask([TopicPartition(topic, number) for number in partitions])
    return {tp.partition: offset for tp, offset in found.items()}


async def read_to(
    consumer: AIOKafkaConsumer, topic: str, partition: int, start: int, end: int
) -> AsyncIterator[Sequence[ConsumerRecord]]:
    """The records from offset ``start`` on that are before ``end``, as many at a time as Kafka sends.

    Raises:
        RecordsLost: ``start`` is no longer there.
        Unavailable: Kafka does not answer.
    """
    tp, what = TopicPartition(topic, partition), f"reading {topic}/{partition}"
    consumer.seek(tp, start)
    heard = time.monotonic()
    while start < end:
        with translated(what):
            taken = await consumer.getmany(tp, timeout_ms=500, max_records=1_000)
        if records := taken.get(tp):
            yield [record for record in records if record.offset < end]
            start, heard = records[-1].offset + 1, time.monotonic()
        elif time.monotonic() - heard > _SILENCE_SECONDS:
            raise Unavailable(f"{what}: nothing came for {_SILENCE_SECONDS} s")


@asynccontextmanager
async def open_membership(
    settings: KafkaSettings, topic: str, group: str, instance_id: str, listener: ConsumerRebalanceListener
) -> AsyncIterator[AIOKafkaConsumer]:
    """A started member of the consumer group ``group`` that says which partitions should be ours. It reads nothing.

    Raises:
        Unavailable: Kafka does not answer.
    """
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        group_id=group,
        group_instance_id=instance_id,
        enable_auto_commit=False,
        auto_offset_reset="latest",  # its partitions are paused: it never reads
        session_timeout_ms=SESSION_TIMEOUT_MS,
        heartbeat_interval_ms=1_000,
        partition_assignment_strategy=(RoundRobinPartitionAssignor,),
        retry_backoff_ms=100,
    )
    try:
        with translated(f"joining the group {group}"):
            consumer.subscribe([topic], listener=listener)
            await _started(consumer.start(), 2 * SESSION_TIMEOUT_MS / 1000)
        yield consumer
    finally:
        await _stop_consumer(consumer)
