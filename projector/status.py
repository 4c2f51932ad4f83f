"""How far the read models are behind the log, asked of Kafka and MongoDB: the projector itself may be dead."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from aiokafka import TopicPartition
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import for_code
from msgspec import Struct
from rich.table import Table
from rich.text import Text

from projector.documents import Checkpoint, read_checkpoints
from shared.errors import Unavailable
from shared.kafka import REQUEST_TIMEOUT_MS, open_admin, open_partition, translated
from shared.mongo import open_mongo
from shared.settings import EVENTS, KafkaSettings, MongoSettings

GROUP = "episodes-projector"

RUNNING, STOPPED, NOBODY = "running", "stopped", "nobody works on it"


class PartitionStatus(Struct, frozen=True):
    """One partition of the log. ``lag`` is how many records are not applied yet."""

    partition: int
    position: int
    offset: int
    log_end_offset: int
    lag: int
    state: str
    reason: str | None = None
    """Why it is stopped."""


class ProjectorStatus(Struct, frozen=True):
    generation: int
    partitions: tuple[PartitionStatus, ...]

    @property
    def good(self) -> bool:
        """Whether every partition goes on."""
        return all(partition.state == RUNNING for partition in self.partitions)


async def read_status(kafka: KafkaSettings, mongo: MongoSettings) -> ProjectorStatus:
    """Ask both servers.

    Raises:
        Unavailable: one of them does not answer.
    """
    with _naming("MongoDB"):
        async with open_mongo(mongo) as client:
            generation, checkpoints = await read_checkpoints(client)
    with _naming("Kafka"):
        taken = await _partitions(kafka)
        ends = await _log_ends(kafka, taken)
    return ProjectorStatus(
        generation,
        tuple(
            _partition(number, checkpoints.get(number, Checkpoint()), ends[number], taken=is_taken)
            for number, is_taken in sorted(taken.items())
        ),
    )


def table(status: ProjectorStatus) -> Table:
    """The status for a person."""
    result = Table(title=f"Read models, generation {status.generation}")
    for heading in ("partition", "position", "offset", "log end", "lag"):
        result.add_column(heading, justify="right")
    result.add_column("state", overflow="fold")
    for row in status.partitions:
        state = Text(row.state if row.reason is None else f"{row.state}: {row.reason}")
        state.stylize("green" if row.state == RUNNING else "red")
        numbers = (row.partition, row.position, row.offset, row.log_end_offset, row.lag)
        result.add_row(*(f"{number:,}" for number in numbers), state)
    return result


def _partition(number: int, checkpoint: Checkpoint, end: int, *, taken: bool) -> PartitionStatus:
    cursor, stopped = checkpoint.cursor, checkpoint.stopped
    if stopped is not None:
        state, reason = STOPPED, f"{stopped.reason} (at {stopped.at:%Y-%m-%d %H:%M:%S} UTC)"
    else:
        state, reason = RUNNING if taken else NOBODY, None
    return PartitionStatus(number, cursor.position, cursor.offset, end, max(0, end - cursor.offset), state, reason)


@contextmanager
def _naming(server: str) -> Iterator[None]:
    try:
        yield
    except Unavailable as error:
        raise Unavailable(f"{server} does not answer as it should: {error}") from error


async def _log_ends(kafka: KafkaSettings, partitions: Iterable[int]) -> Mapping[int, int]:
    async with open_partition(kafka, EVENTS, 0) as consumer:
        with translated(f"reading the ends of {EVENTS}"):
            async with asyncio.timeout(REQUEST_TIMEOUT_MS / 1000):
                ends = await consumer.end_offsets([TopicPartition(EVENTS, number) for number in partitions])
    return {tp.partition: offset for tp, offset in ends.items()}


async def _partitions(kafka: KafkaSettings) -> Mapping[int, bool]:
    """Each partition of the log, and whether a projector has it by its membership in the group."""
    async with open_admin(kafka) as admin:
        with translated(f"asking Kafka for {EVENTS} and the group {GROUP}"):
            [topic] = await admin.describe_topics([EVENTS])
            if topic["error_code"]:
                raise for_code(topic["error_code"])
            [response] = await admin.describe_consumer_groups([GROUP])
            [(error_code, _, _, _, _, members, *_)] = response.groups
            if error_code:
                raise for_code(error_code)
    taken = {
        tp.partition
        for *_, assignment in members
        if assignment
        for tp in ConsumerProtocolMemberAssignment.decode(assignment).partitions()
    }
    return {partition["partition"]: partition["partition"] in taken for partition in topic["partitions"]}
