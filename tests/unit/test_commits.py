"""Commits of a partition, from a consumer that sends what a test wants."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

import shared.kafka
from projector.commits import CommitSource
from shared.errors import RecordsLost, Unavailable
from shared.events import NamespaceCreated
from shared.ids import namespace_stream
from shared.log import Cursor
from shared.settings import EVENTS
from tests.event_log import PartitionLog

PARTITION = TopicPartition(EVENTS, 0)


class Sent(NamedTuple):
    """As much of a record as is looked at."""

    offset: int
    value: bytes


class Consumer:
    """Sends all that it has at once."""

    def __init__(self, records: Sequence[Sent]) -> None:
        self._records = list(records)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        assert (partition, offset) == (PARTITION, 0)

    async def getmany(self, partition: TopicPartition, **_: Any) -> dict[TopicPartition, list[Sent]]:
        sent, self._records = self._records, []
        return {partition: sent}


async def test_what_stands_before_a_gap_is_taken_and_the_gap_is_the_end() -> None:
    log = PartitionLog()
    for name in ("alice", "bob", "carol"):
        log.append(namespace_stream(name), NamespaceCreated(f"id-of-{name}", name))
    records = [Sent(offset, value) for offset, (_, value) in enumerate(log.records)]
    gap = len(records) - 1
    records[gap] = Sent(gap + 1, records[gap].value)

    source = CommitSource(cast("AIOKafkaConsumer", Consumer(records)), 0, Cursor())
    portion = await source.take(max_events=100, max_bytes=10**6)

    assert portion.commits == tuple(log.commits[:-1])
    assert portion.cursor == log.commits[-2].cursor
    assert portion.end is not None
    assert isinstance(portion.end.error, RecordsLost)
    assert f"{EVENTS}/0, offset {gap + 1}: " in str(portion.end.error)


class Silent(Consumer):
    """Kafka answers questions about offsets, and no fetch."""

    def last_poll_timestamp(self, _: TopicPartition) -> None:
        return None

    async def end_offsets(self, _: Any) -> dict[TopicPartition, int]:
        return {PARTITION: 0}


async def test_fetches_that_are_not_answered_are_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    source = CommitSource(cast("AIOKafkaConsumer", Silent([])), 0, Cursor())
    quiet = await source.take(max_events=100, max_bytes=10**6)
    assert (quiet.commits, quiet.end) == ((), None)
    monkeypatch.setattr(shared.kafka, "_UNANSWERED_SECONDS", 1e-9)
    portion = await source.take(max_events=100, max_bytes=10**6)
    assert portion.end is not None
    assert isinstance(portion.end.error, Unavailable)
