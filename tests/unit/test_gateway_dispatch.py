"""The dispatcher's bookkeeping, with a producer that does as it is told. Connecting is tested on the real Kafka."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

import shared.kafka
from gateway.dispatch import CommandTooLarge, KafkaDispatcher, NoReply, OutcomeUnknown, _Connection
from gateway.limits import AdaptiveSize, TooMany
from shared.codec import encode_receipt
from shared.commands import Command, EpisodeFields
from shared.errors import Unavailable
from shared.ids import EventId
from shared.kafka import partition_of
from shared.receipts import CommandRefused, Receipt
from shared.settings import REPLIES, KafkaSettings
from tests import builders

NAMES = [f"namespace-{number}" for number in range(50)]
PARTITIONS = 4


class FakeProducer:
    """Takes records; they are acknowledged when the test says so."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.acknowledgements: list[asyncio.Future[None]] = []

    async def send(self, topic: str, value: bytes, key: bytes, *, headers: Any) -> "asyncio.Future[None]":
        self.sent.append({"topic": topic, "value": value, "key": key, "headers": dict(headers)})
        self.acknowledgements.append(asyncio.get_running_loop().create_future())
        return self.acknowledgements[-1]


def dispatcher(
    *, reply_timeout: float = 5, latency: float = 0.3, most: int = 10, most_bytes: int = 100_000
) -> KafkaDispatcher:
    return KafkaDispatcher(
        KafkaSettings(),
        max_in_flight=most,
        max_in_flight_bytes=most_bytes,
        latency_target=latency,
        reply_timeout=reply_timeout,
    )


@asynccontextmanager
async def connected(it: KafkaDispatcher) -> AsyncIterator[FakeProducer]:
    producer = FakeProducer()
    async with asyncio.TaskGroup() as tasks:
        it._connection = _Connection(producer, PARTITIONS, tasks)
        yield producer
        for acknowledgement in producer.acknowledgements:
            if not acknowledgement.done():
                acknowledgement.set_result(None)


async def turns(number: int = 5) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def partition_of_namespace(name: str) -> int:
    return partition_of(builders.upsert(namespace=name).stream.encode(), PARTITIONS)


def receipt_for(command: Any) -> Receipt:
    outcome = CommandRefused("gone", "It is gone")
    return Receipt(command_id=command.command_id, stream=command.stream, event_id=EventId(1), outcome=outcome)


async def test_a_command_is_published_and_its_reply_handed_over() -> None:
    it, command = dispatcher(), builders.upsert()
    async with connected(it) as producer:
        answer = asyncio.ensure_future(it.dispatch(command, "00-trace"))
        await turns()
        [sent] = producer.sent
        assert (sent["topic"], sent["key"]) == ("episodes.commands", command.stream.encode())
        assert sent["headers"] == {
            "correlation-id": command.command_id.encode(),
            "reply-partition": b"0",
            "traceparent": b"00-trace",
        }
        it._hand_over(encode_receipt(receipt_for(builders.upsert())))
        with capture_logs():
            it._hand_over(b"nonsense")
        assert not answer.done()
        it._hand_over(encode_receipt(receipt_for(command)))
        assert await answer == receipt_for(command)
        it._hand_over(encode_receipt(receipt_for(command)))
    assert (it.foreign_replies, it.undecodable_replies) == (2, 1)
    assert (it._commands.taken, it._bytes.taken) == (0, 0)


async def test_without_a_connection_nothing_is_published() -> None:
    it = dispatcher()
    assert it.missing == "Kafka was not reached yet"
    with pytest.raises(Unavailable) as caught:
        await it.dispatch(builders.upsert())
    assert not isinstance(caught.value, OutcomeUnknown)


async def test_a_command_that_fits_into_no_record_is_refused() -> None:
    with pytest.raises(CommandTooLarge):
        await dispatcher().dispatch(builders.upsert(fields=EpisodeFields(description="x" * 16 * 1024 * 1024)))


async def test_without_a_reply_the_command_counts_until_its_record_is_settled() -> None:
    it, command = dispatcher(reply_timeout=0.01, most=1), builders.upsert()
    async with connected(it) as producer:
        with pytest.raises(NoReply) as caught:
            await it.dispatch(command)
        assert caught.value.command_id == command.command_id
        with pytest.raises(Unavailable, match="Too many writes are under way"):
            await it.dispatch(builders.upsert())
        producer.acknowledgements[0].set_result(None)
        await turns()
        with pytest.raises(NoReply):
            await it.dispatch(builders.upsert())


async def test_more_bytes_than_there_may_be_are_refused() -> None:
    it = dispatcher(most_bytes=300)
    async with connected(it):
        with pytest.raises(Unavailable, match="Too many bytes of writes are under way"):
            await it.dispatch(builders.upsert(fields=EpisodeFields(description="x" * 300)))
        assert (it._commands.taken, it._bytes.taken) == (0, 0)


async def test_a_record_that_is_lost_leaves_the_outcome_unknown_and_ends_the_connection() -> None:
    it = dispatcher()
    answers: list[asyncio.Task[Receipt]] = []

    async def lose_one() -> None:
        async with connected(it) as producer:
            answers.extend(asyncio.ensure_future(it.dispatch(builders.upsert())) for _ in range(2))
            await turns()
            producer.acknowledgements[0].set_exception(KafkaConnectionError("away"))
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as ended:
        await lose_one()
    assert ended.group_contains(Unavailable)
    for answer in answers:
        with pytest.raises(OutcomeUnknown):
            await answer
    assert it.missing is not None
    assert (it._commands.taken, it._bytes.taken) == (0, 0)


async def test_what_is_acknowledged_goes_on_waiting_when_the_connection_ends() -> None:
    it, command = dispatcher(), builders.upsert()
    answers: list[asyncio.Task[Receipt]] = []

    async def end_after_the_acknowledgement() -> None:
        async with connected(it) as producer:
            answers.append(asyncio.ensure_future(it.dispatch(command)))
            await turns()
            producer.acknowledgements[0].set_result(None)
            await turns()
            raise it._disconnect("Kafka does not answer")

    with pytest.raises(ExceptionGroup):
        await end_after_the_acknowledgement()
    [answer] = answers
    assert not answer.done()
    it._hand_over(encode_receipt(receipt_for(command)))
    assert await answer == receipt_for(command)


@pytest.mark.parametrize(("latency", "at_once"), [(0.3, 16), (0.1, 5), (0.001, 1)])
async def test_no_more_goes_to_a_partition_than_is_answered_soon_and_the_next_one_goes_then(
    latency: float, at_once: int
) -> None:
    it = dispatcher(most=100, latency=latency)
    commands = [builders.upsert() for _ in range(at_once + 2)]
    async with connected(it) as producer:
        answers = [asyncio.ensure_future(it.dispatch(command)) for command in commands]
        await turns()
        assert len(producer.sent) == at_once
        for acknowledgement in producer.acknowledgements:
            acknowledgement.set_result(None)
        await turns()
        assert len(producer.sent) == at_once
        for command in commands[:1]:
            it._hand_over(encode_receipt(receipt_for(command)))
        await turns()
        assert len(producer.sent) > at_once
        for command in commands[1:]:
            for acknowledgement in producer.acknowledgements[at_once:]:
                if not acknowledgement.done():
                    acknowledgement.set_result(None)
            await turns()
            it._hand_over(encode_receipt(receipt_for(command)))
        assert await asyncio.gather(*answers) == [receipt_for(command) for command in commands]


async def test_what_waits_for_its_turn_was_not_published_when_kafka_goes_away() -> None:
    it = dispatcher(most=100)
    answers: list[asyncio.Task[Receipt]] = []

    async def go_away() -> None:
        async with connected(it) as producer:
            answers.extend(asyncio.ensure_future(it.dispatch(builders.upsert())) for _ in range(17))
            await turns()
            assert len(producer.sent) == 16
            raise it._disconnect("Kafka does not answer")

    with pytest.raises(ExceptionGroup):
        await go_away()
    with pytest.raises(Unavailable, match="Kafka does not answer") as caught:
        await answers[-1]
    assert not isinstance(caught.value, OutcomeUnknown)
    for answer in answers[:-1]:
        with pytest.raises(OutcomeUnknown):
            await answer
    assert (it._commands.taken, it._bytes.taken) == (0, 0)


async def test_what_never_had_its_turn_was_not_published() -> None:
    it = dispatcher(most=100, reply_timeout=0.05)
    async with connected(it) as producer:
        answers = [asyncio.ensure_future(it.dispatch(builders.upsert())) for _ in range(17)]
        await asyncio.wait(answers)
        for answer in answers[:-1]:
            with pytest.raises(NoReply):
                await answer
        with pytest.raises(TooMany, match="Too many writes wait for their turn"):
            await answers[-1]
        assert len(producer.sent) == 16


async def test_a_partition_that_stands_still_holds_no_other_up() -> None:
    it = dispatcher(most=100)
    standing, another = (next(name for name in NAMES if partition_of_namespace(name) == number) for number in (0, 1))
    async with connected(it) as producer:
        stuck = [asyncio.ensure_future(it.dispatch(builders.upsert(namespace=standing))) for _ in range(30)]
        await turns()
        assert len(producer.sent) == 16
        command = builders.upsert(namespace=another)
        answer = asyncio.ensure_future(it.dispatch(command))
        await turns()
        it._hand_over(encode_receipt(receipt_for(command)))
        assert await answer == receipt_for(command)
        for one in stuck:
            one.cancel()
        await asyncio.wait(stuck)


async def test_what_was_not_begun_to_be_published_when_the_connection_ended_leaves_nothing_behind() -> None:
    it = dispatcher()

    async def end_at_once() -> None:
        async with connected(it) as producer:
            answers.append(asyncio.ensure_future(it.dispatch(builders.upsert())))
            asyncio.get_running_loop().call_soon(woken.set)
            await woken.wait()  # the dispatch has run, and what publishes its record has not
            assert not producer.sent
            raise it._disconnect("Kafka does not answer")

    answers: list[asyncio.Task[Receipt]] = []
    woken = asyncio.Event()
    with pytest.raises(ExceptionGroup):
        await end_at_once()
    with pytest.raises(OutcomeUnknown):
        await answers[0]
    assert (it._commands.taken, it._bytes.taken) == (0, 0)
    assert [turns.under_way for turns in it._turns.values()] == [0]


def widened(it: KafkaDispatcher, command: Command) -> tuple[AdaptiveSize, AdaptiveSize]:
    """Make both sizes large, and give them."""
    turns = it._turns[partition_of(command.stream.encode(), PARTITIONS)]
    it._commands._size.most = it._commands.most = turns._size.most = 900
    return it._commands._size, turns._size


async def test_a_partition_that_does_not_answer_takes_no_room_from_the_others() -> None:
    it, command = dispatcher(reply_timeout=0.02, latency=1e-9, most=1000), builders.upsert()
    sizes = widened(it, command)
    async with connected(it):
        with pytest.raises(NoReply):
            await it.dispatch(command)
    assert [size.most for size in sizes] == [900, 900]


async def test_what_is_answered_late_makes_room_smaller() -> None:
    it, command = dispatcher(latency=1e-9, most=1000), builders.upsert()
    sizes = widened(it, command)
    async with connected(it) as producer:
        answer = asyncio.ensure_future(it.dispatch(command))
        await turns()
        await asyncio.sleep(0.01)  # the clock of the loop has milliseconds
        producer.acknowledgements[0].set_result(None)
        it._hand_over(encode_receipt(receipt_for(command)))
        await answer
        await turns()
    assert [size.most for size in sizes] == [256, 1]


async def test_what_waits_is_turned_away_at_once_while_acknowledged_writes_wait_for_their_replies() -> None:
    it = dispatcher(most=100)
    async with connected(it) as producer:
        answers = [asyncio.ensure_future(it.dispatch(builders.upsert())) for _ in range(17)]
        await turns()
        for acknowledgement in producer.acknowledgements:
            acknowledgement.set_result(None)
        await turns()
        it._disconnect("Kafka does not answer")
        with pytest.raises(Unavailable, match="Kafka does not answer"):
            await answers[-1]
        assert not any(answer.done() for answer in answers[:-1])
        for answer in answers[:-1]:
            answer.cancel()
        await asyncio.wait(answers)


class NeverAnswered:
    """A consumer of replies for which Kafka answers no fetch."""

    async def getmany(self, *, timeout_ms: int) -> dict[TopicPartition, Any]:
        await asyncio.sleep(0)
        return {}

    def last_poll_timestamp(self, _: TopicPartition) -> None:
        return None


async def test_replies_that_cannot_be_read_close_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.kafka, "_UNANSWERED_SECONDS", 0.02)
    it = dispatcher()
    async with connected(it):
        with pytest.raises(Unavailable, match=f"reading {REPLIES}/0: Kafka does not answer"):
            async with asyncio.timeout(5):
                await it._listen(cast(AIOKafkaConsumer, NeverAnswered()))
        assert it.missing is not None
        with pytest.raises(Unavailable):
            await it.dispatch(builders.upsert())


class WithoutLeader:
    """A consumer of replies of which Kafka knows no leader."""

    async def end_offsets(self, _: Any) -> None:
        await asyncio.Event().wait()


async def test_the_gate_stays_closed_while_the_replies_have_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.kafka, "REQUEST_TIMEOUT_MS", 1)
    it = dispatcher()
    it._next_reply = 7  # it was connected before
    with pytest.raises(Unavailable, match=REPLIES):
        async with asyncio.timeout(5):
            await it._position(cast(AIOKafkaConsumer, WithoutLeader()))
