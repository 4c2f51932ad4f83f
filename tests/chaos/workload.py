"""Many clients on both APIs, at every gateway, that note all they ask and hear. From a seed, client by client.

A few streams are hot, so that commands race; others are cold; on some, lists only grow.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol
from urllib.parse import quote
from weakref import WeakKeyDictionary

import httpx
import msgspec
from msgspec import UNSET, Raw

from local.services import make_token
from tests.chaos.history import History, Operation, as_raw, kept_headers, outcome_of


class Target(Protocol):
    """The service that the clients talk to."""

    @property
    def jwt_secret(self) -> str: ...
    @property
    def api_key(self) -> str:
        """Good for every tenant."""
        ...

    def gateway_urls(self) -> Sequence[str]:
        """Where gateways listen now. May change at any time."""
        ...


async def run_workload(target: Target, history: History, *, seed: int, clients: int, stop: asyncio.Event) -> None:
    """Let so many clients work until ``stop`` is set; then they finish what they have begun."""
    world = _World(seed)
    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(_Client(number, target, history, world).run(stop))


async def settle(target: Target, history: History, *, within: float = 120.0) -> None:
    """Read everything that was ever written to, as new as any answer promised; for when all faults have ended.

    What cannot be read is asked for again, but no longer than ``within`` seconds in all.
    """
    latest: dict[str, int] = {}
    projects: dict[tuple[str, str], dict[str, None]] = {}
    items: dict[str, list[str]] = {}
    for operation in history.operations:
        if operation.outcome == "ok" and operation.event_id is not None:
            latest[operation.stream] = max(latest.get(operation.stream, 0), operation.event_id)
        match operation.kind:
            case "upsert" | "patch" | "delete" | "restore":
                parts = operation.path.partition("?")[0].split("/")
                names = projects.setdefault((operation.stream, "/".join(parts[:6])), {})
                names |= dict.fromkeys(parts[6:7])
                if operation.kind != "delete" and isinstance(asked := operation.asked, dict) and "name" in asked:
                    names[quote(asked["name"], safe="")] = None
            case "record" if operation.outcome == "ok":
                items.setdefault(operation.stream, []).extend(operation.answered["episode_ids"])
    reader = _Reader(_Http(-1, target, history), latest, until=time.monotonic() + within)
    async with asyncio.TaskGroup() as tasks:
        for (stream, path), names in projects.items():
            tasks.create_task(reader.read_project(stream, path, [*names]))
        for stream, ids in items.items():
            tasks.create_task(reader.read_items(stream, ids[:: 1 + len(ids) // _MOST_ITEMS]))
    await reader.http.close()


_READ_SECONDS = 25.0
_PAUSE_SECONDS = 0.02
"""Between two calls of one client, on average: the machine has other things to do."""
_AWAY_SECONDS = 0.2
"""The same, when the service is away."""
_RETRY_SECONDS = 60.0
_MOST_ITEMS = 1_000
"""Items of a tenant that `settle` reads one by one."""
_AT_ONCE = 8


# ---- one call --------------------------------------------------------------------------------------------------------


class _Http:
    """Calls of one client, each noted when it is over. Never raises because the service is away."""

    def __init__(self, client: int, target: Target, history: History) -> None:
        self._client = client
        self._target = target
        self._history = history
        self._http = httpx.AsyncClient(
            verify=False,  # noqa: S501 - plain HTTP on this machine; it only saves the loading of certificates
            trust_env=False,
            timeout=httpx.Timeout(_READ_SECONDS, connect=2.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60.0),
        )
        self._tokens: dict[str, str] = {}
        self._connections: WeakKeyDictionary[object, str] = WeakKeyDictionary()

    async def close(self) -> None:
        await self._http.aclose()

    async def call(
        self,
        kind: str,
        stream: str,
        method: str,
        path: str,
        *,
        url: str,
        user: str = "",
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> Operation:
        number = self._history.next_number()
        noted = {"traceparent": self._history.traceparent(number), **(headers or {})}
        content = None if body is None else msgspec.json.encode(body)
        sent = {**noted, "authorization": f"Bearer {self._bearer(user)}"}
        if content is not None:
            sent["content-type"] = "application/json"
        operation = Operation(
            number=number,
            client=self._client,
            kind=kind,
            stream=stream,
            user=user,
            began=time.monotonic(),
            ended=0.0,
            method=method,
            url=url,
            path=path,
            headers=noted,
            body=UNSET if content is None else Raw(content),
        )
        try:
            response = await self._http.request(method, url + path, content=content, headers=sent)
        except (httpx.HTTPError, OSError) as error:
            operation.error = type(error).__name__
        else:
            operation.status = response.status_code
            operation.answer_headers = kept_headers(response.headers)
            operation.answer = as_raw(response.content) if response.content else UNSET
            operation.outcome = outcome_of(method, response.status_code, operation.answered)
            operation.connection = self._connection(response)
        finally:  # a call that is cancelled may have happened as well
            operation.ended = time.monotonic()
            self._history.append(operation)
        return operation

    def gateways(self, random: Random, count: int = 1) -> list[str]:
        """So many gateways, different ones where there are; none at all if there are none now."""
        urls = list(self._target.gateway_urls())
        random.shuffle(urls)
        return [urls[index % len(urls)] for index in range(count)] if urls else []

    def _bearer(self, user: str) -> str:
        if not user:
            return self._target.api_key
        if user not in self._tokens:
            claims: dict[str, Any] = {"namespaces": ["*"]} if user.startswith("guest") else {}
            self._tokens[user] = make_token(self._target.jwt_secret, user, **claims)
        return self._tokens[user]

    def _connection(self, response: httpx.Response) -> str:
        stream = response.extensions["network_stream"]
        return self._connections.setdefault(stream, f"{self._client}/{self._history.next_connection()}")


# ---- the world -------------------------------------------------------------------------------------------------------

_STATUSES = ("running", "completed", "failed", "archived")
_FOLDERS: tuple[str | None, ...] = ("/a", "/a/b", "a/c/d", "//e//f/", "/", "", None, "/lab é/x")
_AUTHORS = ("Ada Lovelace", "Grace Hopper", "@alan")


@dataclass
class _Project:
    namespace: str
    slug: str
    grows: bool = False
    """Nothing is ever deleted here."""
    names: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    """Some that may exist."""

    @property
    def stream(self) -> str:
        return f"namespace:{self.namespace}"

    @property
    def path(self) -> str:
        return f"/namespaces/{quote(self.namespace, safe='')}/projects/{quote(self.slug, safe='')}/episodes"

    def episode(self, name: str) -> str:
        return f"{self.path}/{quote(name, safe='')}"


@dataclass
class _Tenant:
    id: str
    episodes: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    """Some that were recorded."""
    keys: deque[str] = field(default_factory=lambda: deque(maxlen=30))
    """Item keys in use."""

    @property
    def stream(self) -> str:
        return f"tenant:{self.id}"


class _World:
    """The places that the clients share, and what they tell each other."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        hot = [_Project(f"s{seed}-hot-{n}", slug) for n in range(2) for slug in ("arm", "left arm/é")]
        cold = [_Project(f"s{seed}-cold-{n}", "arm") for n in range(4)]
        grows = [_Project(f"s{seed}-grows-{n}", "arm", grows=True) for n in range(2)]
        for project in (*hot, *cold):
            project.names.extend(f"run-{number}" for number in range(8))
        hot_tenants = [_Tenant(f"s{seed}-hot-{n}") for n in range(2)]
        cold_tenants = [_Tenant(f"s{seed}-cold {n}") for n in range(4)]
        self.places: list[tuple[Sequence[_Project | _Tenant], int]] = [
            (hot, 42),
            (cold, 14),
            (grows, 14),
            (hot_tenants, 20),
            (cold_tenants, 10),
        ]
        self.latest: dict[str, int] = {}
        """Stream → the last event_id that anybody here was told."""

    def heard(self, operation: Operation) -> None:
        if operation.outcome == "ok" and operation.event_id is not None:
            self.latest[operation.stream] = max(self.latest.get(operation.stream, 0), operation.event_id)


# ---- one client ------------------------------------------------------------------------------------------------------


_Send = Callable[[str, Any], Awaitable[Operation]]
"""Sends one write to a gateway, with a body."""


class _Client:
    def __init__(self, number: int, target: Target, history: History, world: _World) -> None:
        self._number = number
        self._world = world
        self._random = Random(f"{world.seed}/{number}")  # noqa: S311 - a load, not a secret
        self._http = _Http(number, target, history)
        self._count = 0
        self._stop = asyncio.Event()
        self._past: deque[Callable[[str], Awaitable[Operation]]] = deque(maxlen=40)
        """Writes under a key that were accepted, to be sent again much later."""

    async def run(self, stop: asyncio.Event) -> None:
        self._stop = stop
        populations, weights = zip(*self._world.places, strict=True)
        while not stop.is_set():
            place = self._random.choice(self._random.choices(populations, weights)[0])
            if self._past and self._chance(0.04):
                await self._repeat_old()
            elif isinstance(place, _Project):
                await self._use_project(place)
            else:
                await self._use_tenant(place)
        await self._http.close()

    async def _repeat_old(self) -> None:
        again = self._random.choice(self._past)
        for url in self._http.gateways(self._random):
            await self._breathe(await again(url))

    def _unique(self) -> str:
        self._count += 1
        return f"{self._number}-{self._count}"

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    # -- projects

    async def _use_project(self, project: _Project) -> None:
        kinds = {"upsert": 30, "patch": 14, "rename": 12, "get": 14, "list": 9, "invalid": 2, "forbidden": 1}
        if not project.grows:
            kinds |= {"delete": 11, "restore": 9}
        kind = self._random.choices([*kinds], [*kinds.values()])[0]
        name = self._random.choice(project.names) if project.names else "run-0"
        user = project.namespace if self._chance(0.85) else f"guest-{self._world.seed}"
        match kind:
            case "get":
                await self._read("get", project.stream, project.episode(name), user)
            case "list":
                await self._walk(project, user)
            case "upsert":
                name = self._name_to_upsert(project, name)
                body = {"name": name, **self._fields(name)}
                await self._write("upsert", project.stream, "POST", project.path, body, user, project.episode(name))
            case "invalid" | "forbidden":
                bad: list[Any] = [{}, {"name": None}, {"name": "a\tb"}, {"name": name, "status": "lost"}, "none"]
                body = self._random.choice(bad) if kind == "invalid" else {"name": name}
                user = user if kind == "invalid" else "stranger"
                await self._write(kind, project.stream, "POST", project.path, body, user, None)
            case _:
                await self._change(project, kind, name, user)

    def _name_to_upsert(self, project: _Project, name: str) -> str:
        if project.grows and self._chance(0.8):
            name = f"run-{self._unique()}"
        elif not project.grows and self._chance(0.04):
            name = f"locked-{self._unique()}"
        else:
            return name
        project.names.append(name)
        return name

    async def _change(self, project: _Project, kind: str, name: str, user: str) -> None:
        """Patch, rename, delete or restore one of the episodes."""
        path = then_read = project.episode(name)
        body: dict[str, Any] | None = None
        match kind:
            case "restore":
                method, path = "POST", f"{path}/restore"
            case "delete":
                method = "DELETE"
            case _:
                method, body = "PATCH", self._fields(name)
        if kind == "rename":
            new_name = self._random.choice(project.names) if project.names else name
            if self._chance(0.4):
                new_name = f"moved-{self._unique()}"
                project.names.append(new_name)
            body = {"name": new_name, **(self._fields(name) if self._chance(0.5) else {})}
            kind, then_read = "patch", project.episode(new_name)
        await self._write(kind, project.stream, method, path, body, user, then_read)

    def _fields(self, name: str) -> dict[str, Any]:
        """Some fields of an episode; nearly always one that no other write has."""
        random, mark = self._random, self._unique()
        fields: dict[str, Any] = {}
        if self._chance(0.9):
            fields["description"] = f"by {mark}" if self._chance(0.95) else None
        if self._chance(0.3):
            fields["tags"] = random.choice([[], ["arm", mark], None, ["ü"]])
        if self._chance(0.4):
            fields["folder"] = random.choice(_FOLDERS)
        if self._chance(0.3):
            fields["metadata"] = random.choice([{"by": mark, "deep": {"list": [1, 2.5, None]}}, {}, None])
        if self._chance(0.25):
            fields["status"] = random.choice(_STATUSES)
        if self._chance(0.4 if name.startswith("locked") else 0.1):
            fields["writeProtected"] = name.startswith("locked") and self._chance(0.8)
        return fields

    async def _walk(self, project: _Project, user: str) -> None:
        size, page, pages = self._random.choice([2, 5, 50]), 1, 1
        while page <= min(pages, 6):
            read = await self._read("list", project.stream, f"{project.path}?page={page}&pageSize={size}", user)
            if read is None or read.status != httpx.codes.OK:
                return
            pages, page = read.answered["totalPages"], page + 1

    # -- tenants

    async def _use_tenant(self, tenant: _Tenant) -> None:
        if tenant.episodes and self._chance(0.35):
            await self._get_item(tenant, self._random.choice(tenant.episodes))
        elif self._chance(0.03):
            body = self._random.choice([{"tenant_id": tenant.id}, {"tenant_id": tenant.id, "episodes": []}])
            await self._write("invalid", tenant.stream, "POST", "/v1/episodes", body, "", None)
        else:
            body = {"tenant_id": tenant.id, "episodes": [self._item(tenant) for _ in range(self._random.randint(1, 6))]}
            if self._chance(0.3):
                body["namespace"] = "engineering"
            written = await self._write("record", tenant.stream, "POST", "/v1/episodes", body, "", None)
            if written is not None and written.outcome == "ok":
                recorded = written.answered["episode_ids"]
                tenant.episodes.extend(recorded)
                if recorded and self._chance(0.4):
                    await self._get_item(tenant, self._random.choice(recorded))

    def _item(self, tenant: _Tenant) -> Any:
        random, mark = self._random, self._unique()
        if self._chance(0.12):
            return random.choice(
                [
                    {"author": "nobody"},
                    {"content": None},
                    {"content": "  "},
                    {"content": 7},
                    {"content": mark, "type": "No Word"},
                    {"content": mark, "timestamp": "yesterday"},
                    {"content": mark, "metadata": []},
                    {"content": mark, "source": 5},
                    "none",
                ]
            )
        item: dict[str, Any] = {"content": f"{random.choice(_AUTHORS)} wrote {mark} about Kafka."}
        if self._chance(0.3):
            item["type"] = random.choice(["message", "decision"])
        if self._chance(0.3):
            item["author"] = random.choice(_AUTHORS)
        if self._chance(0.2):
            item |= {"source": "slack", "channel": "#lab"}
        if self._chance(0.3):
            item["timestamp"] = random.choice(["2026-03-15T09:00:00Z", "2026-03-15T09:00:00.125+02:00", "2026-03-15"])
        if self._chance(0.3):
            item["metadata"] = {"by": mark}
        if self._chance(0.2):
            item["entities"] = [{"name": "Arm 7", "type": "robot"}]
        if self._chance(0.25):
            if tenant.keys and self._chance(0.5):
                item["idempotency_key"] = random.choice(tenant.keys)
            else:
                item["idempotency_key"] = f"item-{mark}"
                tenant.keys.append(item["idempotency_key"])
        return item

    async def _get_item(self, tenant: _Tenant, episode_id: str) -> None:
        episode_id = episode_id if self._chance(0.97) else "ep_none"
        await self._read("get_item", tenant.stream, f"/v1/episodes/{episode_id}?tenant_id={quote(tenant.id)}", "")

    # -- calls

    async def _write(
        self, kind: str, stream: str, method: str, path: str, body: Any, user: str, then_read: str | None
    ) -> Operation | None:
        """One write, with what a caller may do around it: retries, the same key again, twice at once, a read."""
        headers = {"idempotency-key": f"key-{self._unique()}"} if self._chance(0.6) else {}
        if self._chance(0.05):
            path += "?wait=projected"
        gateways = self._http.gateways(self._random, 2)
        if not gateways:
            await asyncio.sleep(_AWAY_SECONDS)
            return None

        async def send(url: str, body: Any) -> Operation:
            operation = await self._http.call(
                kind, stream, method, path, url=url, user=user, headers=headers, body=body
            )
            self._world.heard(operation)
            return operation

        if headers and self._chance(0.05):
            operation, _ = await asyncio.gather(*[send(url, body) for url in gateways])
        else:
            operation = await send(gateways[0], body)
        await self._breathe(operation)
        if headers and operation.outcome == "unknown" and self._chance(0.75):
            operation = await self._retry(operation, send, body)
        if headers and operation.outcome != "unknown":
            await self._use_key_again(operation, gateways[1], send, body)
        if then_read is not None and self._chance(0.35):
            await self._read("get", stream, then_read, user, url=gateways[0] if self._chance(0.5) else None)
        return operation

    async def _use_key_again(self, operation: Operation, url: str, send: _Send, body: Any) -> None:
        if operation.outcome == "ok":
            self._past.append(lambda url: send(url, body))
        if self._chance(0.08):
            await send(url, body)
        elif isinstance(body, dict) and operation.kind != "invalid" and self._chance(0.05):
            await send(url, {**body, "metadata": {"other": self._unique()}, "namespace": self._unique()})

    async def _retry(self, operation: Operation, send: _Send, body: Any) -> Operation:
        until = time.monotonic() + _RETRY_SECONDS
        while operation.outcome == "unknown" or _is_away(operation):
            if self._stop.is_set() or time.monotonic() > until:
                break
            for url in self._http.gateways(self._random):
                operation = await send(url, body)
            await self._breathe(operation)
        return operation

    async def _read(self, kind: str, stream: str, path: str, user: str, *, url: str | None = None) -> Operation | None:
        headers: dict[str, str] = {}
        if stream in self._world.latest and self._chance(0.5):
            headers["x-min-event-id"] = str(self._world.latest[stream])
            if self._chance(0.5):
                headers["prefer"] = f"wait={self._random.choice([0, 1, 5])}"
        gateways = [url] if url is not None else self._http.gateways(self._random)
        if not gateways:
            await asyncio.sleep(_AWAY_SECONDS)
            return None
        operation = await self._http.call(kind, stream, "GET", path, url=gateways[0], user=user, headers=headers)
        await self._breathe(operation)
        return operation

    async def _breathe(self, operation: Operation) -> None:
        await asyncio.sleep(self._random.uniform(0, 2 * (_AWAY_SECONDS if _is_away(operation) else _PAUSE_SECONDS)))


def _is_away(operation: Operation) -> bool:
    return operation.status is None or operation.status >= httpx.codes.INTERNAL_SERVER_ERROR


# ---- the last look ---------------------------------------------------------------------------------------------------


class _Reader:
    """Reads until there is an answer."""

    def __init__(self, http: _Http, latest: Mapping[str, int], *, until: float) -> None:
        self.http = http
        self._latest = latest
        self._random = Random(0)  # noqa: S311 - a load, not a secret
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._until = until

    async def read_project(self, stream: str, path: str, names: Sequence[str]) -> None:
        user, page, pages = stream.partition(":")[2], 1, 1
        while page <= pages:
            read = await self._read("list", stream, f"{path}?page={page}&pageSize=200", user)
            if read is None or read.status != httpx.codes.OK:
                break
            pages, page = read.answered["totalPages"], page + 1
        for name in names:
            await self._read("get", stream, f"{path}/{name}", user)

    async def read_items(self, stream: str, ids: Sequence[str]) -> None:
        tenant = quote(stream.partition(":")[2])
        for episode_id in ids:
            await self._read("get_item", stream, f"/v1/episodes/{episode_id}?tenant_id={tenant}", "")

    async def _read(self, kind: str, stream: str, path: str, user: str) -> Operation | None:
        headers = {"x-min-event-id": str(self._latest.get(stream, 0)), "prefer": "wait=5"}
        while True:
            async with self._turns:
                for url in self.http.gateways(self._random):
                    if time.monotonic() > self._until:
                        return None
                    read = await self.http.call(kind, stream, "GET", path, url=url, user=user, headers=headers)
                    if not _is_away(read):
                        return read
            await asyncio.sleep(_AWAY_SECONDS)
