"""The operator's pages in docs/operations.md, walked through: each command runs as it stands, and the promises hold."""

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import httpx
import msgspec
import pytest

from local.process import ROOT
from local.servers import ManagedContainer
from projector import generations
from shared.archive.files import Manifest
from shared.kafka import open_admin
from shared.mongo import Client, generation_database, open_mongo
from shared.settings import KafkaSettings, MongoSettings
from tests.cluster import Cluster, throw_away_cluster
from tests.e2e.client import Http, Project, Tenant, body_of, described, event_id_of, open_http
from tests.e2e.ledger import load_log
from tests.e2e.load import assert_accounts_agree, eventually
from tests.pages import Page, Shell, read_page
from tests.read_models import Said

AS_THE_LOG_SAYS = "every document is as the log says"
PAGE_SIZE = 3
GROUPS = ["episodes-ingestor", "episodes-projector"]
BACKUP = "/backup/2026-07-01"

Read = tuple[int, bytes, str | None]
"""Status, body (of a 2xx) and X-Event-Id of an answer."""


def page(title: str) -> Page:
    return read_page(ROOT / "docs" / "operations.md", title)


# ---- one service, and what its callers wrote -------------------------------------------------------------------------


@dataclass
class Service:
    """The running service, its callers, and an operator's shell."""

    cluster: Cluster
    shell: Shell
    http: Http
    mongo: Client
    projects: list[Project]
    tenants: list[Tenant]
    recorded: list[tuple[Tenant, str]] = field(default_factory=list)
    first_answers: list[httpx.Response] = field(default_factory=list)
    rounds: Iterator[int] = field(default_factory=itertools.count)

    async def write(self) -> None:
        """Some history: folders, changes, renames, deletions, one restored; and batches."""
        number = next(self.rounds)
        for project in self.projects:
            for kind in "abc":
                await project.given(f"run-{number}-{kind}", folder=f"/runs/{number}", metadata={"number": number})
            body_of(await project.patch(f"run-{number}-a", newName=f"run-{number}-renamed", status="completed"), 200)
            body_of(await project.delete(f"run-{number}-b"), 200)
            body_of(await project.delete(f"run-{number}-c"), 200)
            body_of(await project.restore(f"run-{number}-c"), 200)
        for tenant in self.tenants:
            items = [
                {"content": f"Ada Lovelace, {number}.{line}.", "idempotency_key": f"{number}.{line}"} for line in "ab"
            ]
            answer = await tenant.given(*items)
            self.recorded += [(tenant, identity) for identity in answer["episode_ids"]]

    async def keyed(self) -> list[httpx.Response]:
        """One write of each kind under an Idempotency-Key: the first time it does something, later it repeats."""
        project, tenant = self.projects[0], self.tenants[0]
        return [
            await project.upsert(
                "run-042", headers={"Idempotency-Key": "upsert"}, folder="/a/b", metadata={"x": 2**70}
            ),
            await project.patch("run-042", headers={"Idempotency-Key": "patch"}, tags=["kept"]),
            await project.upsert("gone", headers={"Idempotency-Key": "another"}),
            await project.delete("gone", headers={"Idempotency-Key": "delete"}),
            await tenant.record({"content": "Once."}, {"source": "bad"}, headers={"Idempotency-Key": "batch"}),
        ]

    async def reads(self) -> list[Read]:
        """Everything that a reader can see, at least as far as this caller wrote."""
        answers: list[httpx.Response] = []
        for project in self.projects:
            names: list[str] = []
            for number in itertools.count(1):
                answers.append(await project.list(page=number, pageSize=PAGE_SIZE))
                episodes = body_of(answers[-1], HTTPStatus.OK)["episodes"]
                names += [episode["name"] for episode in episodes]
                if not episodes:
                    break
            answers += [await project.get(name) for name in [*names, "gone", "run-0-b"]]
        answers += [await tenant.get(identity) for tenant, identity in self.recorded]
        return [
            (answer.status_code, answer.content if answer.is_success else b"", answer.headers.get("x-event-id"))
            for answer in answers
        ]

    async def is_readable(self) -> bool:
        """Say whether each stream is read as far as it was written."""
        answers = [await project.list() for project in self.projects]
        answers += [await tenant.get(identity) for tenant, identity in self.recorded]
        return all(answer.is_success for answer in answers)

    async def run(self, block: str, replaced: dict[str, str] | None = None, **env: str) -> Said:
        """Run a block of a page."""
        return await asyncio.to_thread(self.shell.run, block, replaced, **env)

    async def done(self, block: str, replaced: dict[str, str] | None = None, **env: str) -> Said:
        """Run a block of a page in which every command must succeed."""
        said = await self.run(block, replaced, **env)
        assert said.status == 0, said
        return said

    async def shows_all(self, block: str) -> Said:
        """Look, again and again as a person would, until every partition has a lag of 0 and nothing differs."""

        async def once() -> Said | None:
            said = await self.run(block)
            rows = [[cell.strip() for cell in line.split("│")][1:-1] for line in said.out.splitlines()]
            lags = [
                row[4] for row in rows if len(row) == len(("partition", "position", "offset", "end", "lag", "state"))
            ]
            return said if lags and set(lags) == {"0"} and said.status == 0 else None

        return await eventually(once, within=60, what="every partition has a lag of 0")

    async def wait_forgotten_by_kafka(self) -> None:
        """Wait for what takes Kafka ten seconds after the processes stopped: no group has a member any more."""
        async with open_admin(KafkaSettings(bootstrap_servers=self.cluster.servers.kafka_bootstrap)) as admin:

            async def forgotten() -> bool:
                answers = [
                    await admin.describe_consumer_groups([group]) for group in GROUPS
                ]  # it cannot decode two at once
                return not any(members for [answer] in answers for *_, members, _ in answer.groups)

            await eventually(forgotten, what="the groups are empty")

    async def in_use(self) -> int:
        return await generations.in_use(self.mongo)

    async def kept(self) -> set[int]:
        """The generations that there are."""
        names = await self.mongo.list_database_names()
        return {int(name.removeprefix("episodes_g")) for name in names if name.startswith("episodes_g")}

    async def assert_keys_are_kept(self) -> None:
        """Check that a retry under an old key gets the first answer."""
        for first, again in zip(self.first_answers, await self.keyed(), strict=True):
            assert (again.status_code, again.content) == (first.status_code, first.content), described(again)
            assert again.headers["idempotency-replayed"] == "true", described(again)

    async def assert_ids_go_on(self) -> None:
        """Check that the next writes have the next ids."""
        for project in self.projects:
            last = self.http.last_event_ids[project.stream]
            assert event_id_of(await project.patch("run-042", description=f"after {last}")) == last + 1
        for tenant in self.tenants:
            last = self.http.last_event_ids[tenant.stream]
            answer = body_of(await tenant.record({"content": f"after {last}"}), HTTPStatus.CREATED)
            assert answer["event_ids"] == [last + 1]
            self.recorded.append((tenant, answer["episode_ids"][0]))

    async def assert_whole(self) -> None:
        """Check that ids go on, and that log and read models agree, by rules that share no code with the service."""
        await self.assert_ids_go_on()
        await assert_accounts_agree(self.cluster, [])

    async def start(self, *names: str) -> None:
        """Start processes, and wait until they are ready."""
        for name in names:
            self.cluster.processes[name].start()
        for name in names:
            await asyncio.to_thread(self.cluster.processes[name].wait_ready)

    async def stop(self, *names: str) -> None:
        for name in names:
            await asyncio.to_thread(self.cluster.processes[name].stop)


@asynccontextmanager
async def _service(cluster: Cluster, folder: Path) -> AsyncIterator[Service]:
    env = {**cluster.env, "INGESTOR_STATE_DIR": cluster.processes["ingestor"].env["INGESTOR_STATE_DIR"]}
    async with open_http(cluster.url) as http, open_mongo(MongoSettings(url=cluster.servers.mongodb_url)) as mongo:
        made = Service(
            cluster,
            Shell(env, folder),
            http,
            mongo,
            [
                Project(http, name, slug, cluster.token(name))
                for name, slug in (("alice", "robotics"), ("bob", "Maß/1"))
            ],
            [Tenant(http, name, cluster.api_key) for name in ("acme", "globex")],
        )
        made.first_answers = await made.keyed()
        assert [answer.status_code for answer in made.first_answers] == [201, 200, 201, 200, 201]
        await made.projects[1].given("run-042")
        await made.write()
        yield made


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service that callers have used for a while. Each page leaves it whole."""
    settings = {"TOPICS_PARTITIONS": "3", "GATEWAY_REPLY_TIMEOUT": "60"}
    with throw_away_cluster(settings=settings) as cluster:
        async with _service(cluster, tmp_path_factory.mktemp("operator")) as made:
            yield made


# ---- the pages -------------------------------------------------------------------------------------------------------


async def test_rebuilding_the_read_models(service: Service) -> None:
    this = page("Rebuilding the read models")
    [build, drop] = this.blocks
    before, old = await service.reads(), await service.in_use()
    said = await service.done(build)
    this.assert_promised(AS_THE_LOG_SAYS, said)
    this.assert_promised("is in use", said)
    assert "was built, verified and dropped again" in said.out, "the dry run"
    new = await service.in_use()
    assert new > old
    assert await service.reads() == before

    await service.done(drop, {"drop 1": f"drop {old}"})
    kept = await service.kept()
    assert new in kept
    assert old not in kept
    await service.assert_whole()


async def test_rolling_back_to_the_generation_before(service: Service) -> None:
    old = await service.in_use()
    for other in await service.kept() - {old}:
        await generations.drop(service.mongo, other)
    this = page("Rolling back to the generation before")
    [back] = this.blocks
    this.assert_promised("no generation is kept from before", await service.run(back))
    await service.done("python -m projector rebuild")
    await service.write()
    before, new = await service.reads(), await service.in_use()
    assert new != old

    this.assert_promised("is in use again", await service.done(back))
    assert await service.in_use() == old
    assert await service.reads() == before
    await service.assert_whole()
    this.assert_promised("is in use again", await service.done(back))
    assert await service.in_use() == new
    await service.assert_whole()


async def test_verifying_the_read_models(service: Service) -> None:
    this = page("Verifying the read models")
    [look, mend] = this.blocks
    before = await service.reads()
    this.assert_promised(AS_THE_LOG_SAYS, await service.shows_all(look))

    documents = service.mongo[generation_database(await service.in_use())]
    changed = await documents.tenant_episodes.find_one_and_update({"content": "Once."}, {"$set": {"content": "Twice."}})
    gone = await documents.folders.find_one_and_delete({})
    assert changed, gone
    said = await service.run(look)
    assert said.status == 1, said
    assert f"DIFFERENT  tenant_episodes/{changed['_id']}" in said.out
    assert f"MISSING  folders/{gone['_id']}" in said.out

    said = await service.done(mend)
    assert "ProjectEpisodeCreated" in said.out, "the history"
    assert "tenant:acme: 0 put back, 1 mended, 0 removed" in said.out
    for words in ("put back", "mended", "removed"):
        this.assert_promised(words, said)
    this.assert_promised(AS_THE_LOG_SAYS, await service.done(look))
    assert await service.reads() == before


async def test_all_of_mongodb_is_lost(service: Service) -> None:
    this = page("Disaster: all of MongoDB is lost")
    [sooner, look] = this.blocks
    before = await service.reads()
    other = Project(service.http, "carol", "robotics", service.cluster.token("carol"))
    await asyncio.to_thread(_lose, service.cluster)
    await other.given("meanwhile")
    assert (await other.list()).status_code == HTTPStatus.SERVICE_UNAVAILABLE
    mongodb = service.cluster.servers.mongodb
    mongodb.start()
    await asyncio.to_thread(mongodb.wait_ready)
    for name in ("projector", "gateway"):
        await service.stop(name)
        await service.start(name)
    await eventually(service.is_readable, within=60, what="the projectors begin by themselves")
    assert await service.reads() == before
    this.assert_promised(AS_THE_LOG_SAYS, await service.done(sooner))
    this.assert_promised(AS_THE_LOG_SAYS, await service.shows_all(look))
    assert await service.reads() == before
    assert await other.names() == ["meanwhile"]
    await service.assert_keys_are_kept()
    await service.assert_whole()


async def test_the_state_of_the_ingestor_is_lost(service: Service) -> None:
    this = page("Disaster: the ingestor's state is lost")
    [empty, watch] = this.blocks
    before = await service.reads()
    ingestor = service.cluster.processes["ingestor"]
    state = Path(ingestor.env["INGESTOR_STATE_DIR"])
    assert any(state.iterdir())
    await asyncio.to_thread(ingestor.kill)
    await service.done(empty)
    assert not state.exists()
    other = Project(service.http, "dave", "robotics", service.cluster.token("dave"))
    async with asyncio.TaskGroup() as tasks:
        waits = tasks.create_task(other.upsert("meanwhile"))
        ingestor.start()
        said = await service.done(watch, {"http://localhost:8081": service.cluster.url_of("ingestor")})
        this.assert_promised('"ready":true', said)
    body_of(waits.result(), HTTPStatus.CREATED)
    assert any(state.iterdir())
    assert await other.names() == ["meanwhile"]
    assert await service.reads() == before
    await service.assert_keys_are_kept()
    assert await service.reads() == before, "retries add nothing"
    await service.assert_whole()


async def test_exporting_the_log(service: Service, tmp_path: Path) -> None:
    this = page("Exporting the log")
    [export] = this.blocks
    said = await service.done(export, {BACKUP: f"{tmp_path}/all", "/backup/alice": f"{tmp_path}/alice"})
    this.assert_promised("all as they were exported", said)
    log = await load_log(service.cluster.servers.kafka_bootstrap)
    everything, alice = (_manifest(tmp_path / name) for name in ("all", "alice"))
    assert everything.events == len([*log.events])
    assert alice.events == len([event for event in log.events if event.stream == "namespace:alice"])
    assert alice.events < everything.events


async def test_restoring_the_log_from_an_export(service: Service, tmp_path: Path) -> None:
    this = page("Restoring the log from an export")
    [delete, fill, forget, look] = this.blocks
    [export] = page("Exporting the log").blocks
    places = {BACKUP: f"{tmp_path}/all"}
    await service.done(export, {**places, "/backup/alice": f"{tmp_path}/alice"})
    before, event_ids = await service.reads(), dict(service.http.last_event_ids)
    await service.projects[0].given("after the export")

    await service.stop("gateway", "ingestor", "projector")
    await service.done(delete)
    this.assert_promised("the ingestors may start", await service.done(fill, places, TOPICS_PARTITIONS="5"))
    refused = await service.run(fill, places, TOPICS_PARTITIONS="5")
    assert refused.status == 1, refused
    this.assert_promised("is not empty", refused)
    await service.done(forget)
    assert await service.kept() == set()
    await service.wait_forgotten_by_kafka()
    await service.start("projector", "ingestor", "gateway")
    service.http.last_event_ids = event_ids
    this.assert_promised(AS_THE_LOG_SAYS, await service.shows_all(look))
    assert await service.reads() == before
    assert (await service.projects[0].get("after the export")).status_code == HTTPStatus.NOT_FOUND
    await service.assert_keys_are_kept()
    assert await service.reads() == before, "retries add nothing"
    await service.assert_ids_go_on()
    this.assert_promised(AS_THE_LOG_SAYS, await service.shows_all(look))


def _lose(cluster: Cluster) -> None:
    """Stop MongoDB, and give it an empty disk."""
    mongodb = cluster.servers.mongodb
    if isinstance(mongodb, ManagedContainer):
        mongodb.remove_with_data()
    else:
        mongodb.kill()
        shutil.rmtree(cluster.servers.folder / "mongodb")


def _manifest(folder: Path) -> Manifest:
    return msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
