"""Backup and restore on a real Kafka: what comes out of an archive is what went in."""

import asyncio
import contextlib
import json
import random
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from typer.testing import CliRunner, Result

from ingestor.replies import Replies
from ingestor.settings import IngestorSettings
from ingestor.writer import Writer
from shared.archive.__main__ import app
from shared.archive.export import export_log
from shared.archive.files import ArchiveRefused, Manifest, read_file, read_manifest
from shared.archive.restore import ImportRefused, check_archive, import_archive
from shared.codec import decode_record
from shared.errors import Fenced, PoisonRecord, RecordsLost
from shared.events import BEFORE_ALL_COMMANDS, IMPORT_UNFINISHED, LoggedEvent, LoggedNote, LogRecord
from shared.ids import StreamId
from shared.kafka import append_together, describe_topic, open_producer, partition_of
from shared.log import Commit, Cursor, LogReader
from shared.probes import Status
from shared.settings import EVENTS, KafkaSettings
from tests.cluster import Cluster, throw_away_cluster, throw_away_servers
from tests.e2e.client import Http, Project, Tenant, body_of, event_id_of, open_http
from tests.event_log import History, PartitionLog
from tests.topics import everything, remake_topics

Written = dict[tuple[str, int], dict[str, Any]]
PLACE = frozenset({"position", "writer", "commandoffset"})
"""What an event says of its place in the log; all else is the same in every copy."""


def quiet(what: str, done: int, total: int) -> None:
    pass


async def archive_tool(bootstrap: str, *arguments: object, **env: str) -> Result:
    """What ``python -m shared.archive`` says."""
    argv = [*map(str, arguments)]
    return await asyncio.to_thread(
        CliRunner().invoke, app, argv, env={"KAFKA_BOOTSTRAP_SERVERS": bootstrap, **env}, catch_exceptions=False
    )


async def log_of(kafka: KafkaSettings) -> list[list[Commit]]:
    """What happened in each partition, by the reader's rule."""
    _, partitions = await describe_topic(kafka, EVENTS)
    commits: list[list[Commit]] = []
    for partition in range(partitions):
        reader = LogReader(Cursor())
        read = [reader.read(record.offset, record.value) for record in await everything(kafka, EVENTS, partition)]
        commits.append([commit for commit in read if commit is not None])
    return commits


async def raw_events(kafka: KafkaSettings) -> Written:
    """(Stream, event_id) → what must be the same in every copy of the log, as it is written there."""
    _, partitions = await describe_topic(kafka, EVENTS)
    found: Written = {}
    for partition in range(partitions):
        reader = LogReader(Cursor())
        for record in await everything(kafka, EVENTS, partition):
            dropped = reader.fenced_events
            reader.read(record.offset, record.value)
            event = msgspec.json.decode(record.value, type=dict[str, msgspec.Raw])
            if "eventid" in event and reader.fenced_events == dropped:
                stream, event_id = (json.loads(bytes(event[name])) for name in ("streamid", "eventid"))
                assert record.key == stream.encode()
                found[stream, event_id] = {
                    "timestamp": record.timestamp,
                    **{name: bytes(text) for name, text in event.items() if name not in PLACE},
                }
    return found


def events_of(commits: Sequence[Commit]) -> list[LoggedEvent]:
    return [event for commit in commits for event in commit.events]


# ---- everything, through the gateway ---------------------------------------------------------------------------------


@contextlib.contextmanager
def empty_cluster(partitions: int) -> Iterator[Cluster]:
    """Topics, and no process yet."""
    with throw_away_servers() as servers:
        cluster = Cluster(servers, servers.folder / "cluster", {"TOPICS_PARTITIONS": str(partitions)})
        cluster.run_topics()
        try:
            yield cluster
        finally:
            cluster.stop()


class Caller:
    """Sends the same requests to one cluster or another."""

    def __init__(self, http: Http, cluster: Cluster) -> None:
        self.http = http
        self.projects = [
            Project(http, name, slug, cluster.token(name))
            for name in ("alice", "bob", "carol")
            for slug in ("robotics", "Größe/Maß")
        ]
        self.tenants = [Tenant(http, name, cluster.api_key) for name in ("acme", "globex", "my-app")]

    async def keyed_requests(self) -> list[httpx.Response]:
        """One write of each kind under an Idempotency-Key: the first time it does something, later it repeats."""
        project, tenant = self.projects[0], self.tenants[0]
        item = {"content": "Once.", "idempotency_key": "item-1", "metadata": {"big": 2**70, "n": 1e15}}
        return [
            await project.upsert("keyed", headers=key("upsert"), folder="/a/b", metadata={"x": 2**70}),
            await project.patch("keyed", headers=key("patch"), description="Patched."),
            await project.restore("keyed", headers=key("restore what lives")),
            await project.delete("keyed", headers=key("delete")),
            await tenant.record(item, {"source": "no content"}, {"content": "Two."}, headers=key("batch")),
            await tenant.record({**item, "idempotency_key": "item-1"}, headers=key("batch without anything new")),
        ]

    async def refused_requests(self) -> None:
        project = self.projects[1]
        assert (await project.delete("never was")).status_code == HTTPStatus.NOT_FOUND
        await project.upsert("protected", writeProtected=True)
        assert (await project.patch("protected", description="x")).status_code >= HTTPStatus.BAD_REQUEST
        assert (await project.upsert("other", headers=key("upsert once"))).is_success
        assert (await project.upsert("else", headers=key("upsert once"))).status_code == HTTPStatus.UNPROCESSABLE_ENTITY

    async def mixed_requests(self, round_: int) -> None:
        for number, project in enumerate(self.projects):
            await project.given(f"run-{round_}", folder=f"/r/{round_}", tags=["a"], metadata={"round": round_})
            await project.patch(f"run-{round_}", status="completed", newName=f"run-{round_}-done")
            await project.given(f"gone-{round_}")
            await project.delete(f"gone-{round_}")
            if number % 2:
                await project.restore(f"gone-{round_}")
        for tenant in self.tenants:
            items = [
                {"content": f"{round_}: {number}", "entities": [{"name": "x", "type": "y"}]} for number in range(9)
            ]
            await tenant.given(*items)

    async def reads(self, episode_ids: Sequence[tuple[Tenant, str]]) -> list[tuple[int, bytes, str | None]]:
        """Everything that a reader can see."""
        answers = []
        for project in self.projects:
            answers += [await project.list(page=page, pageSize=3) for page in (1, 2, 3)]
            names = await project.names()
            answers += [await project.get(name) for name in [*names, "keyed", "gone-1", "never was"]]
        for tenant, episode_id in episode_ids:
            mine = next(one for one in self.tenants if one.tenant_id == tenant.tenant_id)
            answers.append(await mine.get(episode_id))
        return [(answer.status_code, comparable(answer), answer.headers.get("x-event-id")) for answer in answers]


def key(text: str) -> dict[str, str]:
    return {"Idempotency-Key": text.replace(" ", "-")}


def comparable(answer: httpx.Response) -> bytes:
    """The body; problems without the id of the request."""
    if answer.is_success:
        return answer.content
    return json.dumps({name: text for name, text in answer.json().items() if name != "request_id"}).encode()


async def spoil(cluster: Cluster) -> int:
    """Write what a replaced writer would: copies of the last records. The ingestor must then fence anew."""
    kafka, written = KafkaSettings(bootstrap_servers=cluster.servers.kafka_bootstrap), 0
    async with open_producer(kafka) as producer:
        for partition in range(3):
            for record in [one for one in await everything(kafka, EVENTS, partition) if one.key][-3:]:
                await producer.send_and_wait(EVENTS, record.value, key=record.key, partition=partition)
                written += 1
    return written


async def test_a_restored_log_answers_as_the_original_did(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    with throw_away_cluster(settings={"TOPICS_PARTITIONS": "3"}) as original:
        source = KafkaSettings(bootstrap_servers=original.servers.kafka_bootstrap)
        async with open_http(original.url) as http:
            caller = Caller(http, original)
            await caller.mixed_requests(1)
            first_answers = await caller.keyed_requests()
            assert [answer.status_code for answer in first_answers] == [201, 200, 200, 200, 201, 201]
            assert await spoil(original)
            await asyncio.to_thread(original.processes["ingestor"].restart)
            await caller.refused_requests()
            await caller.mixed_requests(2)
            written = await raw_events(source)
            episode_ids = [
                (tenant, json.loads(event["subject"]))
                for tenant in caller.tenants
                for (stream, _), event in written.items()
                if stream == tenant.stream
            ]
            reads_before = await caller.reads(episode_ids)
        said = await archive_tool(source.bootstrap_servers, "export", folder, "--json")
        assert said.exit_code == 0, said.stderr
        assert "episodes.events/2: " in said.stderr
        await asyncio.to_thread(original.processes["ingestor"].stop)
        shutil.copytree(original.folder / "ingestor", tmp_path / "state of the log of before")
    manifest = msgspec.json.decode(said.stdout, type=Manifest)
    assert manifest == read_manifest(folder)
    assert manifest.source.cluster
    assert (manifest.source.partitions, manifest.events) == (3, len(written))
    assert manifest.records - manifest.events == 2, "one note of a restore, one of a batch without anything new"

    with empty_cluster(partitions=5) as restored:
        target = KafkaSettings(bootstrap_servers=restored.servers.kafka_bootstrap)
        said = await archive_tool(target.bootstrap_servers, "import", folder, FORCE_COLOR="1")
        assert said.exit_code == 0, said.stderr
        assert "partition-2.ndjson.zst → episodes.events" in said.stderr, "a bar for each file"
        assert (
            said.stdout == f"{len(written):,} events, 2 kept answers imported into {EVENTS}: the ingestors may start\n"
        )
        assert await raw_events(target) == written
        commits = await log_of(target)
        assert {event.command_offset for some in commits for event in events_of(some)} == {BEFORE_ALL_COMMANDS}
        assert len([some for some in commits if events_of(some)]) > 3, "the streams are spread over the new partitions"

        shutil.copytree(tmp_path / "state of the log of before", restored.folder / "ingestor")
        await asyncio.to_thread(start, restored)
        async with open_http(restored.url) as http:
            caller = Caller(http, restored)
            caller.http.last_event_ids = last_event_ids(written)
            assert await caller.reads(episode_ids) == reads_before
            again = await caller.keyed_requests()
            for first, second in zip(first_answers, again, strict=True):
                assert second.headers["idempotency-replayed"] == "true"
                assert (second.status_code, second.content) == (first.status_code, first.content)
            assert await raw_events(target) == written, "retries add nothing"
            project = caller.projects[0]
            answer = await project.upsert("after the restore")
            assert event_id_of(answer) == last_event_ids(written)[project.stream] + 1
            body_of(await project.get("after the restore"), HTTPStatus.OK)


def start(cluster: Cluster) -> None:
    for kind in ("gateway", "ingestor", "projector"):
        cluster.add_process(kind, kind).start()
    for process in cluster.processes.values():
        process.wait_ready()


def last_event_ids(written: Written) -> dict[str, int]:
    found: dict[str, int] = {}
    for stream, event_id in written:
        found[stream] = max(event_id, found.get(stream, 0))
    return found


# ---- on Kafka alone --------------------------------------------------------------------------------------------------


def a_log(commands: int = 300) -> PartitionLog:
    log = PartitionLog()
    history = History(log, random.Random(7))  # noqa: S311
    for number in range(commands):
        if number % 50 == 25:
            log.take_over()
        history.step()
        if number % 20 == 0:
            log.note()
            log.append_fenced(log.events[-1].stream, log.events[-1].event)
    return log


@pytest.fixture
async def archive(kafka: KafkaSettings, tmp_path: Path) -> Path:
    """An archive of one partition; the topics are then empty again, with three partitions."""
    await put_log(kafka, a_log())
    await export_log(kafka, tmp_path / "archive", None, quiet)
    await remake_topics(kafka, partitions=3)
    return tmp_path / "archive"


async def put_log(kafka: KafkaSettings, log: PartitionLog) -> None:
    await remake_topics(kafka, partitions=1)
    async with open_producer(kafka) as producer:
        for key_, value in log.records:
            await producer.send(EVENTS, value, key=key_, partition=0)
        await producer.flush()


@contextlib.asynccontextmanager
async def ingestor(kafka: KafkaSettings, folder: Path, partition: int) -> AsyncIterator[asyncio.Task[None]]:
    settings = IngestorSettings(instance_id="one", state_dir=folder / "state")
    task = asyncio.create_task(Writer(kafka, settings, Replies(), Status()).run(partition))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_an_export_holds_what_happened_and_nothing_else(kafka: KafkaSettings, tmp_path: Path) -> None:
    log = a_log()
    await put_log(kafka, log)
    manifest = await export_log(kafka, tmp_path / "archive", None, quiet)
    [entry] = manifest.files
    archived = list(read_file(tmp_path / "archive", manifest.source, entry))
    assert [one.records for one in archived] == [commit.events for commit in log.commits if commit.events]
    assert entry.first is not None
    assert entry.last is not None
    assert (entry.first.offset, entry.last.offset, entry.until) == (1, log.commits[-1].cursor.offset - 1, log.offset)


async def test_one_stream_is_exported_and_restored_alone(kafka: KafkaSettings, tmp_path: Path) -> None:
    log = a_log()
    await put_log(kafka, log)
    stream = StreamId("namespace:n1")
    manifest = await export_log(kafka, tmp_path / "archive", stream, quiet)
    wanted = [event for event in log.events if event.stream == stream]
    assert manifest.events == len(wanted)
    assert manifest.source.stream == stream
    await remake_topics(kafka, partitions=3)
    await import_archive(kafka, tmp_path / "archive", quiet)
    commits = await log_of(kafka)
    found = events_of(commits[partition_of(stream.encode(), 3)])
    assert [(event.event_id, event.event) for event in found] == [(event.event_id, event.event) for event in wanted]
    with pytest.raises(ArchiveRefused, match="nothing of the stream 'tenant:nobody'"):
        await export_log(kafka, tmp_path / "nothing", StreamId("tenant:nobody"), quiet)


async def test_a_log_that_is_not_empty_takes_no_import(
    kafka: KafkaSettings, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await import_archive(kafka, archive, quiet)
    before = await raw_events(kafka)
    with pytest.raises(ImportRefused, match=r"episodes\.events/0 is not empty.*Delete the topics"):
        await import_archive(kafka, archive, quiet)
    assert await raw_events(kafka) == before

    async def blind(kafka: KafkaSettings, partitions: int) -> None:
        pass

    monkeypatch.setattr("shared.archive.restore._require_empty", blind)
    with pytest.raises(ImportRefused, match=r"the import's fence landed at offset \d+"):
        await import_archive(kafka, archive, quiet)
    assert await raw_events(kafka) == before


async def test_a_damaged_archive_changes_nothing(kafka: KafkaSettings, archive: Path) -> None:
    path = archive / "partition-0.ndjson.zst"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArchiveRefused, match=r"partition-0\.ndjson\.zst, line 1 is missing"):
        await import_archive(kafka, archive, quiet)
    assert await log_of(kafka) == [[], [], []]


async def test_no_ingestor_starts_on_half_an_import_and_none_is_exported(
    kafka: KafkaSettings, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.archive.restore._BATCH_BYTES", 4_000)
    half = check_archive(archive, quiet).records // 2

    def stop_halfway(what: str, done: int, total: int) -> None:
        if EVENTS in what and done > half:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await import_archive(kafka, archive, stop_halfway)
    commits = await log_of(kafka)
    assert any(events_of(some) for some in commits), "some of it is in"
    for partition, some in enumerate(commits):
        assert some[-1].command_offset == IMPORT_UNFINISHED
        async with ingestor(kafka, tmp_path, partition) as task:
            await asyncio.wait([task], timeout=20)
            assert isinstance(task.exception(), RecordsLost)
            assert "holds an import that was not finished" in str(task.exception())
    with pytest.raises(ArchiveRefused, match="holds an import that was not finished"):
        await export_log(kafka, tmp_path / "again", None, quiet)


async def test_every_batch_of_an_import_but_the_last_says_that_it_is_not_finished(
    kafka: KafkaSettings, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.archive.restore._BATCH_BYTES", 4_000)
    batches: list[tuple[int, list[LogRecord]]] = []
    on_their_way: list[asyncio.Future[Any]] = []

    async def append_and_note(producer: AIOKafkaProducer, topic: str, partition: int, records: Any) -> Any:
        decoded = [decode_record(value) for _, value, _ in records]
        batches.append((partition, decoded))
        sent = await append_together(producer, topic, partition, records)
        if isinstance(decoded[-1], LoggedNote) and decoded[-1].command_offset == BEFORE_ALL_COMMANDS:
            assert all(earlier.done() for earlier in on_their_way), "nothing is finished before all of it is in"
        else:
            on_their_way.append(sent)
        return sent

    monkeypatch.setattr("shared.archive.restore.append_together", append_and_note)
    await import_archive(kafka, archive, quiet)
    last = [records[-1] for _, records in batches]
    assert len(last) > 20
    assert all(isinstance(note, LoggedNote) and note.command_offset == IMPORT_UNFINISHED for note in last[:-3])
    assert all(isinstance(note, LoggedNote) and note.command_offset == BEFORE_ALL_COMMANDS for note in last[-3:])
    assert [partition for partition, _ in batches[:3]] == [partition for partition, _ in batches[-3:]] == [0, 1, 2]
    for _, records in batches:
        events = [record for record in records if isinstance(record, LoggedEvent)]
        assert not events or events[-1].completes is not None, "a batch holds whole commands"


async def test_another_writer_during_an_import_ends_it(
    kafka: KafkaSettings, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.archive.restore._BATCH_BYTES", 4_000)
    monkeypatch.setattr("shared.archive.restore._ON_THEIR_WAY_BYTES", 1)
    intruder: list[AIOKafkaProducer] = []

    async def append_and_intrude(producer: AIOKafkaProducer, topic: str, partition: int, records: object) -> object:
        if not intruder and isinstance(records, list) and len(records) > 2:
            intruder.append(producer)
            await producer.send_and_wait(EVENTS, b"{}", partition=partition)
        return await append_together(producer, topic, partition, records)  # type: ignore[arg-type]

    monkeypatch.setattr("shared.archive.restore.append_together", append_and_intrude)
    with pytest.raises(Fenced, match=r"landed at offset \d+ and not at \d+.*The import is not finished"):
        await import_archive(kafka, archive, quiet)


async def test_an_import_may_be_exported_again(kafka: KafkaSettings, archive: Path, tmp_path: Path) -> None:
    before = check_archive(archive, quiet)
    await import_archive(kafka, archive, quiet)
    after = await export_log(kafka, tmp_path / "again", None, quiet)
    assert (after.events, after.records) == (before.events, before.records)
    written = await raw_events(kafka)
    await remake_topics(kafka, partitions=1)
    await import_archive(kafka, tmp_path / "again", quiet)
    assert await raw_events(kafka) == written


async def test_what_cannot_be_read_is_not_exported_and_is_named(kafka: KafkaSettings, tmp_path: Path) -> None:
    log = a_log(40)
    end = log.offset
    log.append_foreign(b"junk")
    await put_log(kafka, log)
    with pytest.raises(PoisonRecord, match=rf"episodes\.events/0 offset {end}: not a record of this log"):
        await export_log(kafka, tmp_path / "junk", None, quiet)
    torn = a_log(40)
    event = torn.events[-1]
    torn.append(event.stream, event.event, event.event)
    torn.records.pop()
    await put_log(kafka, torn)
    with pytest.raises(PoisonRecord, match=rf"offset {torn.offset - 2}: the command that begins here is not complete"):
        await export_log(kafka, tmp_path / "torn", None, quiet)
    for name in ("junk", "torn"):
        with pytest.raises(ArchiveRefused, match="its export did not finish"):
            check_archive(tmp_path / name, quiet)


async def test_the_tool_says_in_one_sentence_what_is_wrong(kafka: KafkaSettings, archive: Path) -> None:
    said = await archive_tool(kafka.bootstrap_servers, "check", archive)
    assert (said.exit_code, said.stdout) == (
        0,
        f"{len(a_log().events)} events, 0 kept answers in {archive}, all as they were exported\n",
    )
    (archive / "manifest.json").unlink()
    said = await archive_tool(kafka.bootstrap_servers, "check", archive)
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr == (
        f"python -m shared.archive check: {archive} has no manifest.json: "
        "it is no archive, or its export did not finish\n"
    )
    said = await archive_tool("127.0.0.1:1", "export", archive / "new")
    assert said.exit_code == 1
    assert said.stderr.startswith("python -m shared.archive export: connecting to Kafka: ")
