"""Publish a command and await its receipt: the port `Dispatcher`, and Kafka behind it.

One loop stays connected for as long as the process lives, and watches whether Kafka answers. When it does not, the
gate closes: what is not acknowledged yet is answered at once, and the producer is thrown away with all it holds. What
is acknowledged goes on waiting, for the next connection reads the replies from where the last one ended.
"""

import asyncio
import secrets
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from gateway.limits import AdaptiveSize, LatencyLimit, Limit, ShareExceeded, TooMany
from gateway.turns import FairQueue
from shared.codec import decode_receipt, encode_command
from shared.commands import CORRELATION_ID, REPLY_PARTITION, TRACEPARENT, Command
from shared.errors import EpisodesError, PoisonRecord, RecordsLost, Unavailable
from shared.ids import CommandId
from shared.kafka import (
    REQUEST_TIMEOUT_MS,
    Pulse,
    ends,
    open_client,
    open_partition,
    open_producer,
    partition_of,
    partitions_of,
    translated,
)
from shared.receipts import Receipt
from shared.settings import COMMANDS, MAX_COMMAND_BYTES, REPLIES, KafkaSettings
from shared.supervisor import backoff, error_of

_ALWAYS_IN_FLIGHT = 256
"""However long writes take, so many may be under way."""
_PART_IN_KAFKA = 0.1
"""Of how long a write may take, so much from Kafka to its reply; in the rest callers take turns."""
_ALWAYS_A_SECOND = 530
"""Times how long they may be in Kafka: so many are let in there for each partition, however slow it looks."""
_BYTES_LIKE_ONE_MORE = 32 * 1024
"""So many bytes in one command take as long as one more command does."""
_WATCH_EVERY = 0.3
_WATCH_TIMEOUT = 1.2
_BROKER_TIMEOUT_MS = 700
"""Together: that Kafka is away is known within 1.5 s, and one broker of several that is frozen is passed over."""

_log = structlog.get_logger(__name__)


class CommandTooLarge(EpisodesError):
    """The command does not fit into a record."""

    def __init__(self) -> None:
        super().__init__(f"The request makes a record of more than {MAX_COMMAND_BYTES} bytes")


class OutcomeUnknown(Unavailable):
    """Kafka went away before it acknowledged the command."""

    def __init__(self, command_id: CommandId) -> None:
        super().__init__(
            "Kafka went away before it confirmed this write. The outcome is unknown: it may still happen. "
            "A retry with the same Idempotency-Key is safe"
        )
        self.command_id = command_id


class NoReply(EpisodesError):
    """No receipt came in time."""

    def __init__(self, command_id: CommandId) -> None:
        super().__init__(
            "No reply came in time. The write may still happen. A retry with the same Idempotency-Key is safe"
        )
        self.command_id = command_id


class Dispatcher(Protocol):
    """Takes commands to whoever decides on them."""

    async def dispatch(self, command: Command, traceparent: str | None = None) -> Receipt:
        """What the command came to.

        Raises:
            CommandTooLarge: nothing was published.
            OutcomeUnknown: it may have been published.
            Unavailable: nothing was published.
            ShareExceeded: nothing was published.
            NoReply: it was published; nobody said what it came to.
        """

    def check(self, caller: str) -> None:
        """See whether one more command of this caller would be taken now.

        Raises:
            TooMany: there are too many.
            ShareExceeded: this caller has too many.
        """

    @property
    def missing(self) -> str | None:
        """Why no command can be taken now."""


class KafkaDispatcher:
    """Commands go out through one idempotent producer; replies come in on one partition of the replies topic."""

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        max_in_flight: int,
        max_in_flight_bytes: int,
        latency_target: float,
        reply_timeout: float,
    ) -> None:
        self._kafka = kafka
        taken_in = AdaptiveSize(least=_ALWAYS_IN_FLIGHT, greatest=max_in_flight, target=latency_target)
        self._commands = LatencyLimit("writes", taken_in)
        self._bytes = Limit(max_in_flight_bytes, "bytes of writes")
        in_kafka = latency_target * _PART_IN_KAFKA
        at_once = max(1, round(_ALWAYS_A_SECOND * in_kafka))
        self._turns = defaultdict[int, FairQueue](
            lambda: FairQueue(
                AdaptiveSize(least=at_once, greatest=max_in_flight, target=in_kafka), patience=latency_target
            )
        )
        """One for each partition, so that one whose ingestor is away does not hold the others up."""
        self._reply_timeout = reply_timeout
        self._instance_id = secrets.token_bytes(16)
        self._connection: _Connection | None = None
        self._disconnected = "Kafka was not reached yet"
        self._next_reply: int | None = None
        self._waiting: dict[CommandId, asyncio.Future[Receipt]] = {}
        self._acknowledged_at = float("-inf")
        self._reply_partition = 0
        self._attempt = 0
        self.foreign_replies = 0
        """Replies on our partition that nobody here waits for: another gateway's, or too late."""
        self.undecodable_replies = 0

    @property
    def missing(self) -> str | None:
        return self._disconnected if self._connection is None else None

    def check(self, caller: str) -> None:
        self._commands.check(caller)

    async def dispatch(self, command: Command, traceparent: str | None = None) -> Receipt:
        value = encode_command(command)
        if len(value) > MAX_COMMAND_BYTES:
            raise CommandTooLarge
        if self._connection is None:
            raise Unavailable("Kafka does not answer")
        record = _Record(command, value, self._reply_partition, traceparent)
        turns = self._turns[partition_of(record.key, self._connection.partitions)]
        slot = _Slot(self._commands, self._bytes, turns, command.actor, len(value))
        try:
            async with asyncio.timeout(self._reply_timeout):
                await slot.enter()
                receipt = await self._send(record, slot)
                slot.answered()
                return receipt
        except TimeoutError:
            if command.command_id in self._waiting:
                raise NoReply(command.command_id) from None
            raise TooMany("Too many writes wait for their turn") from None
        finally:
            self._waiting.pop(command.command_id, None)
            slot.release()

    def _send(self, record: "_Record", slot: "_Slot") -> asyncio.Future[Receipt]:
        """Begin to publish the command, and give what will be its receipt."""
        connection = self._connection
        if connection is None:
            raise Unavailable("Kafka does not answer")
        reply: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting[record.command_id] = reply
        publishing = connection.tasks.create_task(self._publish(connection.producer, record))
        slot.hold()
        publishing.add_done_callback(partial(self._settle, record.command_id, reply, slot))
        return reply

    async def _publish(self, producer: AIOKafkaProducer, record: "_Record") -> None:
        try:
            with translated("publishing a command"):
                await (await producer.send(COMMANDS, record.value, record.key, headers=record.headers))
            self._acknowledged_at = asyncio.get_running_loop().time()
        except (Unavailable, KafkaError) as error:
            # An idempotent producer that lost a batch can send no more to that partition: begin with a new one.
            raise self._disconnect(str(error)) from error

    def _settle(
        self,
        command_id: CommandId,
        reply: asyncio.Future[Receipt],
        slot: "_Slot",
        publishing: asyncio.Task[None],
    ) -> None:
        """Note how publishing ended, also if it was cancelled before it began."""
        if (publishing.cancelled() or publishing.exception() is not None) and not reply.done():
            reply.set_exception(OutcomeUnknown(command_id))
        slot.release()

    def _disconnect(self, reason: str) -> Unavailable:
        self._connection = None
        self._disconnected = reason
        for turns in self._turns.values():
            turns.turn_away(reason)
        return Unavailable(reason)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        while True:
            error = await error_of(self._stay_connected())
            if error is not None:
                raise error
            _log.warning("waiting for Kafka", reason=self._disconnected)
            self._attempt += 1
            await asyncio.sleep(backoff(self._attempt))

    async def _stay_connected(self) -> None:
        """Connect, and return once that is over."""
        try:
            # A connection of its own, so that no large record delays the question whether Kafka answers.
            asking = open_client(self._kafka, COMMANDS, timeout_ms=_BROKER_TIMEOUT_MS)
            async with asking as client, open_producer(self._kafka) as producer:
                partitions = await self._look_up_partitions(producer)
                async with open_partition(self._kafka, REPLIES, self._reply_partition) as consumer:
                    await self._position(consumer)
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(self._listen(consumer))
                        self._connection = _Connection(producer, partitions, tasks)
                        self._attempt = 0
                        _log.info("connected to Kafka", reply_partition=self._reply_partition)
                        await self._watch(client)
        except* RecordsLost as errors:
            self._next_reply = None
            self._disconnect(_reason(errors))
        except* Unavailable as errors:
            self._disconnect(_reason(errors))
        finally:
            self._disconnect(self._disconnected)

    async def _look_up_partitions(self, producer: AIOKafkaProducer) -> int:
        """How many the commands have. Of those of the replies, one becomes ours."""
        self._reply_partition = int.from_bytes(self._instance_id) % await partitions_of(producer, REPLIES)
        return await partitions_of(producer, COMMANDS)

    async def _position(self, consumer: AIOKafkaConsumer) -> None:
        """Begin at the end, but after another connection where that one ended: replies to its commands may be there."""
        partition = TopicPartition(REPLIES, self._reply_partition)
        if self._next_reply is not None:
            await ends(consumer, REPLIES, [self._reply_partition])  # without a leader nobody could be answered
            consumer.seek(partition, self._next_reply)
            return
        with translated("looking up the end of the replies"):
            async with asyncio.timeout(REQUEST_TIMEOUT_MS / 1000):
                await consumer.seek_to_end(partition)
                self._next_reply = await consumer.position(partition)

    async def _watch(self, client: AIOKafkaClient) -> None:
        """Return never; raise `Unavailable` once no broker answers and no acknowledgement shows that one does."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_WATCH_EVERY)
            asked_at = loop.time()
            try:
                async with asyncio.timeout(_WATCH_TIMEOUT):
                    answers = await client.force_metadata_update()
            except TimeoutError:
                answers = False
            if not answers and self._acknowledged_at < asked_at:
                raise self._disconnect("Kafka does not answer")

    async def _listen(self, consumer: AIOKafkaConsumer) -> None:
        pulse = Pulse(consumer, REPLIES, self._reply_partition)
        try:
            with translated("reading replies"):
                while True:
                    taken = await consumer.getmany(timeout_ms=1_000)
                    if not taken:
                        pulse.look()
                    for records in taken.values():
                        for record in records:
                            self._hand_over(record.value)
                        self._next_reply = records[-1].offset + 1
        except (Unavailable, RecordsLost) as error:
            self._disconnect(str(error))
            raise

    def _hand_over(self, value: bytes | None) -> None:
        try:
            receipt = decode_receipt(value)
        except PoisonRecord as error:
            self.undecodable_replies += 1
            _log.warning("a reply was dropped", reason=str(error))
            return
        reply = self._waiting.get(receipt.command_id)
        if reply is None or reply.done():
            self.foreign_replies += 1
            return
        reply.set_result(receipt)


@dataclass(frozen=True, slots=True)
class _Connection:
    producer: AIOKafkaProducer
    partitions: int
    tasks: asyncio.TaskGroup


class _Record:
    """A command as Kafka gets it."""

    def __init__(self, command: Command, value: bytes, reply_partition: int, traceparent: str | None) -> None:
        self.command_id = command.command_id
        self.key = command.stream.encode()
        self.value = value
        self.headers = [
            (CORRELATION_ID, command.command_id.encode()),
            (REPLY_PARTITION, b"%d" % reply_partition),
        ]
        if traceparent is not None:
            self.headers.append((TRACEPARENT, traceparent.encode()))


class _Slot:
    """A command's part of what may be under way. Free once its caller is answered and its record settled."""

    def __init__(self, commands: LatencyLimit, size_of_all: Limit, turns: FairQueue, caller: str, size: int) -> None:
        size_of_all.take(caller, size)
        try:
            commands.take(caller)
        except (Unavailable, ShareExceeded):
            size_of_all.give_back(caller, size)
            raise
        self._commands = commands
        self._size_of_all = size_of_all
        self._turns = turns
        self._caller = caller
        self._size = size
        self._holders = 1
        self._cost = 1 + size // _BYTES_LIKE_ONE_MORE
        self._began_at = asyncio.get_running_loop().time()
        self._entered_at: float | None = None
        self._answered = False

    async def enter(self) -> None:
        """Wait until it is this command's turn."""
        try:
            await self._turns.enter(self._caller, self._cost)
        except (TooMany, ShareExceeded):
            self._observe()
            raise
        self._entered_at = asyncio.get_running_loop().time()

    def answered(self) -> None:
        """Note that its receipt came."""
        self._answered = True
        self._observe()

    def hold(self) -> None:
        """Count one more holder."""
        self._holders += 1

    def release(self) -> None:
        """Count one holder less."""
        self._holders -= 1
        if self._holders:
            return
        self._commands.give_back(self._caller)
        self._size_of_all.give_back(self._caller, self._size)
        if self._entered_at is not None:
            self._turns.leave(self._cost, self._entered_at if self._answered else None)

    def _observe(self) -> None:
        self._commands.observe(self._began_at, asyncio.get_running_loop().time())


def _reason(errors: BaseExceptionGroup[EpisodesError]) -> str:
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return str(first)
