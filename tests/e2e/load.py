"""Writers on both APIs that never give up on a write, and remember every answer."""

import asyncio
import functools
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any, TypeVar

import httpx
import pytest

from tests.cluster import Cluster
from tests.e2e.client import Http, Project, Tenant, a_project, a_tenant, described, event_id_of, open_http, unique
from tests.e2e.ledger import (
    Acknowledged,
    Documents,
    Fact,
    Log,
    check_answers,
    check_documents,
    load_documents,
    load_log,
)

Send = Callable[..., Awaitable[httpx.Response]]
"""Sends one write; takes `headers` beside what is its own."""

T = TypeVar("T")

_POLL = 0.05
_BREATH = 0.02
"""Between two writes of one writer: the machine has other things to do."""
_PATIENCE = 60
_UNKNOWN = frozenset({HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})


async def eventually(condition: Callable[[], Awaitable[T | None]], *, what: str, within: float = 30) -> T:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + within
    while True:
        if answer := await condition():
            return answer
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        await asyncio.sleep(_POLL)


@contextmanager
def left_running(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[None]:
    """Leave nothing dead or frozen to the next test; after a failure, nothing that may be stuck either."""
    failed = request.session.testsfailed
    yield
    for process in cluster.processes.values():
        process.resume()
        if request.session.testsfailed > failed:
            process.kill()
        process.start()
        process.wait_ready()


# ---- answers as entries of the ledger --------------------------------------------------------------------------------


def upserted(project: Project, key: str, response: httpx.Response) -> Acknowledged:
    kind = "ProjectEpisodeCreated" if response.status_code == HTTPStatus.CREATED else "ProjectEpisodeRevised"
    episode, event_id = response.json()["episode"], event_id_of(response)
    return Acknowledged(project.stream, key, event_id, (Fact(event_id, kind, episode["id"], episode["name"]),))


def changed(kind: str, project: Project, key: str, name: str, response: httpx.Response) -> Acknowledged:
    """`name` is that before the change, which made an event of this kind."""
    event_id = event_id_of(response)
    return Acknowledged(project.stream, key, event_id, (Fact(event_id, kind, response.json()["id"], name),))


def recorded(tenant: Tenant, key: str, contents: Iterable[str], response: httpx.Response) -> Acknowledged:
    answer = response.json()
    facts = tuple(
        Fact(event_id, "TenantEpisodeRecorded", identity, content)
        for event_id, identity, content in zip(answer["event_ids"], answer["episode_ids"], contents, strict=True)
    )
    return Acknowledged(tenant.stream, key, event_id_of(response), facts)


# ---- the load --------------------------------------------------------------------------------------------------------


class Load:
    """What the writers did so far."""

    def __init__(self, http: Http, projects: list[Project], tenants: list[Tenant], writers: int) -> None:
        self.http = http
        self.acknowledged: list[Acknowledged] = []
        self.outcomes: Counter[int | str] = Counter()
        """Status codes, and names of what broke connections, of all attempts."""
        self.timed_out: list[str] = []
        """The command_ids of 504s."""
        self.stopping = False
        self._projects = projects
        self._tenants = tenants
        self._done = dict.fromkeys(range(writers), 0)

    async def progress(self, writes: int = 3, *, within: float = 30) -> None:
        """Wait until every writer has this many more writes acknowledged."""
        goal = {writer: done + writes for writer, done in self._done.items()}

        async def reached() -> bool:
            return all(self._done[writer] >= writes for writer, writes in goal.items())

        await eventually(reached, within=within, what=f"progress to {goal}, got to {self._done}, {self.outcomes}")

    async def visible(self, *, within: float = 30) -> None:
        """Wait until a reader sees the latest write of each stream."""
        latest = {answer.stream: answer.last_event_id for answer in self.acknowledged}

        places: list[Project | Tenant] = [*self._projects, *self._tenants]
        for place in places:
            if place.stream in latest:
                seen = functools.partial(_sees, place, latest[place.stream])
                await eventually(seen, within=within, what=f"event_id {latest[place.stream]} of {place.stream} is read")

    async def write_projects(self, writer: int) -> None:
        """Create, update, patch and sometimes delete episodes until told to stop."""
        for number in itertools.count():
            project, name = self._projects[(writer + number) % len(self._projects)], f"run-{writer}-{number}"
            folder = f"/experiments/batch-{number % 5}"
            key, response = await self.write(project.upsert, name, folder=folder, metadata={"number": number})
            assert response.status_code == HTTPStatus.CREATED, described(response)
            self._acknowledge(writer, upserted(project, key, response))
            if self.stopping:
                return
            key, response = await self.write(project.upsert, name, tags=["again"])
            assert response.status_code == HTTPStatus.OK, described(response)
            self._acknowledge(writer, upserted(project, key, response))
            key, response = await self.write(project.patch, name, status="completed")
            self._acknowledge(writer, changed("ProjectEpisodeRevised", project, key, name, response))
            if number % 3 == 2:
                key, response = await self.write(project.delete, name)
                self._acknowledge(writer, changed("ProjectEpisodeDeleted", project, key, name, response))

    async def write_tenants(self, writer: int) -> None:
        """Record batches until told to stop; every fourth item is bad, and the first has a key of its own."""
        for number in itertools.count():
            tenant = self._tenants[(writer + number) % len(self._tenants)]
            contents = [f"Ada Lovelace wrote batch {number}, line {line}, of {writer}." for line in range(3)]
            items: list[dict[str, str]] = [{"content": content} for content in contents]
            items[0]["idempotency_key"] = unique("item")
            key, response = await self.write(tenant.record, *items, {"author": "nobody"})
            self._acknowledge(writer, recorded(tenant, key, contents, response))
            if self.stopping:
                return

    async def write(self, send: Send, *arguments: Any, **options: Any) -> tuple[str, httpx.Response]:
        """Send a write under one key until its outcome is known."""
        headers = {"Idempotency-Key": unique("key")}
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                response = await send(*arguments, headers=headers, **options)
            except httpx.TransportError as error:
                self.outcomes[type(error).__name__] += 1
            else:
                self.outcomes[response.status_code] += 1
                if response.status_code == HTTPStatus.GATEWAY_TIMEOUT:
                    self.timed_out.append(response.json()["command_id"])
                if response.status_code not in _UNKNOWN:
                    assert response.is_success, described(response)
                    await asyncio.sleep(_BREATH)
                    return headers["Idempotency-Key"], response
            assert time.monotonic() < deadline, f"no answer within {_PATIENCE} s: {self.outcomes}"
            await asyncio.sleep(_POLL)

    def _acknowledge(self, writer: int, answer: Acknowledged) -> None:
        self.acknowledged.append(answer)
        self._done[writer] += 1


@asynccontextmanager
async def running_load(cluster: Cluster, *, writers: int = 3) -> AsyncIterator[Load]:
    """Write to both APIs for the length of the block; at its end the last writes are seen through."""
    async with open_http(cluster.url) as http:
        await http.document()
        projects, tenants = [a_project(http, cluster) for _ in range(3)], [a_tenant(http, cluster) for _ in range(3)]
        load = Load(http, projects, tenants, 2 * writers)
        async with asyncio.TaskGroup() as tasks:
            for writer in range(0, 2 * writers, 2):
                tasks.create_task(load.write_projects(writer))
                tasks.create_task(load.write_tenants(writer + 1))
            await load.progress(1)
            yield load
            load.stopping = True


async def _sees(place: Project | Tenant, event_id: int) -> bool:
    headers = {"X-Min-Event-Id": str(event_id), "Prefer": "wait=10"}
    try:
        if isinstance(place, Project):
            response = await place.list(headers=headers, pageSize=1)
        else:
            response = await place.get("ep_none", headers=headers)
    except httpx.TransportError:
        return False
    return response.status_code in {HTTPStatus.OK, HTTPStatus.NOT_FOUND}


# ---- the verdict -----------------------------------------------------------------------------------------------------


async def assert_accounts_agree(cluster: Cluster, acknowledged: Iterable[Acknowledged]) -> Log:
    """Check answers, log and MongoDB against each other, once nobody writes any more. Returns the log."""
    log, documents = await applied(cluster)
    violations = [*log.violations, *check_answers(log, acknowledged), *check_documents(log, documents)]
    assert not violations, "\n".join(violations[:50])
    return log


async def applied(cluster: Cluster, *, within: float = 30) -> tuple[Log, Documents]:
    """Wait until all that is in the log is in MongoDB, and return both."""
    bootstrap, url = cluster.servers.kafka_bootstrap, cluster.servers.mongodb_url

    async def both() -> tuple[Log, Documents] | None:
        log = await load_log(bootstrap)
        documents = await asyncio.to_thread(load_documents, url)
        positions = {document["_id"]: document["position"] for document in documents["checkpoints"]}
        caught_up = all(positions.get(partition, 0) == position for partition, position in log.positions.items())
        return (log, documents) if caught_up else None

    return await eventually(both, within=within, what="the projector has applied the whole log")
