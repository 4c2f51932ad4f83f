"""The projector on a real Kafka and a real MongoDB: every event once, whatever dies, and a loud stop where it must."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import TopicAlreadyExistsError, UnknownTopicOrPartitionError
from aiokafka.structs import TopicPartition
from msgspec import Raw

from local.process import ROOT, ManagedProcess
from local.servers import free_port
from local.services import make_service
from projector import generations
from projector.documents import Checkpoint
from projector.fold import Writes
from projector.loop import MAX_BATCH_BYTES, run
from projector.mongodb import MongoDocumentStore, open_documents
from projector.views import Documents, no_documents, project
from shared.errors import PoisonRecord, RecordsLost, Unavailable
from shared.events import EpisodeChanges, ProjectCreated, ProjectEpisodeCreated, ProjectEpisodeRevised
from shared.ids import namespace_stream
from shared.kafka import open_admin, open_producer
from shared.log import Cursor
from shared.mongo import Client, generation_database, open_mongo
from shared.probes import Status
from shared.read_models import CHECKPOINTS
from shared.settings import EVENTS, KafkaSettings, MongoSettings
from shared.topics import TopicSettings, create_topics
from tests.cluster import ThrowAwayServers, throw_away_servers
from tests.event_log import History, PartitionLog

PARTITIONS = 3
WITHIN = 60.0
ALICE = namespace_stream("alice")


@pytest.fixture(scope="module")
def servers() -> Iterator[ThrowAwayServers]:
    """Servers of our own: other tests have processes that would stumble over what is written here."""
    with throw_away_servers() as running:
        yield running


@dataclass
class Harness:
    """Plays the ingestors, and runs projectors."""

    servers: ThrowAwayServers
    kafka: KafkaSettings
    producer: AIOKafkaProducer
    client: Client
    folder: Path
    logs: Mapping[int, PartitionLog] = field(
        default_factory=lambda: {number: PartitionLog() for number in range(PARTITIONS)}
    )
    written: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(PARTITIONS), 0))
    status: Status = field(default_factory=Status)

    async def write(self, partition: int) -> None:
        """Put what is new in the partition's log into the topic."""
        log = self.logs[partition]
        sent = [
            await self.producer.send(EVENTS, value, key=key, partition=partition)
            for key, value in log.records[self.written[partition] :]
        ]
        for expected, future in enumerate(sent, self.written[partition]):
            assert (await future).offset == expected
        self.written[partition] += len(sent)

    def history(self, partition: int, **options: Any) -> History:
        """Random events for the partition, with names that no other one has."""
        return History(self.logs[partition], random.Random(partition), prefix=f"{partition}-", **options)  # noqa: S311

    async def run_one(self, partition: int, *, max_events: int = 1_000) -> None:
        """Run the loop of one partition, in this process, without a supervisor."""
        generation = await generations.prepare(self.client)
        await run(
            partition,
            kafka=self.kafka,
            open_documents=partial(open_documents, self.client, generation),
            status=self.status,
            max_events=max_events,
        )

    @contextlib.asynccontextmanager
    async def running(self, *partitions: int, **options: Any) -> AsyncIterator[None]:
        """Loops in this process, which must not fail."""
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(self.run_one(partition, **options)) for partition in partitions]
            yield
            for loop in loops:
                loop.cancel()

    def process(self, name: str = "projector", **env: str) -> ManagedProcess:
        """A real projector, not started."""
        return make_service("projector", self.folder, name=name, port=free_port(), env={**self.servers.env, **env})

    async def checkpoint(self, partition: int) -> dict[str, Any]:
        found = await self.database[CHECKPOINTS].find_one({"_id": partition})
        return found or {"position": 0, "offset": 0, "fence": -1}

    async def applied(self, *partitions: int) -> None:
        """Wait until the logs are applied to their ends."""
        for partition in partitions:
            log = self.logs[partition]
            end = {"_id": partition, "position": log.position, "offset": log.offset, "fence": log.fence}
            await until(partial(self._is_at, partition, end), f"{partition} at {end}")

    async def _is_at(self, partition: int, end: dict[str, Any]) -> bool:
        return await self.checkpoint(partition) == end

    @property
    def database(self) -> Any:
        return self.client[generation_database(1)]

    async def documents(self) -> Documents:
        return {
            collection: {one["_id"]: one async for one in self.database[collection].find()}
            for collection in no_documents()
        }

    async def assert_each_event_is_applied_once(self) -> None:
        """Compare with a replay in memory: one event lost or applied twice shows in documents and counters."""
        expected = no_documents()
        for log in self.logs.values():
            for logged in log.events:
                project(expected, logged)
        found = await self.documents()
        for collection, there in expected.items():
            assert found[collection].keys() == there.keys(), collection
            for key, document in there.items():
                assert found[collection][key] == document
                assert [*found[collection][key]] == [*document], "field order too"

    def cli(self, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "projector", *arguments],
            cwd=ROOT,
            env={**os.environ, **self.servers.env, "NO_COLOR": "1", "COLUMNS": "200", **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=WITHIN,
        )


async def until(condition: Callable[[], Awaitable[bool]], what: str, *, within: float = WITHIN) -> None:
    """Wait for the condition."""
    deadline = time.monotonic() + within
    while not await condition():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        await asyncio.sleep(0.05)


async def ready(process: ManagedProcess, reason: str | None = None) -> None:
    """Wait until the process is ready, or is not, for this reason."""

    async def is_so() -> bool:
        missing = await asyncio.to_thread(process.missing)
        return missing is None if reason is None else missing is not None and reason in missing

    await until(is_so, f"{process.name} to be {'ready' if reason is None else reason}: {process.missing()}")


@pytest.fixture
async def harness(servers: ThrowAwayServers, tmp_path: Path) -> AsyncIterator[Harness]:
    """Empty topics and an empty database."""
    kafka = KafkaSettings(bootstrap_servers=servers.kafka_bootstrap)
    with contextlib.suppress(UnknownTopicOrPartitionError):
        async with open_admin(kafka) as admin:
            await admin.delete_topics([EVENTS])

    async def created() -> bool:
        try:
            await create_topics(kafka, TopicSettings(partitions=PARTITIONS))
        except (Unavailable, TopicAlreadyExistsError):
            return False
        return True

    await until(created, "the topics")
    async with (
        open_mongo(MongoSettings(url=servers.mongodb_url)) as client,
        open_producer(kafka) as producer,
    ):
        for name in await client.list_database_names():
            if name.startswith("episodes"):
                await client.drop_database(name)
        yield Harness(servers, kafka, producer, client, tmp_path)


async def test_every_event_is_applied_once(harness: Harness) -> None:
    histories = [harness.history(partition) for partition in range(PARTITIONS)]
    for partition, history in enumerate(histories):
        for _ in range(300):
            history.step()
        history.record(1_500)
        history.log.note()
        history.log.take_over()
        history.step()
        await harness.write(partition)
    async with harness.running(*range(PARTITIONS)):
        await harness.applied(*range(PARTITIONS))
        assert harness.status.partitions == dict.fromkeys(range(PARTITIONS), Status.RUNNING)
        for partition in range(PARTITIONS):
            histories[partition].record()
            await harness.write(partition)
        await harness.applied(*range(PARTITIONS))
    await harness.assert_each_event_is_applied_once()


async def test_what_a_replaced_writer_still_sends_did_not_happen(harness: Harness) -> None:
    history = harness.history(0)
    history.step()
    for _ in range(3):
        history.log.take_over()
        history.log.append_fenced(ALICE, ProjectCreated("zombie", "zombie", "zombie"))
        history.step()
        history.log.append_fenced(ALICE, ProjectCreated("zombie", "zombie", "zombie"))
    await harness.write(0)
    async with harness.running(0):
        await harness.applied(0)
        history.log.append_fenced(ALICE, ProjectCreated("zombie", "zombie", "zombie"))
        await harness.write(0)
        await harness.applied(0)
        history.step()
        await harness.write(0)
        await harness.applied(0)
    await harness.assert_each_event_is_applied_once()


async def test_two_projectors_on_one_partition_apply_each_event_once(harness: Harness) -> None:
    history = harness.history(0)
    async with harness.running(0, 0, 0, max_events=20):
        for _ in range(40):
            for _ in range(30):
                history.step()
            await harness.write(0)
        await harness.applied(0)
    await harness.assert_each_event_is_applied_once()


async def test_an_idle_projector_notices_that_another_one_is_ahead(harness: Harness) -> None:
    history = harness.history(0)
    history.step()
    await harness.write(0)
    async with harness.running(0):
        await harness.applied(0)
        checkpoint = await harness.checkpoint(0)
        await harness.database[CHECKPOINTS].update_one({"_id": 0}, {"$set": {"position": 0, "offset": 0, "fence": -1}})
        for collection in no_documents():
            await harness.database[collection].delete_many({})
        await until(partial(harness._is_at, 0, checkpoint), "it goes on from where the checkpoint is")
    await harness.assert_each_event_is_applied_once()


async def test_killed_in_the_middle_of_the_load_it_applies_each_event_once(harness: Harness) -> None:
    histories = [harness.history(partition, content_bytes=2_000) for partition in range(PARTITIONS)]
    process = harness.process(PROJECTOR_MAX_BATCH_EVENTS="100")
    writing = True

    async def write() -> None:
        while writing:
            for history in histories:
                for _ in range(100):
                    history.step()
            for partition in range(PARTITIONS):
                await harness.write(partition)

    async def moved(before: int) -> bool:
        position: int = (await harness.checkpoint(0))["position"]
        return before < position

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        try:
            process.start()
            for kill in range(5):
                position = (await harness.checkpoint(0))["position"]
                await until(partial(moved, position), f"progress after {kill} kills", within=15)
                await asyncio.sleep(0.05 * kill)
                process.kill()
                await asyncio.to_thread(process.start)
            writing = False
            await harness.applied(*range(PARTITIONS))
        finally:
            process.stop()
    await harness.assert_each_event_is_applied_once()


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (b"\xff not JSON", "not a record of this log"),
        (
            (
                b'{"specversion":"1.0","id":"1","source":"/x","type":"episodes.ProjectEpisodeSung.v3",'
                b'"time":"2026-03-01T12:00:00Z","data":{}}'
            ),
            "unknown event type 'episodes.ProjectEpisodeSung.v3', perhaps of a newer version: upgrade the projector",
        ),
    ],
)
async def test_a_record_that_cannot_be_read_stops_its_partition_loudly_and_no_other(
    harness: Harness, poison: bytes, reason: str
) -> None:
    histories = [harness.history(partition) for partition in range(PARTITIONS)]
    for history in histories:
        for _ in range(20):
            history.step()
    before = harness.logs[1].cursor
    harness.logs[1].append_foreign(poison)
    for _ in range(300):  # so that what is behind it comes in several portions
        histories[1].step()
    process = harness.process()
    process.start()
    try:
        for partition in range(PARTITIONS):
            await harness.write(partition)
        await ready(process, reason)
        await harness.applied(0, 2)
        histories[0].step()
        await harness.write(0)
        await harness.applied(0)

        checkpoint = await harness.checkpoint(1)
        assert (checkpoint["offset"], checkpoint["position"]) == (before.offset, before.position), "all before it"
        assert checkpoint["stopped"]["offset"] == before.offset
        assert f"episodes.events/1, offset {before.offset}: {reason}" in checkpoint["stopped"]["reason"]
        status = harness.cli("status", "--json")
        assert status.returncode == 1
        states = {row["partition"]: row for row in json.loads(status.stdout)["partitions"]}
        assert [states[number]["state"] for number in range(PARTITIONS)] == ["running", "stopped", "running"]
        assert reason in states[1]["reason"]
        assert [states[number]["lag"] for number in range(PARTITIONS)] == [0, harness.logs[1].offset - before.offset, 0]
        table = harness.cli("status")
        assert table.returncode == 1
        assert "stopped: episodes.events/1" in table.stdout
    finally:
        process.stop()


async def test_an_event_that_does_not_fit_stops_the_partition_until_it_does(harness: Harness) -> None:
    log = harness.logs[0]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"))
    revision = ProjectEpisodeRevised("e1", "p1", "robotics", "run-1", EpisodeChanges(name="run-2"))
    log.append(ALICE, revision)
    log.append(ALICE, ProjectCreated("p2", "other", "other"))
    await harness.write(0)
    with pytest.raises(
        PoisonRecord, match=r"offset 2: ProjectEpisodeRevised \(event 2 of namespace:alice, position 2\)"
    ):
        await harness.run_one(0)
    checkpoint = await harness.checkpoint(0)
    assert (checkpoint["position"], checkpoint["stopped"]["offset"]) == (1, 2)
    with pytest.raises(PoisonRecord, match="e1 does not exist"):
        await harness.run_one(0)
    assert (await harness.checkpoint(0))["position"] == 1

    await harness.database.project_episodes.insert_one({"_id": "e1", "name": "run-1", "deleted": False})
    async with harness.running(0):
        await harness.applied(0)  # and "stopped" is gone
    assert (await harness.database.project_episodes.find_one({"_id": "e1"}))["name"] == "run-2"


async def test_a_stop_that_is_over_is_not_reported_any_more_without_new_events(harness: Harness) -> None:
    harness.history(0).step()
    await harness.write(0)
    async with harness.running(0):
        await harness.applied(0)
    await harness.database[CHECKPOINTS].update_one({"_id": 0}, {"$set": {"stopped": {"offset": 9, "reason": "?"}}})
    await harness.database[CHECKPOINTS].update_one({"_id": 0}, {"$currentDate": {"stopped.at": True}})
    async with harness.running(0):
        await harness.applied(0)


def an_episode(number: int, description: str) -> ProjectEpisodeCreated:
    return ProjectEpisodeCreated(
        id=f"e{number}",
        project_id="p1",
        project="robotics",
        ordinal=number,
        name=f"run-{number}",
        description=description,
        tags=(),
        folder=None,
        write_protected=False,
        status="running",
        metadata=Raw(b"null"),
    )


async def test_a_document_that_mongodb_does_not_take_stops_at_exactly_its_event(harness: Harness) -> None:
    log = harness.logs[0]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"))
    for number in range(1, 30):
        log.append(ALICE, an_episode(number, "small"))
    before = log.cursor
    log.append(ALICE, an_episode(30, "x" * 17 * 1024 * 1024), an_episode(31, "small"))
    log.append(ALICE, an_episode(32, "small"))
    await harness.write(0)
    with pytest.raises(PoisonRecord, match=rf"offset {before.offset}: ProjectEpisodeCreated .*MongoDB takes 16777216"):
        await harness.run_one(0)
    checkpoint = await harness.checkpoint(0)
    assert (checkpoint["position"], checkpoint["stopped"]["offset"]) == (before.position, before.offset)
    assert await harness.database.project_episodes.count_documents({}) == 29


async def test_a_document_that_is_there_already_stops_at_exactly_its_event(harness: Harness) -> None:
    log = harness.logs[0]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"))
    cursors = [log.append(ALICE, an_episode(number, "small")).cursor for number in range(1, 101)]
    await harness.write(0)
    await generations.prepare(harness.client)
    await harness.database.project_episodes.insert_one({"_id": "e70"})
    with pytest.raises(PoisonRecord, match=rf"offset {cursors[68].offset}: .*project_episodes/e70 cannot be stored"):
        await harness.run_one(0)
    checkpoint = await harness.checkpoint(0)
    assert (checkpoint["position"], checkpoint["stopped"]["offset"]) == (cursors[68].position, cursors[68].offset)
    assert await harness.database.project_episodes.count_documents({"ordinal": {"$gt": 0}}) == 69


async def test_many_large_documents_are_changed_in_bounded_transactions(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    apply = MongoDocumentStore.apply

    async def measured(store: MongoDocumentStore, before: Cursor, after: Checkpoint, writes: Writes) -> None:
        parts = (*writes.new.values(), *writes.changed.values())
        sizes.append(sum(len(bson.encode(one)) for there in parts for one in there.values()))
        await apply(store, before, after, writes)

    monkeypatch.setattr(MongoDocumentStore, "apply", measured)
    log = harness.logs[0]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"))
    numbers = range(1, 9)
    for number in numbers:
        log.append(ALICE, an_episode(number, "x" * 2_500_000))
    for _ in range(4):
        for number in numbers:
            changes = EpisodeChanges(status="completed")
            log.append(ALICE, ProjectEpisodeRevised(f"e{number}", "p1", "robotics", f"run-{number}", changes))
    await harness.write(0)
    async with harness.running(0):
        await harness.applied(0)
    await harness.assert_each_event_is_applied_once()
    assert max(sizes) <= MAX_BATCH_BYTES + 64 * 1024, sizes


async def test_a_document_that_nearly_fills_mongodbs_limit_is_applied_and_changed(harness: Harness) -> None:
    log = harness.logs[0]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"), an_episode(1, "x" * (16 * 1024 * 1024 - 1_000)))
    changes = EpisodeChanges(status="completed")
    log.append(ALICE, ProjectEpisodeRevised("e1", "p1", "robotics", "run-1", changes))
    await harness.write(0)
    async with harness.running(0):
        await harness.applied(0)
    await harness.assert_each_event_is_applied_once()


async def test_records_that_are_gone_stop_the_partition(harness: Harness) -> None:
    history = harness.history(0)
    for _ in range(20):
        history.step()
    await harness.write(0)
    async with open_admin(harness.kafka) as admin:
        await admin.delete_records({TopicPartition(EVENTS, 0): RecordsToDelete(before_offset=5)})
    with pytest.raises(RecordsLost, match=r"episodes\.events/0"):
        await harness.run_one(0)
    checkpoint = await harness.checkpoint(0)
    assert (checkpoint["position"], checkpoint["stopped"]["offset"]) == (0, 0)


async def test_it_catches_up_by_itself_when_mongodb_is_back(harness: Harness) -> None:
    history = harness.history(0)
    history.step()
    await harness.write(0)
    process = harness.process()
    process.start()
    try:
        await harness.applied(0)
        await ready(process)
        await asyncio.to_thread(harness.servers.mongodb.stop)
        try:
            await ready(process, "waiting:")  # without any event to apply
            for _ in range(50):
                history.step()
            await harness.write(0)
            unreachable = await asyncio.to_thread(harness.cli, "status")
            assert unreachable.returncode == 1
            assert unreachable.stderr.startswith("python -m projector status: MongoDB does not answer as it should: ")
            assert len(unreachable.stderr.splitlines()) == 1
        finally:
            await asyncio.to_thread(harness.servers.mongodb.start)
            await asyncio.to_thread(harness.servers.mongodb.wait_ready)
        await harness.applied(0)
        await ready(process)
    finally:
        process.stop()
    await harness.assert_each_event_is_applied_once()


async def test_it_goes_on_by_itself_when_kafka_is_back(harness: Harness) -> None:
    history = harness.history(0)
    history.step()
    await harness.write(0)
    process = harness.process()
    process.start()
    try:
        await harness.applied(0)
        await ready(process)
        await asyncio.to_thread(harness.servers.kafka.kill)
        try:
            await ready(process, "waiting:")
            unreachable = await asyncio.to_thread(harness.cli, "status")
            assert unreachable.returncode == 1
            assert unreachable.stderr.startswith("python -m projector status: Kafka does not answer as it should: ")
            assert len(unreachable.stderr.splitlines()) == 1
        finally:
            await asyncio.to_thread(harness.servers.kafka.start)
            await asyncio.to_thread(harness.servers.kafka.wait_ready)
        for _ in range(50):
            history.step()
        await harness.write(0)
        await harness.applied(0)
        await ready(process)
    finally:
        process.stop()
    await harness.assert_each_event_is_applied_once()


async def test_it_starts_before_its_servers_and_says_what_it_waits_for(harness: Harness) -> None:
    harness.history(0).step()
    await harness.write(0)
    process = harness.process()
    kafka, mongodb = harness.servers.kafka, harness.servers.mongodb
    await asyncio.to_thread(kafka.stop)
    await asyncio.to_thread(mongodb.stop)
    process.start()
    try:
        try:
            await ready(process, "mongodb")
        finally:
            await asyncio.to_thread(mongodb.start)
            await asyncio.to_thread(mongodb.wait_ready)
        try:
            await ready(process, "kafka")
        finally:
            await asyncio.to_thread(kafka.start)
            await asyncio.to_thread(kafka.wait_ready)
        await ready(process)
        await harness.applied(0)
        status = harness.cli("status", "--json")
        assert status.returncode == 0, status
        assert [row["lag"] for row in json.loads(status.stdout)["partitions"]] == [0] * PARTITIONS
    finally:
        assert process.stop() == 0


async def test_a_partition_that_nobody_works_on_is_not_called_running(harness: Harness) -> None:
    async def nobody() -> bool:
        status = await asyncio.to_thread(harness.cli, "status", "--json")
        states = {row["state"] for row in json.loads(status.stdout)["partitions"]}
        assert status.returncode == (states != {"running"})
        return states == {"nobody works on it"}

    await until(nobody, "the group to forget a killed projector")
