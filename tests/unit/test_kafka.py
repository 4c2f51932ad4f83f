"""What must hold of our use of Kafka's client, without Kafka."""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any, cast

import aiokafka.conn
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.admin import ApiVersionRequest
from aiokafka.protocol.metadata import MetadataRequest
from structlog.testing import capture_logs

import shared.kafka
from shared.errors import Unavailable
from shared.kafka import Pulse, ends, open_admin, open_client, open_partition, open_producer
from shared.settings import KafkaSettings


class Answering:
    """A consumer whose answer comes when the test says so."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[dict[TopicPartition, int]] = asyncio.get_running_loop().create_future()

    async def end_offsets(self, _: Any) -> dict[TopicPartition, int]:
        return await self.answer


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_cancellation_is_not_lost_when_the_answer_comes_at_the_same_moment(turns: int) -> None:
    consumer = Answering()
    asking = asyncio.create_task(ends(cast(AIOKafkaConsumer, consumer), "events", [0]))
    await asyncio.sleep(0.01)
    consumer.answer.set_result({TopicPartition("events", 0): 7})
    for _ in range(turns):
        await asyncio.sleep(0)
    if asking.cancel():
        with pytest.raises(asyncio.CancelledError):
            await asking


class Stopping:
    """A consumer that stops as the test says."""

    def __init__(self, stop: Callable[[], Awaitable[None]]) -> None:
        self.stop = stop
        self._fetcher, self._client = Part(), Part()

    async def start(self) -> None:
        pass

    def assign(self, _: Any) -> None:
        pass

    @property
    def closed(self) -> bool:
        return self._fetcher.closed and self._client.closed


class Part:
    closed = False

    async def close(self) -> None:
        self.closed = True


async def never() -> None:
    await asyncio.Event().wait()


async def by_a_cancellation() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("stop", [never, by_a_cancellation])
async def test_a_consumer_that_does_not_stop_as_it_should_is_closed_and_nobody_is_cancelled(
    stop: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = Stopping(stop)
    monkeypatch.setattr("shared.kafka.AIOKafkaConsumer", lambda **_: consumer)
    monkeypatch.setattr("shared.kafka._STOP_SECONDS", 0.05)
    with capture_logs() as logs:
        async with asyncio.timeout(10), open_partition(KafkaSettings(), "events", 0):
            pass
    assert consumer.closed
    assert bool(logs) == (stop is never)


@pytest.mark.parametrize("stop", [never, by_a_cancellation])
async def test_a_producer_that_does_not_stop_as_it_should_is_closed_and_the_error_is_told(
    stop: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = StoppingProducer(stop)
    monkeypatch.setattr("shared.kafka.AIOKafkaProducer", lambda **_: producer)
    monkeypatch.setattr("shared.kafka._STOP_SECONDS", 0.05)
    with capture_logs() as logs, pytest.raises(LookupError):
        async with asyncio.timeout(10), open_producer(KafkaSettings()):
            raise LookupError
    assert producer.client.closed
    assert bool(logs) == (stop is never)


class StoppingProducer(Stopping):
    """A producer with nothing to send that stops as the test says."""

    def __init__(self, stop: Callable[[], Awaitable[None]]) -> None:
        super().__init__(stop)
        self.client = Part()
        self._sender = SimpleNamespace(sender_task=None)
        self._message_accumulator = SimpleNamespace(_pending_batches=set(), _batches={}, fail_all=lambda _: None)


async def test_a_request_on_a_connection_that_was_lost_says_so() -> None:
    asked = asyncio.Event()

    class Broker(asyncio.Protocol):
        """Never answers."""

        def data_received(self, data: bytes) -> None:
            asked.set()

    async with await asyncio.get_running_loop().create_server(Broker, "127.0.0.1", 0) as server:
        connection = aiokafka.conn.AIOKafkaConnection("127.0.0.1", server.sockets[0].getsockname()[1])
        connecting = asyncio.create_task(connection.connect())
        await asked.wait()
        connection._writer.transport.abort()
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="is closed"):  # aiokafka has not noticed it yet
            connection._writer.write(b"")
        with pytest.raises(KafkaConnectionError):
            connection.send(ApiVersionRequest())
        with pytest.raises(KafkaConnectionError):
            await connecting


@pytest.mark.parametrize(
    "connect",
    [
        open_admin,
        open_producer,
        lambda kafka: open_partition(kafka, "events", 0),
        lambda kafka: open_client(kafka, "events", timeout_ms=5_000),
    ],
    ids=["admin", "producer", "consumer", "client"],
)
async def test_who_is_cancelled_while_connecting_leaves_no_connection_open(
    connect: Callable[[KafkaSettings], AbstractAsyncContextManager[Any]],
) -> None:
    asked, hung_up = asyncio.Event(), asyncio.Event()

    class Broker(asyncio.Protocol):
        """Says that it knows metadata requests, and does not answer them."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            _, key, _, correlation_id = struct.unpack_from(">ihhi", data)
            if key == ApiVersionRequest.API_KEY:
                answer = struct.pack(">ihihhh", correlation_id, 0, 1, MetadataRequest.API_KEY, 0, 1)
                self._transport.write(struct.pack(">i", len(answer)) + answer)
            else:
                asked.set()

        def connection_lost(self, error: Exception | None) -> None:
            hung_up.set()

    async def connecting(kafka: KafkaSettings) -> None:
        async with connect(kafka):
            pass

    server = await asyncio.get_running_loop().create_server(Broker, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    task = asyncio.create_task(connecting(KafkaSettings(bootstrap_servers=f"{host}:{port}")))
    try:
        async with asyncio.timeout(10):
            await asked.wait()
            task.cancel()
            await hung_up.wait()
    finally:
        server.close()
        await asyncio.wait([task])
    assert task.cancelled()


class Answers:
    """A consumer that says when the last answer came for its partition."""

    at: int | None = None

    def last_poll_timestamp(self, tp: TopicPartition) -> int | None:
        assert tp == TopicPartition("events", 0)
        return self.at


def test_a_pulse_that_stops_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, consumer = 0.0, Answers()
    monkeypatch.setattr(shared.kafka, "time", SimpleNamespace(monotonic=lambda: now))
    pulse = Pulse(cast(AIOKafkaConsumer, consumer), "events", 0)
    for second in range(1, 31):
        now, consumer.at = float(second), second
        pulse.look()
    now = 3600.0  # the process stood still: that is one look, not an hour of silence
    pulse.look()
    for _ in range(18):
        now += 1
        pulse.look()
    now += 1
    with pytest.raises(Unavailable, match="reading events/0: Kafka does not answer"):
        pulse.look()


def test_kafka_that_never_answers_is_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(shared.kafka, "time", SimpleNamespace(monotonic=lambda: now))
    pulse = Pulse(cast(AIOKafkaConsumer, Answers()), "events", 0)
    for _ in range(199):
        now += 0.1  # looks may come more often
        pulse.look()
    now += 0.2
    with pytest.raises(Unavailable):
        pulse.look()
