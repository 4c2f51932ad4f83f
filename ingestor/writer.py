"""A tenure over one partition: fence, recover, decide, send, acknowledge.

There are no Kafka transactions. What makes an answer safe is the exact offset of an acknowledged batch (see
`Tenure.settle`); everything else here may fail at any point, and the next tenure goes on from the log.
"""

import asyncio
import re
import time
import uuid
from collections import deque
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from msgspec.structs import replace

from ingestor.lending import Lent
from ingestor.reading import SILENCE_SECONDS, PartitionReader, TopicReader, next_records
from ingestor.recovery import Recovery, recover
from ingestor.replies import Replies
from ingestor.settings import IngestorSettings
from ingestor.snapshots import Snapshots
from ingestor.state import open_state
from ingestor.tenure import SKEW, Batch, Tenure
from shared.codec import decode_command, encode_record
from shared.commands import CORRELATION_ID, DEAD_LETTER, REPLY_PARTITION, Command
from shared.errors import PoisonRecord, RecordsLost, Unavailable
from shared.events import IMPORT_UNFINISHED, LoggedFence, WriterFenced
from shared.ids import CommandId, EventId, StreamId
from shared.kafka import append_together, open_partition, open_producer, partition_of, partitions_of, translated
from shared.probes import Status
from shared.receipts import CommandRefused, Receipt
from shared.settings import COMMANDS, DEAD_LETTERS, EVENTS, KafkaSettings
from shared.supervisor import gravest

_EVENTS_BATCH_BYTES = 31 * 1024 * 1024
"""Room for all events of the largest command; the topic takes 32 MiB."""
_ACK_SECONDS = 10.0
_DRAIN_SECONDS = 3.0

_log = structlog.get_logger(__name__)


class Writer:
    """Runs tenures; ``run`` is one, until it is cancelled or raises. All have the same clients of Kafka."""

    def __init__(
        self,
        kafka: KafkaSettings,
        settings: IngestorSettings,
        replies: Replies,
        status: Status,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.kafka = kafka
        self.settings = settings
        self.replies = replies
        self.status = status
        self.snapshots = snapshots
        self._commands = TopicReader(kafka, COMMANDS)
        self._producers = Lent(partial(open_producer, kafka, batch_bytes=_EVENTS_BATCH_BYTES))
        self._room = _Room(settings.in_flight_bytes)

    async def run(self, partition: int) -> None:
        """Own the partition.

        Raises:
            Fenced: another writer came.
            Unavailable: Kafka is away, or did not acknowledge in time.
            PoisonRecord: the log holds what this version cannot read, or too many commands could not be read.
            RecordsLost: commands or events are gone that were not read yet.
        """
        settings = self.settings
        with open_state(settings.state_dir, partition, map_bytes=settings.state_map_bytes) as store:
            async with self._producers.borrow() as producer:
                async with open_partition(self.kafka, COMMANDS, partition) as commands:
                    askable_since = await self._askable_since(commands, partition)
                    fence, offset = await self._fence(producer, partition)
                    recovery = await recover(
                        self.kafka,
                        store,
                        partition,
                        fence=fence,
                        fence_offset=offset,
                        askable_since=askable_since,
                        report=partial(self.status.partitions.__setitem__, partition),
                        snapshots=self.snapshots,
                    )
                    next_offset = await self._find_next_command(commands, partition, recovery)
                tenure = Tenure(store, recovery.checkpoint, settings.idempotency_retention)
                pipeline = _Pipeline(tenure, producer, self.replies, settings.in_flight_batches, self._room, partition)
                async with self._commands.read(partition, next_offset) as next_commands:
                    self.status.partitions[partition] = Status.RUNNING
                    _log.info(
                        "tenure begins",
                        partition=partition,
                        fence=offset,
                        position=int(recovery.checkpoint.cursor.position),
                    )
                    try:
                        async with asyncio.TaskGroup() as tasks:
                            acknowledging = tasks.create_task(pipeline.acknowledge())
                            if self.snapshots is not None:
                                tasks.create_task(self.snapshots.keep(store, partition))
                            try:
                                await self._decide(tenure, pipeline, next_commands, producer, partition)
                            except asyncio.CancelledError:
                                if not acknowledging.done():
                                    await pipeline.drain()
                                raise
                    except ExceptionGroup as ended:
                        raise gravest(ended) from ended
                    finally:
                        pipeline.leave()

    async def _fence(self, producer: AIOKafkaProducer, partition: int) -> tuple[WriterFenced, int]:
        """Append our fence. If its acknowledgement is lost, the next tenure writes another: fences are harmless."""
        fence = WriterFenced(owner=self.settings.instance_id, nonce=str(uuid.uuid4()))
        value = encode_record(LoggedFence(fence), at=datetime.now(UTC))
        with translated(f"fencing {EVENTS}/{partition}"):
            async with asyncio.timeout(_ACK_SECONDS):
                appended = await producer.send_and_wait(EVENTS, value=value, partition=partition)
        if appended.offset < 0:
            raise Unavailable(f"the fence in {EVENTS}/{partition} was acknowledged without an offset")
        return fence, appended.offset

    async def _askable_since(self, commands: AIOKafkaConsumer, partition: int) -> datetime:
        """No command that is still to be decided may ask for a receipt of before, however long the commands waited."""
        tp = TopicPartition(COMMANDS, partition)
        oldest = datetime.now(UTC)
        with translated(f"finding the ends of {COMMANDS}/{partition}"):
            first_kept = (await commands.beginning_offsets([tp]))[tp]
            end = (await commands.end_offsets([tp]))[tp]
        if first_kept < end:
            commands.seek(tp, first_kept)
            try:
                [first, *_] = await next_records(
                    commands, f"reading {COMMANDS}/{partition}", most=1, give_up_after=SILENCE_SECONDS
                )
            except RecordsLost:  # it has expired just now; keep all
                return datetime.min.replace(tzinfo=UTC)
            oldest = min(oldest, datetime.fromtimestamp(first.timestamp / 1000, UTC))
        return oldest - self.settings.idempotency_retention - SKEW

    async def _find_next_command(self, commands: AIOKafkaConsumer, partition: int, recovery: Recovery) -> int:
        """The offset after the last decided command; before it, those whose answers may be lost are answered."""
        last, unanswered = recovery.checkpoint.command_offset, recovery.unanswered
        if last == IMPORT_UNFINISHED:
            raise RecordsLost(
                f"{EVENTS}/{partition} holds an import that was not finished: make the topics anew and import again"
            )
        tp = TopicPartition(COMMANDS, partition)
        with translated(f"finding the ends of {COMMANDS}/{partition}"):
            first_kept = (await commands.beginning_offsets([tp]))[tp]
            end = (await commands.end_offsets([tp]))[tp]
        if not first_kept <= last + 1 <= end:
            raise RecordsLost(
                f"{COMMANDS}/{partition} holds offsets {first_kept} to {end}, {last + 1} is the next to decide: "
                "commands expired before they were decided, or the topic was made anew"
            )
        next_offset = max(first_kept, min(unanswered, default=last + 1))
        commands.seek(tp, next_offset)
        while next_offset <= last:
            for record in await next_records(
                commands, f"reading {COMMANDS}/{partition}", give_up_after=SILENCE_SECONDS
            ):
                receipt, reply_to = unanswered.get(record.offset), _reply_partition(record)
                if receipt is not None and reply_to is not None:
                    self.replies.send(reply_to, receipt)
                next_offset = record.offset + 1
        return last + 1

    async def _decide(
        self,
        tenure: Tenure,
        pipeline: "_Pipeline",
        commands: PartitionReader,
        producer: AIOKafkaProducer,
        partition: int,
    ) -> None:
        partitions = await partitions_of(producer, COMMANDS)
        dead_letters = _DeadLetters(producer, self.settings.dead_letters_per_minute, partition)
        while True:
            with translated(f"reading {COMMANDS}/{partition}"):
                records = await commands.next_records()
            for record in records:
                at = datetime.fromtimestamp(record.timestamp / 1000, UTC)
                try:
                    command = _command_in(record, partitions)
                except PoisonRecord as error:
                    try:
                        receipt = await dead_letters.park(record, error)
                    except PoisonRecord:  # the partition stops: what was decided before is written and answered
                        if tenure.open_bytes:
                            await pipeline.send(tenure.close_batch())
                        await pipeline.drain()
                        raise
                    tenure.note_poison(receipt, command_offset=record.offset, at=at, reply_to=_reply_partition(record))
                else:
                    tenure.decide(command, command_offset=record.offset, at=at, reply_to=_reply_partition(record))
                if tenure.open_bytes >= self.settings.batch_bytes:
                    await pipeline.send(tenure.close_batch())
            if tenure.open_bytes:
                await pipeline.send(tenure.close_batch())


class _Pipeline:
    """Batches on their way: sent in order, bounded in number and bytes, settled and answered strictly in that order."""

    def __init__(
        self,
        tenure: Tenure,
        producer: AIOKafkaProducer,
        replies: Replies,
        most: int,
        room: "_Room",
        partition: int,
    ) -> None:
        self._tenure = tenure
        self._producer = producer
        self._replies = replies
        self._most = most
        self._room = room
        self._partition = partition
        self._on_their_way: deque[tuple[Batch, asyncio.Future[Any]]] = deque()
        self._changed = asyncio.Event()

    async def send(self, batch: Batch) -> None:
        """Send the batch as one record batch, as soon as there is room for it."""
        while len(self._on_their_way) >= self._most:
            await self._change()
        await self._room.take(batch.size)
        try:
            sent = await append_together(self._producer, EVENTS, self._partition, batch.records)
        except BaseException:
            self._room.give_back(batch.size)
            raise
        sent.add_done_callback(partial(self._room.give_back_after, batch.size))
        self._on_their_way.append((batch, sent))
        self._changed.set()

    async def acknowledge(self) -> None:
        """Settle, answer and store the batches in the order in which they were sent, until cancelled."""
        while True:
            while not self._on_their_way:
                await self._change()
            batch, sent = self._on_their_way[0]
            with translated(f"appending to {EVENTS}/{self._partition}"):
                async with asyncio.timeout(_ACK_SECONDS):
                    appended = await sent
            self._tenure.settle(batch, appended.offset)
            for partition, receipt in batch.replies:
                if partition is not None:
                    self._replies.send(partition, receipt)
            self._tenure.store(batch)
            self._on_their_way.popleft()
            self._changed.set()

    async def drain(self) -> None:
        """Answer what is on its way before the tenure ends; what is not answered, the next tenure finds in the log."""
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._on_their_way:
                    await self._change()
        except TimeoutError:
            _log.warning("batches left unanswered", partition=self._partition, count=len(self._on_their_way))

    def leave(self) -> None:
        """Wait for nothing any more. What is on its way takes no room from others, whatever becomes of it."""
        for _, sent in self._on_their_way:
            sent.cancel()  # a shield: aiokafka's own future is not touched

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _Room:
    """For the bytes of all batches on their way: Kafka gets those of all partitions in one request of limited size."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._freed = asyncio.Event()
        self._next = asyncio.Lock()

    async def take(self, size: int) -> None:
        """Wait until there is room, in the order of coming. What is larger than all of it goes alone."""
        async with self._next:
            while self._taken and self._taken + size > self._most:
                self._freed.clear()
                await self._freed.wait()
            self._taken += size

    def give_back(self, size: int) -> None:
        """Say that so many are not on their way."""
        self._taken -= size
        self._freed.set()

    def give_back_after(self, size: int, sent: "asyncio.Future[Any]") -> None:
        """Say that so many are acknowledged or failed, perhaps after the end of their tenure."""
        self.give_back(size)
        if not sent.cancelled():
            sent.exception()  # else asyncio complains that nobody looked at it


class _DeadLetters:
    """Parks commands that cannot be read, loudly, and stops the partition when there are too many."""

    def __init__(self, producer: AIOKafkaProducer, most_per_minute: int, partition: int) -> None:
        self._producer = producer
        self._most = most_per_minute
        self._partition = partition
        self._parked_at: deque[float] = deque()

    async def park(self, record: ConsumerRecord, error: PoisonRecord) -> Receipt:
        """Copy the record to the dead letters; the receipt for its caller.

        Raises:
            PoisonRecord: more than the limit were parked within a minute.
        """
        now = time.monotonic()
        while self._parked_at and self._parked_at[0] < now - 60:
            self._parked_at.popleft()
        if len(self._parked_at) >= self._most:
            raise PoisonRecord(
                f"more than {self._most} commands within a minute could not be read, the last at offset "
                f"{record.offset} of {COMMANDS}/{self._partition} ({error}): who writes to the topic that should not?"
            )
        self._parked_at.append(now)
        headers = [
            ("source-topic", COMMANDS.encode()),
            ("source-partition", str(self._partition).encode()),
            ("source-offset", str(record.offset).encode()),
            ("reason", str(error).encode()),
            *((f"original-{name}", value) for name, value in record.headers),
        ]
        _log.error("command parked", partition=self._partition, offset=record.offset, reason=str(error))
        with translated(f"parking a command in {DEAD_LETTERS}"):
            async with asyncio.timeout(_ACK_SECONDS):
                await self._producer.send_and_wait(
                    DEAD_LETTERS, key=record.key, value=record.value, headers=headers, partition=self._partition
                )
        return Receipt(
            command_id=CommandId(_header(record, CORRELATION_ID)),
            stream=StreamId((record.key or b"").decode(errors="replace")),
            event_id=EventId(0),
            outcome=CommandRefused("validation_error", "The command could not be read and was put aside."),
        )


def _command_in(record: ConsumerRecord, partitions: int) -> Command:
    command = decode_command(record.value)
    key = command.stream.encode()
    if record.key != key:
        raise PoisonRecord(f"the record's key is not its command's stream {command.stream!r}")
    if partition_of(key, partitions) != record.partition:
        raise PoisonRecord(f"stream {command.stream!r} does not belong into partition {record.partition}")
    if command.idempotency_key is None and (letter := _header(record, DEAD_LETTER)):
        # Should it ever be put back twice, the second one is a retry of the first.
        return replace(command, idempotency_key=f"{DEAD_LETTER} {letter}")
    return command


def _header(record: ConsumerRecord, name: str) -> str:
    for key, value in record.headers:
        if key == name:
            return str(value.decode(errors="replace"))
    return ""


def _reply_partition(record: ConsumerRecord) -> int | None:
    text = _header(record, REPLY_PARTITION)
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None
