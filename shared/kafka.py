"""Kafka clients with the settings that this service relies on, and Kafka's errors in our words.

aiokafka's defaults lose data (acks=1, "latest", auto-commit) or speed (16 kB batches); no client is built elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
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
)
from aiokafka.helpers import create_ssl_context

from shared.errors import RecordsLost, Unavailable
from shared.settings import KafkaSettings

REQUEST_TIMEOUT_MS = 5_000
MAX_RECORD_BYTES = 64 * 1024 * 1024
SESSION_TIMEOUT_MS = 10_000

_BUGS = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidTopicError)


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
        raise Unavailable(f"{what}: {error or type(error).__name__}") from error


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """What every aiokafka client needs to connect."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
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
    settings: KafkaSettings, *, batch_bytes: int = 900_000, linger_ms: int = 0, idempotent: bool = True
) -> AsyncIterator[AIOKafkaProducer]:
    """A started producer with acks=all and zstd.

    Leaving with an error, or by cancellation, drops what is not sent yet: an idempotent aiokafka producer would
    otherwise keep on trying for ever, and the command would happen long after its caller was told otherwise.

    Raises:
        Unavailable: Kafka does not answer.
    """
    producer = AIOKafkaProducer(
        **client_options(settings),
        acks="all",
        enable_idempotence=idempotent,
        linger_ms=linger_ms,
        compression_type="zstd",
        max_batch_size=batch_bytes,
        max_request_size=MAX_RECORD_BYTES,
        retry_backoff_ms=50,
    )
    try:
        with translated("connecting a producer"):
            await asyncio.wait_for(producer.start(), REQUEST_TIMEOUT_MS / 1000)
        yield producer
    except BaseException:
        await _abandon(producer)
        raise
    await producer.stop()


async def _abandon(producer: AIOKafkaProducer) -> None:
    # stop() alone flushes first, and waits for ever when Kafka is away; there is no public way around it.
    sender_task = producer._sender.sender_task  # noqa: SLF001
    if sender_task is not None:
        sender_task.cancel()
        await asyncio.wait([sender_task], timeout=2 * REQUEST_TIMEOUT_MS / 1000)
    producer._message_accumulator.fail_all(ProducerClosed())  # noqa: SLF001
    await producer.stop()


@asynccontextmanager
async def open_partition(settings: KafkaSettings, topic: str, partition: int) -> AsyncIterator[AIOKafkaConsumer]:
    """A started consumer of one partition, without a group. The caller seeks before the first read.

    An offset out of range is an error, never a silent jump.

    Raises:
        Unavailable: Kafka does not answer.
    """
    consumer = AIOKafkaConsumer(
        **client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=4 * 1024 * 1024,
        fetch_max_wait_ms=500,
        retry_backoff_ms=50,
    )
    try:
        with translated(f"connecting a consumer of {topic}/{partition}"):
            await asyncio.wait_for(consumer.start(), REQUEST_TIMEOUT_MS / 1000)
            consumer.assign([TopicPartition(topic, partition)])
        yield consumer
    finally:
        await consumer.stop()


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
            await asyncio.wait_for(consumer.start(), 2 * SESSION_TIMEOUT_MS / 1000)
        yield consumer
    finally:
        await consumer.stop()
