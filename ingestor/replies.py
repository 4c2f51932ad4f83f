"""Carries receipts back to the gateways that wait for them.

A reply may be lost, and nothing else with it: the caller hears 504 and gets the same receipt by a retry under the same
Idempotency-Key. So a slow or broken reply topic never holds a writer up.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiokafka import AIOKafkaProducer

from shared.codec import encode_receipt
from shared.errors import Unavailable
from shared.kafka import MAX_RECORD_BYTES, open_producer, partitions_of, translated
from shared.receipts import Receipt
from shared.settings import REPLIES, KafkaSettings
from shared.supervisor import backoff

_MOST_WAITING = 20_000
_BATCH_BYTES = 512 * 1024
_FLUSH_SECONDS = 2.0

_log = structlog.get_logger(__name__)


class Replies:
    """A bounded queue of receipts. Full, it drops and counts."""

    def __init__(self) -> None:
        self.dropped = 0
        self._waiting: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(_MOST_WAITING)

    def send(self, partition: int, receipt: Receipt) -> None:
        """Send the receipt to the gateway that listens to ``partition`` of the replies topic, without waiting."""
        try:
            self._waiting.put_nowait((partition, encode_receipt(receipt)))
        except asyncio.QueueFull:
            self._drop(1, "too many replies wait")

    async def run(self, settings: KafkaSettings) -> None:
        """Send what waits, until cancelled."""
        attempt = 0
        while True:
            try:
                async with open_producer(
                    settings, batch_bytes=MAX_RECORD_BYTES, idempotent=False, compression=None
                ) as producer:
                    attempt = 0
                    while True:
                        await self._send_some(producer, [await self._waiting.get()])
            except Unavailable as error:
                attempt += 1
                _log.warning("replies wait for Kafka", reason=str(error))
                await asyncio.sleep(backoff(attempt))

    async def flush(self) -> None:
        """Give what waits a moment to leave."""
        try:
            async with asyncio.timeout(_FLUSH_SECONDS):
                await self._waiting.join()
        except TimeoutError:
            self._drop(self._waiting.qsize(), "the process ends")

    async def _send_some(self, producer: AIOKafkaProducer, taken: list[tuple[int, bytes]]) -> None:
        while not self._waiting.empty():
            taken.append(self._waiting.get_nowait())
        by_partition: dict[int, list[bytes]] = defaultdict(list)
        for partition, value in taken:
            by_partition[partition].append(value)
        try:
            for partition, values in by_partition.items():
                await self._send_to(producer, partition, values)
        except Unavailable as error:
            self._settle(sum(map(len, by_partition.values())), str(error))
            raise

    async def _send_to(self, producer: AIOKafkaProducer, partition: int, values: list[bytes]) -> None:
        if partition >= await partitions_of(producer, REPLIES):
            self._settle(len(values), f"{REPLIES} has no partition {partition}")
            values.clear()
            return
        while values:
            batch, size, count = producer.create_batch(), 0, 0
            while count < len(values) and (not count or size + len(values[count]) <= _BATCH_BYTES):
                batch.append(key=None, value=values[count], timestamp=None)
                size += len(values[count])
                count += 1
            batch.close()
            with translated("sending replies"):
                sent = await producer.send_batch(batch, REPLIES, partition=partition)
            del values[:count]
            sent.add_done_callback(lambda future, count=count: self._settle(count, _failure(future)))

    def _settle(self, count: int, failure: str | None) -> None:
        """So many replies are acknowledged, or lost."""
        if failure is not None:
            self._drop(count, failure)
        for _ in range(count):
            self._waiting.task_done()

    def _drop(self, count: int, reason: str) -> None:
        self.dropped += count
        _log.error("replies dropped: their callers will hear 504", count=count, total=self.dropped, reason=reason)


def _failure(sent: "asyncio.Future[object]") -> str | None:
    if sent.cancelled():
        return "the sending was cancelled"
    error = sent.exception()
    return None if error is None else str(error)


@asynccontextmanager
async def open_replies(settings: KafkaSettings) -> AsyncIterator[Replies]:
    """Replies that are sent in the background; on the way out, what waits still leaves."""
    replies = Replies()
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(replies.run(settings))
        try:
            yield replies
        finally:
            await replies.flush()
            sending.cancel()
