"""Records of one partition, some at a time."""

import time
from collections.abc import Sequence

from aiokafka import AIOKafkaConsumer, ConsumerRecord

from shared.errors import Unavailable
from shared.kafka import translated

SILENCE_SECONDS = 10.0
"""Where records are known to be, Kafka that gives none for so long is away."""


async def next_records(
    consumer: AIOKafkaConsumer, what: str, *, most: int = 1_000, give_up_after: float = float("inf")
) -> Sequence[ConsumerRecord]:
    """The next records, at least one.

    Raises:
        Unavailable: none came for ``give_up_after`` seconds.
    """
    began = time.monotonic()
    with translated(what):
        while True:
            taken = await consumer.getmany(timeout_ms=500, max_records=most)
            for records in taken.values():
                return records  # type: ignore[no-any-return]  # there is one partition
            if time.monotonic() - began > give_up_after:
                raise Unavailable(f"{what}: nothing came for {give_up_after} s")
