"""Rebuild, switch, rollback and repair while writers write and readers read: nobody who uses the service notices."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from tests.cluster import Cluster, ThrowAwayServers, throw_away_cluster
from tests.read_models import PARTITIONS, ReadModels, until

READERS = 4
PAUSE = 0.05
EPISODES = 50
PAGE = 20
QUIET, BUSY = "/namespaces/alice/projects/quiet/episodes", "/namespaces/alice/projects/busy/episodes"


@dataclass
class Readers:
    """Read lists and single episodes, each over a connection of its own, and note whatever is odd."""

    cluster: Cluster
    odd: list[str] = field(default_factory=list)
    answers: Counter[int] = field(default_factory=Counter)
    states: dict[int, list[str]] = field(default_factory=lambda: {reader: [] for reader in range(READERS)})
    """Which states of the quiet project each reader saw, one after the other."""
    written: int = 0
    stopping: bool = False

    async def read(self, reader: int) -> None:
        async with self._open() as http:
            event_id = 0
            for number in itertools.count(reader):
                if self.stopping:
                    return
                quiet = await http.get(QUIET, params={"page": 1 + number % 3, "pageSize": PAGE})
                busy = await http.get(BUSY, params={"page": 1, "pageSize": PAGE})
                name = busy.json()["episodes"][number % PAGE]["name"]
                one = await http.get(f"{BUSY}/{name}")
                for response in (quiet, busy, one):
                    self.answers[response.status_code] += 1
                    if response.status_code != HTTPStatus.OK:
                        self.odd.append(f"{response.request.url}: {response.status_code} {response.text}")
                    elif int(response.headers["X-Event-Id"]) < event_id:
                        self.odd.append(f"{response.headers['X-Event-Id']} after {event_id}")
                    else:
                        event_id = int(response.headers["X-Event-Id"])
                self._look_at(reader, quiet.json(), 1 + number % 3)
                await asyncio.sleep(PAUSE)

    async def write(self) -> None:
        async with self._open() as http:
            for number in itertools.count():
                if self.stopping:
                    return
                key = {"Idempotency-Key": f"write-{number}"}
                made = await http.post(BUSY, json={"name": f"run-{number}", "folder": "/a"}, headers=key)
                if number % 3 == 0:
                    made = await http.patch(f"{BUSY}/run-{number}", json={"status": "completed"})
                if not made.is_success:
                    self.odd.append(f"write {number}: {made.status_code} {made.text}")
                self.written += 1
                await asyncio.sleep(PAUSE)

    def _look_at(self, reader: int, page: dict[str, Any], number: int) -> None:
        episodes, states = page["episodes"], self.states[reader]
        found = {episode["description"] for episode in episodes}
        wanted = [f"quiet-{index}" for index in range(EPISODES)][PAGE * (number - 1) : PAGE * number]
        if len(found) != 1 or [episode["name"] for episode in episodes] != wanted:
            self.odd.append(f"a mixed page: {page}")
        states.extend(state for state in found if not states or states[-1] != state)

    def _open(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.cluster.token('alice')}"}
        return httpx.AsyncClient(base_url=self.cluster.url, headers=headers, timeout=20, trust_env=False)


@asynccontextmanager
async def at_work(readers: Readers, *work: Callable[[], Any]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        for each in work:
            tasks.create_task(each())
        yield
        readers.stopping = True
    readers.stopping = False


async def test_nobody_notices_a_rebuild_a_switch_a_rollback_or_a_repair(
    replay_servers: ThrowAwayServers, models: ReadModels
) -> None:
    with throw_away_cluster(replay_servers, {"TOPICS_PARTITIONS": str(PARTITIONS)}) as cluster:
        readers = Readers(cluster)
        async with readers._open() as http:
            for number in range(EPISODES):
                made = await http.post(QUIET, json={"name": f"quiet-{number}", "description": "log"})
                assert made.status_code == HTTPStatus.CREATED
            for number in range(PAGE):
                await http.post(f"{BUSY}?wait=projected", json={"name": f"old-{number}"})
        await tag(models, 1, "old generation")

        async def everybody_sees(state: str) -> None:
            async def they_do() -> bool:
                return all(seen and seen[-1] == state for seen in readers.states.values())

            await until(they_do, f"everybody to see: {state}; {readers.states}", within=15)

        reading = [lambda reader=reader: readers.read(reader) for reader in range(READERS)]
        async with at_work(readers, readers.write, *reading):
            await everybody_sees("old generation")
            rebuilt = await models.cli("rebuild", "--json", "--workers", "1")
            assert rebuilt.status == 0, rebuilt
            await everybody_sees("log")
            for state in ("old generation", "log"):
                assert (await models.cli("rollback")).status == 0
                await everybody_sees(state)
        assert not readers.odd, readers.odd[:5]
        assert [*readers.answers] == [HTTPStatus.OK]
        assert all(seen == ["old generation", "log", "old generation", "log"] for seen in readers.states.values())
        assert readers.written > 20, "and writers wrote"

        async with at_work(readers, readers.write):
            database = models.database(2)
            await database.projects.update_one({"slug": "busy"}, {"$inc": {"total": 5}})
            await database.project_episodes.update_one({"name": "old-3"}, {"$set": {"name": "somebody else"}})
            await database.project_episodes.delete_one({"name": "old-4"})
            await database.project_episodes.insert_one({"_id": "x", "namespace": "alice"})
            mended = await models.cli("rebuild", "--stream", "namespace:alice")
            assert (mended.status, mended.out) == (
                0,
                "namespace:alice: 1 put back, 2 mended, 1 removed\n",
            )
            await database.projects.update_one({"slug": "quiet"}, {"$inc": {"total": -1}})
            await database.streams.update_one({}, {"$set": {"at": None}})
            mended = await models.cli("rebuild", "--views", "projects")
            assert (mended.status, mended.out) == (0, "namespace:alice: 0 put back, 1 mended, 0 removed\n")
            verified = await models.cli("verify")
            assert verified.status == 0, verified
        assert not readers.odd, readers.odd[:5]


async def tag(models: ReadModels, generation: int, state: str) -> None:
    """Make a generation tell itself from what the log says."""
    episodes = models.database(generation).project_episodes

    async def all_there() -> bool:
        return await episodes.count_documents({"description": "log"}) == EPISODES

    await until(all_there, "the quiet project")
    await episodes.update_many({"description": "log"}, {"$set": {"description": state}})
