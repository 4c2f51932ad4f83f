"""The writer on a real Kafka: tenures, recoveries, rivals, and records that should not be there."""

import asyncio
import contextlib
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import OffsetOutOfRangeError
from pydantic import ValidationError
from structlog.testing import capture_logs

from ingestor import recovery
from ingestor.reading import PartitionReader, TopicReader
from ingestor.replies import open_replies
from ingestor.settings import IngestorSettings
from ingestor.snapshot_store import open_snapshot_store
from ingestor.snapshots import Manifest, Snapshots
from ingestor.writer import Writer
from local.servers import free_port
from local.services import make_service
from shared.codec import decode_receipt, encode_command
from shared.commands import CORRELATION_ID, REPLY_PARTITION, Command, EpisodeFields, RecordEpisodes
from shared.errors import Fenced, PoisonRecord, RecordsLost, Unavailable
from shared.events import LoggedEvent
from shared.ids import CommandId
from shared.kafka import open_admin, open_partition, open_producer
from shared.log import Commit, Cursor, LogReader
from shared.probes import Status
from shared.receipts import CommandRefused, EpisodesRecorded, EpisodeUpserted, Receipt
from shared.settings import COMMANDS, DEAD_LETTERS, EVENTS, REPLIES, KafkaSettings
from shared.supervisor import error_of
from tests.builders import batch, item, upsert
from tests.topics import remake_topics

SAMPLES = Path(__file__).parents[1] / "samples"
REPLY_TO = 5
WITHIN = 30.0
MAP_BYTES = 1024**3


@dataclass
class Harness:
    """Plays the gateway, and runs writers in this process."""

    kafka: KafkaSettings
    folder: Path
    producer: AIOKafkaProducer
    waiting: dict[CommandId, "asyncio.Future[Receipt]"] = field(default_factory=dict)
    status: Status = field(default_factory=Status)

    async def publish(self, command: Command) -> "asyncio.Future[Receipt]":
        """Put the command into the topic; the future is its receipt."""
        answer = self.waiting[command.command_id] = asyncio.get_running_loop().create_future()
        await self.producer.send_and_wait(
            COMMANDS,
            key=command.stream.encode(),
            value=encode_command(command),
            headers=[(CORRELATION_ID, command.command_id.encode()), (REPLY_PARTITION, str(REPLY_TO).encode())],
        )
        return answer

    async def ask(self, command: Command) -> Receipt:
        async with asyncio.timeout(WITHIN):
            return await (await self.publish(command))

    @contextlib.asynccontextmanager
    async def writing(
        self,
        state: str = "state",
        *,
        partitions: tuple[int, ...] = (0, 1),
        again_after: tuple[type[Exception], ...] = (),
        snapshots: Snapshots | None = None,
    ) -> AsyncIterator[asyncio.Task[None]]:
        """Writers over the partitions; a tenure that ends with one of ``again_after`` is followed by the next."""
        settings = IngestorSettings(
            instance_id=state, state_dir=self.folder / state, dead_letters_per_minute=5, batch_bytes=8 * 1024
        )

        async def one(writer: Writer, partition: int) -> None:
            while True:
                error = await error_of(writer.run(partition))  # as the supervisor does it: no cancellation is lost
                if not isinstance(error, again_after):
                    raise error or AssertionError("the writer ended")

        async def every() -> None:
            async with open_replies(self.kafka) as replies, asyncio.TaskGroup() as tasks:
                writer = Writer(self.kafka, settings, replies, self.status, snapshots)
                for partition in partitions:
                    tasks.create_task(one(writer, partition))

        task = asyncio.create_task(every())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def log(self, partition: int) -> list[Commit]:
        """What happened in the partition, by the reader's rule."""
        async with open_partition(self.kafka, EVENTS, partition) as consumer:
            reader, commits = LogReader(Cursor()), []
            for record in await everything(consumer, EVENTS, partition):
                commit = reader.read(record.offset, record.value)
                commits += [commit] if commit else []
            return commits


async def everything(consumer: AIOKafkaConsumer, topic: str, partition: int) -> list:  # type: ignore[type-arg]
    tp = TopicPartition(topic, partition)
    end = (await consumer.end_offsets([tp]))[tp]
    consumer.seek(tp, 0)
    records: list = []  # type: ignore[type-arg]
    while not records or records[-1].offset < end - 1:
        if end == 0:
            break
        for got in (await consumer.getmany(timeout_ms=500)).values():
            records += got
    return records


@pytest.fixture
async def harness(kafka: KafkaSettings, tmp_path: Path) -> AsyncIterator[Harness]:
    await remake_topics(kafka, partitions=2)
    async with (
        open_producer(kafka, batch_bytes=16 * 1024 * 1024) as producer,
        open_partition(kafka, REPLIES, REPLY_TO) as replies,
    ):
        made = Harness(kafka, tmp_path, producer)
        replies.seek(TopicPartition(REPLIES, REPLY_TO), 0)

        async def listen() -> None:
            while True:
                for records in (await replies.getmany(timeout_ms=500)).values():
                    for record in records:
                        receipt = decode_receipt(record.value)
                        answer = made.waiting.get(receipt.command_id)
                        if answer is not None and not answer.done():
                            answer.set_result(receipt)

        listening = asyncio.create_task(listen())
        yield made
        listening.cancel()
        await asyncio.wait([listening])


def events(commits: list[Commit]) -> list[LoggedEvent]:
    return [event for commit in commits for event in commit.events]


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.02)


async def test_a_command_is_answered_with_the_ids_that_are_in_the_log(harness: Harness) -> None:
    command = upsert("run-1", EpisodeFields(folder="/a/b"))
    async with harness.writing():
        receipt = await harness.ask(command)
    assert isinstance(receipt.outcome, EpisodeUpserted)
    assert receipt.event_id == 5
    written = [event for partition in (0, 1) for event in events(await harness.log(partition))]
    assert [event.event_id for event in written] == [1, 2, 3, 4, 5]
    assert {event.command_id for event in written} == {command.command_id}
    assert written[-1].event.id == receipt.outcome.episode.id


@pytest.mark.parametrize("start", ["warm", "cold", "cold, in small chunks"])
async def test_the_next_tenure_knows_what_the_last_one_did(
    harness: Harness, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"idempotency_key": "k", "request_hash": "h"}
    async with harness.writing():
        first = await harness.ask(upsert("run-1", EpisodeFields(description="first"), **request))
        await harness.ask(upsert("run-1", EpisodeFields(description="second")))
        recorded = await harness.ask(batch(item("a", idempotency_key="i"), item("b")))
    if start != "warm":
        shutil.rmtree(harness.folder / "state")
    if start == "cold, in small chunks":
        monkeypatch.setattr(recovery, "_FETCH_RECORDS", 2)
        monkeypatch.setattr(recovery, "_CHUNK_RECORDS", 1)
    async with harness.writing():
        again = await harness.ask(upsert("run-1", EpisodeFields(description="first"), **request))
        assert again.replayed
        assert again.outcome == first.outcome
        after = await harness.ask(upsert("run-2"))
        assert after.event_id == first.event_id + 2
        repeated = await harness.ask(batch(item("a", idempotency_key="i"), item("c")))
    assert isinstance(recorded.outcome, EpisodesRecorded)
    assert isinstance(repeated.outcome, EpisodesRecorded)
    assert repeated.outcome.event_ids == (1, 3)
    assert repeated.outcome.episode_ids[0] == recorded.outcome.episode_ids[0]


async def test_state_that_belongs_to_another_log_is_not_believed(harness: Harness) -> None:
    async with harness.writing():
        for number in range(20):
            await harness.ask(upsert(f"run-{number}", namespace=f"team-{number}"))
    state = harness.folder / "state"
    (state / "partition-0").rename(state / "other")
    (state / "partition-1").rename(state / "partition-0")
    (state / "other").rename(state / "partition-1")
    async with harness.writing():
        for number in range(20):
            receipt = await harness.ask(upsert(f"run-{number}", namespace=f"team-{number}"))
            assert isinstance(receipt.outcome, EpisodeUpserted)
            assert (receipt.event_id, receipt.outcome.created) == (4, False)


async def test_two_writers_of_one_partition_lose_nothing_and_give_no_id_twice(harness: Harness) -> None:
    """Two owners that fence each other all the time, while commands come in."""
    commands = [batch(item(f"item-{number}"), item("second"), tenant_id=f"t{number % 5}") for number in range(150)]
    fights = (Fenced, Unavailable)
    async with harness.writing("one", again_after=fights), harness.writing("two", again_after=fights):
        answers = []
        for command in commands:
            answers.append(await harness.publish(command))
            await asyncio.sleep(0.005)
        commits = []

        async def all_decided() -> bool:
            nonlocal commits
            commits = [*await harness.log(0), *await harness.log(1)]
            return len(events(commits)) >= 2 * len(commands)

        await until(all_decided)
    written = events(commits)
    assert Counter(event.command_id for event in written) == {command.command_id: 2 for command in commands}
    by_stream: dict[str, list[int]] = {}
    for event in written:
        by_stream.setdefault(event.stream, []).append(event.event_id)
    assert all(ids == list(range(1, len(ids) + 1)) for ids in by_stream.values())
    ids_of = {
        command.command_id: [e.event_id for e in written if e.command_id == command.command_id] for command in commands
    }
    answered = [answer.result() for answer in answers if answer.done()]
    assert answered
    for receipt in answered:
        assert isinstance(receipt.outcome, EpisodesRecorded)
        assert list(receipt.outcome.event_ids) == ids_of[receipt.command_id]
    assert len({commit.fence.nonce for commit in commits if commit.fence}) > 4


async def test_a_stored_value_that_cannot_be_read_has_the_state_made_again(harness: Harness) -> None:
    async with harness.writing():
        receipt = await harness.ask(upsert("run-1"))
    for place in (harness.folder / "state").glob("partition-?"):
        with lmdb.open(str(place), map_size=MAP_BYTES, max_dbs=3) as env:
            values = env.open_db(b"values")
            with env.begin(write=True, db=values) as txn:
                for key in [bytes(key) for key in txn.cursor().iternext(values=False)]:
                    txn.put(key, b'{"damaged"')
    async with harness.writing(again_after=(Unavailable,)):
        assert (await harness.ask(upsert("run-1"))).event_id == receipt.event_id + 1


async def test_the_largest_command_goes_through_in_one_piece(harness: Harness) -> None:
    command = batch(*(item("x" * 15_000) for _ in range(1_000)))
    async with harness.writing():
        receipt = await harness.ask(command)
        huge = await harness.ask(upsert("run-1", EpisodeFields(description="y" * 11_000_000)))
    assert isinstance(receipt.outcome, EpisodesRecorded)
    assert receipt.outcome.event_ids == tuple(range(1, 1001))
    assert isinstance(huge.outcome, EpisodeUpserted)
    async with harness.writing("cold"):
        assert (await harness.ask(upsert("run-1"))).event_id == huge.event_id + 1


async def test_a_command_that_cannot_be_read_is_parked_and_the_partition_goes_on(harness: Harness) -> None:
    headers = [(CORRELATION_ID, b"lost-1"), (REPLY_PARTITION, str(REPLY_TO).encode())]
    answer = harness.waiting[CommandId("lost-1")] = asyncio.get_running_loop().create_future()
    partition = (
        await harness.producer.send_and_wait(COMMANDS, key=b"namespace:alice", value=b"{broken", headers=headers)
    ).partition
    foreign = upsert("run-1", namespace="mallory")
    await harness.producer.send_and_wait(
        COMMANDS, key=b"namespace:alice", value=encode_command(foreign), partition=partition
    )
    async with harness.writing():
        receipt = await harness.ask(upsert("run-1"))
        assert isinstance(receipt.outcome, EpisodeUpserted)
        async with asyncio.timeout(WITHIN):
            told = await answer
        assert isinstance(told.outcome, CommandRefused)
        assert told.outcome.code == "validation_error"
    async with open_partition(harness.kafka, DEAD_LETTERS, partition) as consumer:
        broken, misplaced = await everything(consumer, DEAD_LETTERS, partition)
    headers_found = dict(broken.headers)
    assert broken.value == b"{broken"
    assert headers_found["source-topic"] == COMMANDS.encode()
    assert headers_found["source-partition"] == str(partition).encode()
    assert headers_found["source-offset"] == b"0"
    assert b"not a command" in headers_found["reason"]
    assert headers_found[f"original-{CORRELATION_ID}"] == b"lost-1"
    assert b"is not its command's stream" in dict(misplaced.headers)["reason"]
    async with harness.writing():
        await harness.ask(upsert("run-2"))
    async with open_partition(harness.kafka, DEAD_LETTERS, partition) as consumer:
        assert len(await everything(consumer, DEAD_LETTERS, partition)) == 2


async def test_a_stream_in_the_wrong_partition_is_parked(harness: Harness) -> None:
    command = upsert("run-1")
    right = (await harness.producer.send_and_wait(COMMANDS, key=b"namespace:alice", value=b"")).partition
    await harness.producer.send_and_wait(
        COMMANDS, key=b"namespace:alice", value=encode_command(command), partition=1 - right
    )
    async with harness.writing():
        assert (await harness.ask(upsert("run-1"))).event_id == 3
    assert not events(await harness.log(1 - right))


async def test_too_many_unreadable_commands_stop_the_partition_and_say_why(harness: Harness) -> None:
    for _ in range(6):
        await harness.producer.send_and_wait(COMMANDS, value=b"junk", partition=0)
    async with harness.writing(partitions=(0,)) as writing:
        await asyncio.wait([writing], timeout=WITHIN)
        with pytest.raises(ExceptionGroup) as stopped:
            writing.result()
        assert stopped.group_contains(PoisonRecord, match="more than 5 commands within a minute could not be read")

    async def parked() -> list[bytes]:
        async with open_partition(harness.kafka, DEAD_LETTERS, 0) as consumer:
            letters = await everything(consumer, DEAD_LETTERS, 0)
        return [dict(letter.headers)["source-offset"] for letter in letters]

    async def all_parked() -> bool:
        return len(await parked()) >= 6

    async with harness.writing(partitions=(0,)):  # a person has looked: none is parked a second time
        await until(all_parked)
    assert await parked() == [b"0", b"1", b"2", b"3", b"4", b"5"]


async def test_commands_that_expired_before_they_were_decided_stop_the_partition(harness: Harness) -> None:
    for _ in range(3):
        await harness.producer.send_and_wait(COMMANDS, value=b"junk", partition=0)
    async with open_admin(harness.kafka) as admin:
        await admin.delete_records({TopicPartition(COMMANDS, 0): RecordsToDelete(before_offset=2)})
    async with harness.writing(partitions=(0,)) as writing:
        await asyncio.wait([writing], timeout=WITHIN)
        with pytest.raises(ExceptionGroup) as stopped:
            writing.result()
        assert stopped.group_contains(RecordsLost, match="0 is the next to decide")


async def test_partitions_are_read_by_one_consumer_and_the_trouble_of_one_is_not_that_of_others(
    harness: Harness,
) -> None:
    reader = TopicReader(harness.kafka, COMMANDS)

    async def offsets(partition: PartitionReader, count: int) -> list[int]:
        found: list[int] = []
        async with asyncio.timeout(WITHIN):
            while len(found) < count:
                found += [record.offset for record in await partition.next_records(2)]
        return found

    async def write(partition: int, count: int) -> None:
        for _ in range(count):
            await harness.producer.send_and_wait(COMMANDS, value=b"x", partition=partition)

    await write(0, 3)
    await write(1, 3)
    async with reader.read(1, 1) as second:
        with pytest.raises(OffsetOutOfRangeError):
            async with reader.read(0, 999) as first:
                await offsets(first, 1)
        assert await offsets(second, 2) == [1, 2]
        async with reader.read(0, 0) as first:
            await write(1, 2)
            assert await offsets(first, 3) == [0, 1, 2]
            assert await offsets(second, 2) == [3, 4]
        await write(1, 1)
        assert await offsets(second, 1) == [5]
    with pytest.raises(Unavailable, match="has no partition 7"):
        async with reader.read(7, 0):
            pass


async def test_a_foreign_record_in_the_log_stops_the_recovery_and_says_where(harness: Harness) -> None:
    await harness.producer.send_and_wait(EVENTS, value=b"junk", partition=0)
    async with harness.writing(partitions=(0,)) as writing:
        await asyncio.wait([writing], timeout=WITHIN)
        with pytest.raises(ExceptionGroup) as stopped:
            writing.result()
        assert stopped.group_contains(PoisonRecord, match=r"episodes\.events/0 offset 0")


async def test_a_record_of_a_later_version_stops_the_recovery_and_says_what_to_upgrade(harness: Harness) -> None:
    async with harness.writing():
        await harness.ask(upsert("run-1", EpisodeFields(folder="/a")))
    partition = 0 if events(await harness.log(0)) else 1
    offset = (await harness.log(partition))[-1].cursor.offset
    later = (SAMPLES / "episodes.FolderCreated.v2.json").read_bytes().replace(b"Created.v2", b"Created.v3")
    await harness.producer.send_and_wait(EVENTS, value=later, partition=partition)
    for start in ("warm", "cold"):
        async with harness.writing("state" if start == "warm" else "none", partitions=(partition,)) as writing:
            await asyncio.wait([writing], timeout=WITHIN)
            with pytest.raises(ExceptionGroup) as stopped:
                writing.result()
            why = rf"offset {offset}: unknown event type 'episodes\.FolderCreated\.v3'.*upgrade the projector first"
            assert stopped.group_contains(PoisonRecord, match=why)


async def test_a_partition_moves_with_its_snapshot_and_only_the_tail_is_read(harness: Harness) -> None:
    place = harness.folder / "snapshots"
    request = {"idempotency_key": "k", "request_hash": "h"}
    async with harness.writing("one", snapshots=the_snapshots(place, every=20)):
        first = await harness.ask(upsert("run-1", EpisodeFields(description="first"), **request))
        recorded = await harness.ask(batch(item("a", idempotency_key="i"), namespace="n", **request))
        for number in range(30):
            await harness.ask(upsert(f"run-{number}", EpisodeFields(folder="/a")))
        await until(lambda: len(list(place.glob("*/*.json"))) > 0)
    [listed] = place.glob("*/*.json")
    manifest = msgspec.json.decode(listed.read_bytes(), type=Manifest)
    async with harness.writing("one"):
        tail = await harness.ask(upsert("run-1", EpisodeFields(description="second")))

    with capture_logs() as logs:
        async with harness.writing("two", snapshots=the_snapshots(place, every=1_000_000)):
            again = await harness.ask(upsert("run-1", EpisodeFields(description="first"), **request))
            assert (again.replayed, again.outcome) == (True, first.outcome)
            batch_again = await harness.ask(batch(item("a", idempotency_key="i"), namespace="n", **request))
            assert (batch_again.replayed, batch_again.outcome) == (True, recorded.outcome)
            after = await harness.ask(upsert("run-1"))
            assert isinstance(after.outcome, EpisodeUpserted)
            assert after.event_id == tail.event_id + 1
            assert after.outcome.episode.description == "second"
    began = {entry["partition"]: entry["began_at"] for entry in logs if entry["event"] == "recovered"}
    assert began[manifest.partition] == manifest.checkpoint.cursor.offset > 20


async def test_snapshots_of_another_log_are_left_alone(harness: Harness) -> None:
    place = harness.folder / "snapshots"
    async with harness.writing("one", partitions=(0,), snapshots=the_snapshots(place, every=1)):
        for number in range(40):
            await harness.publish(batch(item(), tenant_id=f"t{number}"))
        await until(lambda: len(list(place.glob("*/*.json"))) > 0)
    listed = max(place.glob("*/*.json"))
    manifest = msgspec.json.decode(listed.read_bytes())
    for fence in (0, 1, 10_000):  # another one's, no fence, not there
        manifest["checkpoint"] |= {"nonce": "of another log"}
        manifest["checkpoint"]["cursor"] |= {"fence": fence}
        listed.with_name(f"{fence:020}-other.json").write_bytes(msgspec.json.encode(manifest))
    for file in place.glob("*/*.json"):
        if not file.name.endswith("-other.json"):
            file.unlink()
    with capture_logs() as logs:
        async with harness.writing("two", partitions=(0,), snapshots=the_snapshots(place, every=1_000)):
            await until(lambda: any(entry["event"] == "recovered" for entry in logs))
    ignored = [entry["reason"] for entry in logs if entry["event"] == "snapshot ignored"]
    assert ignored == ["it is of another log: the fence that it names is not there"] * 3
    assert [entry["began_at"] for entry in logs if entry["event"] == "recovered"] == [0]


async def test_an_ingestor_writes_snapshots_to_the_place_that_its_settings_name(harness: Harness) -> None:
    place = harness.folder / "snapshots"
    settings = {"INGESTOR_SNAPSHOT_URL": place.as_uri(), "INGESTOR_SNAPSHOT_EVERY": "1"}
    kafka = {"KAFKA_BOOTSTRAP_SERVERS": harness.kafka.bootstrap_servers}
    process = make_service("ingestor", harness.folder, name="real", port=free_port(), env={**kafka, **settings})
    process.start()
    try:
        await harness.ask(upsert("run-1"))
        await until(lambda: len(list(place.glob("*/*.json"))) > 0)
    finally:
        assert await asyncio.to_thread(process.stop) == 0


@pytest.mark.parametrize("url", ["/folder", "file://folder", "file:///", "s3://", "ftp://host/x", ""])
def test_a_place_for_snapshots_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValidationError, match="snapshot_url"):
        IngestorSettings(snapshot_url=url)


def the_snapshots(place: Path, *, every: int) -> Snapshots:
    return Snapshots(open_snapshot_store(place.as_uri()), every=every, ahead=1)


async def test_a_command_that_was_decided_but_not_answered_is_answered_by_the_next_tenure(harness: Harness) -> None:
    """As after a kill between the append and the reply: the log has the events, the stored state is behind it."""
    commands: list[Command] = [upsert("run-1", EpisodeFields(folder="/a")), batch(item("x"), tenant_id="t1")]
    async with harness.writing():
        first = [await harness.ask(command) for command in commands]
    shutil.rmtree(harness.folder / "state")
    for command in commands:
        harness.waiting[command.command_id] = asyncio.get_running_loop().create_future()
    async with harness.writing(), asyncio.timeout(WITHIN):
        assert [await harness.waiting[command.command_id] for command in commands] == first


async def test_a_tenure_that_ends_in_order_answers_what_is_on_its_way(harness: Harness) -> None:
    commands: list[RecordEpisodes] = [batch(item(), tenant_id=f"t{number}") for number in range(200)]
    async with harness.writing():
        await harness.ask(batch(item()))
        answers = [await harness.publish(command) for command in commands]
    decided = {event.command_id for partition in (0, 1) for event in events(await harness.log(partition))}
    await until(
        lambda: all(
            answer.done() for command, answer in zip(commands, answers, strict=True) if command.command_id in decided
        )
    )
    assert decided
