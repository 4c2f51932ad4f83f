"""The same ingestor with Kafka transactions instead of the log-fenced writer: ``python -m bench.peers.transactions``.

Stands in for ``python -m ingestor`` and takes the same settings; its decisions are made by the same pure code. What the
commands come to is appended in transactions, one for all commands that came while the one before was being committed.
Kafka's producer epoch fences a writer that was replaced, instead of the offset of its batches.

``TRANSACTIONS_PATTERN`` says what a transaction holds:

* ``classic``: events, replies and the offset of the last command, as read-process-write loops are taught. The gateway
  reads replies without regard to transactions, so its callers may hear a moment before the commit: in this it is faster
  than it could honestly be.
* ``lean``: the events alone. They carry the offset of their command, so a successor finds the next one in the log; and
  callers hear after the commit, by the same sender of replies that our ingestor has. The least that is safe.

It is for measuring, on topics that are empty: the markers of transactions take offsets, and our reader's rule, by which
it recovers too, stops where offsets are missing. So no projector reads behind it, and it cannot be started twice.

It is tuned as well as aiokafka allows: back-offs of 3 ms where its defaults are 100 and 20, no linger, record batches
made here, replies of a gateway in one batch, one consumer of commands for all partitions.
"""

import asyncio
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.producer import sender

from ingestor.reading import PartitionReader, TopicReader, next_records
from ingestor.recovery import Recovery
from ingestor.replies import Replies, open_replies
from ingestor.settings import IngestorSettings
from ingestor.state import Checkpoint, StateStore, open_state
from ingestor.tenure import Batch, Tenure
from shared.codec import decode_command, encode_receipt, encode_record
from shared.commands import REPLY_PARTITION
from shared.events import LoggedFence, WriterFenced
from shared.kafka import MAX_RECORD_BYTES, append_together, client_options, translated
from shared.log import Cursor, LogReader
from shared.probes import Status, serve_probes
from shared.process import configure_logging, run_process
from shared.receipts import Receipt
from shared.settings import COMMANDS, EVENTS, REPLIES, KafkaSettings, ProbeSettings
from shared.supervisor import gravest, supervise

CLASSIC, LEAN = "classic", "lean"
GROUP = "episodes-ingestor"
_BACKOFF_MS = 3
_MOST_BYTES = 4 * 1024 * 1024
"""Of events in one transaction; commands wait beyond that."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TransactionalWriter:
    """``run`` owns a partition until it is cancelled, or Kafka says that another one does."""

    kafka: KafkaSettings
    settings: IngestorSettings
    commands: TopicReader
    replies: Replies
    status: Status
    pattern: str

    async def run(self, partition: int) -> None:
        """Recover, then decide and commit, for as long as the partition is ours."""
        with open_state(self.settings.state_dir, partition, map_bytes=self.settings.state_map_bytes) as store:
            store.clear()  # its positions are no offsets here: markers of transactions stand between the records
            producer = self._producer(partition)
            try:
                with translated("connecting a transactional producer"):
                    await producer.start()
                recovered = await self._recover(producer, store, partition)
                tenure = Tenure(store, recovered, self.settings.idempotency_retention)
                async with self.commands.read(partition, recovered.command_offset + 1) as commands:
                    self.status.partitions[partition] = Status.RUNNING
                    await _Work(self, tenure, producer, commands, partition).run()
            finally:
                await producer.stop()

    def _producer(self, partition: int) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **client_options(self.kafka),
            transactional_id=f"{GROUP}-{partition}",
            acks="all",
            linger_ms=0,
            compression_type="zstd",
            max_batch_size=MAX_RECORD_BYTES,
            max_request_size=MAX_RECORD_BYTES,
            retry_backoff_ms=_BACKOFF_MS,
        )

    async def _recover(self, producer: AIOKafkaProducer, store: StateStore, partition: int) -> Checkpoint:
        """Fold what was committed, up to a fence of our own, which readers of the log go by."""
        fence = WriterFenced(owner=self.settings.instance_id, nonce=str(uuid.uuid4()))
        with translated(f"fencing {EVENTS}/{partition}"):
            async with producer.transaction():
                value = encode_record(LoggedFence(fence), at=datetime.now(UTC))
                appended = await producer.send_and_wait(EVENTS, value, partition=partition)
        recovery = Recovery(store, Checkpoint(Cursor(), "", -1))
        reader, offset = LogReader(Cursor()), 0
        consumer = AIOKafkaConsumer(
            **client_options(self.kafka),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            max_partition_fetch_bytes=4 * 1024 * 1024,
        )
        try:
            await consumer.start()
            consumer.assign([TopicPartition(EVENTS, partition)])
            consumer.seek(TopicPartition(EVENTS, partition), 0)
            while offset <= appended.offset:
                for record in await next_records(consumer, f"recovering {EVENTS}/{partition}", give_up_after=10):
                    commit = reader.read(record.offset, record.value)
                    if commit is not None:
                        recovery.take(commit)
                    offset = record.offset + 1
                recovery.flush()
        finally:
            await consumer.stop()
        _log.info("tenure begins", partition=partition, fence=appended.offset, events=recovery.events)
        return recovery.checkpoint


class _Work:
    """Decides commands while the transaction before is being committed."""

    def __init__(
        self,
        writer: TransactionalWriter,
        tenure: Tenure,
        producer: AIOKafkaProducer,
        commands: PartitionReader,
        partition: int,
    ) -> None:
        self._writer = writer
        self._tenure = tenure
        self._producer = producer
        self._commands = commands
        self._partition = partition
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._decide())
                tasks.create_task(self._commit())
        except ExceptionGroup as ended:
            raise gravest(ended) from ended

    async def _decide(self) -> None:
        while True:
            with translated(f"reading {COMMANDS}/{self._partition}"):
                records = await self._commands.next_records()
            for record in records:
                at = datetime.fromtimestamp(record.timestamp / 1000, UTC)
                command, to = decode_command(record.value), _reply_partition(record)
                self._tenure.decide(command, command_offset=record.offset, at=at, reply_to=to)
                if self._tenure.open_bytes >= _MOST_BYTES:
                    await self._tell()
                    async with self._changed:
                        await self._changed.wait_for(lambda: self._tenure.open_bytes < _MOST_BYTES)
            await self._tell()

    async def _commit(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._tenure.open_bytes > 0)
                batch = self._tenure.close_batch()
                self._changed.notify_all()
            with translated(f"committing to {EVENTS}/{self._partition}"):
                async with self._producer.transaction():
                    await self._write(batch)
            if self._writer.pattern == LEAN:
                for partition, receipt in batch.replies:
                    if partition is not None:
                        self._writer.replies.send(partition, receipt)
            self._tenure.store(batch)

    async def _write(self, batch: Batch) -> None:
        """All of the batch; every future is awaited, for aiokafka commits without those that failed."""
        sent = [await append_together(self._producer, EVENTS, self._partition, batch.records)]
        if self._writer.pattern == CLASSIC:
            for partition, values in _by_partition(batch.replies).items():
                now = datetime.now(UTC)
                records = [(None, value, now) for value in values]
                sent.append(await append_together(self._producer, REPLIES, partition, records))
            offsets = {TopicPartition(COMMANDS, self._partition): batch.command_offset + 1}
            await self._producer.send_offsets_to_transaction(offsets, f"{GROUP}-offsets")
        for each in sent:
            await each

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _by_partition(replies: Iterable[tuple[int | None, Receipt]]) -> dict[int, list[bytes]]:
    result: defaultdict[int, list[bytes]] = defaultdict(list)
    for partition, receipt in replies:
        if partition is not None:
            result[partition].append(encode_receipt(receipt))
    return result


def _reply_partition(record: ConsumerRecord) -> int | None:
    for name, value in record.headers:
        if name == REPLY_PARTITION:
            return int(value)
    return None


async def _main() -> None:
    settings, kafka, status = IngestorSettings(), KafkaSettings(), Status()
    sender.BACKOFF_OVERRIDE = _BACKOFF_MS / 1000
    async with open_replies(kafka) as replies, asyncio.TaskGroup() as tasks:
        tasks.create_task(serve_probes(status, host=ProbeSettings().host, port=settings.probe_port))
        pattern = os.environ.get("TRANSACTIONS_PATTERN", CLASSIC)
        writer = TransactionalWriter(kafka, settings, TopicReader(kafka, COMMANDS), replies, status, pattern)
        await supervise(
            kafka,
            topic=COMMANDS,
            group=GROUP,
            instance_id=settings.instance_id,
            status=status,
            run_partition=writer.run,
        )


if __name__ == "__main__":
    configure_logging("transactional ingestor")
    run_process(_main)
