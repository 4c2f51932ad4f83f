"""Stand-ins for the gateway's ports, and a client that holds every answer against the OpenAPI document."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import httpx
import jwt
from jsonschema import Draft202012Validator
from msgspec import Raw

from gateway import openapi
from gateway.app import create_app
from gateway.auth import batch_authenticator, project_authenticator
from gateway.paging import Slice
from gateway.queries import ReadModel
from gateway.routes.operations import Lifecycle
from gateway.settings import GatewaySettings
from shared.commands import Command
from shared.errors import Unavailable
from shared.events import FolderRef
from shared.ids import EventId, StreamId
from shared.mongo import Document
from shared.receipts import (
    EpisodeDeleted,
    EpisodePatched,
    EpisodeRestored,
    EpisodeSnapshot,
    EpisodesRecorded,
    EpisodeUpserted,
    Receipt,
    Ref,
)

SECRET = "a-secret-of-the-tests-that-is-long-enough-for-hs256"
API_KEY = "key-for-my-app"
AT = datetime(2026, 4, 14, 10, 0, 0, 123_000, tzinfo=UTC)
ID = "0123456789abcdef01234567"

Answer = Callable[[Command], Any]


def snapshot(**given: Any) -> EpisodeSnapshot:
    values: dict[str, Any] = {
        "id": ID,
        "project_id": ID,
        "name": "run-042",
        "description": None,
        "tags": (),
        "status": "running",
        "write_protected": False,
        "folder": None,
        "metadata": Raw(b"null"),
        "created_at": AT,
        "updated_at": AT,
    }
    return EpisodeSnapshot(**(values | given))


def upserted(*, created: bool = True, **given: Any) -> EpisodeUpserted:
    return EpisodeUpserted(
        created=created, episode=snapshot(**given), project=Ref(ID, "robotics"), namespace=Ref(ID, "alice")
    )


def usual_outcome(command: Command) -> Any:
    """What an ingestor might say."""
    match type(command).__name__:
        case "UpsertEpisode":
            return upserted(folder=FolderRef(ID, "/experiments/batch-1"))
        case "PatchEpisode":
            return EpisodePatched(snapshot())
        case "DeleteEpisode":
            return EpisodeDeleted(ID, AT)
        case "RestoreEpisode":
            return EpisodeRestored(snapshot())
        case _:
            count = len(command.items)  # type: ignore[union-attr]
            return EpisodesRecorded(
                tuple(EventId(44 + number) for number in range(count)),
                tuple(f"ep_{ID}" for _ in range(count)),
                command.errors,  # type: ignore[union-attr]
            )


class FakeDispatcher:
    """Remembers the commands and says what it was told to say."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.traceparents: list[str | None] = []
        self.outcome: Answer = usual_outcome
        self.event_id = 45
        self.replayed = False
        self.error: Exception | None = None
        self.checked: list[str] = []
        self.busy: Exception | None = None
        self.missing: str | None = None

    def check(self, caller: str) -> None:
        self.checked.append(caller)
        if self.busy is not None:
            raise self.busy

    async def dispatch(self, command: Command, traceparent: str | None = None) -> Receipt:
        self.commands.append(command)
        self.traceparents.append(traceparent)
        if self.error is not None:
            raise self.error
        return Receipt(
            command_id=command.command_id,
            stream=command.stream,
            event_id=EventId(self.event_id),
            outcome=self.outcome(command),
            replayed=self.replayed,
        )


class InMemoryReadModel:
    """One generation, in dicts."""

    def __init__(self) -> None:
        self.event_ids: dict[StreamId, int] = {}
        self.projects: list[Document] = []
        self.project_episodes_: list[Document] = []
        self.tenant_episodes: list[Document] = []
        self.polls = 0

    async def event_id(self, stream: StreamId) -> EventId:
        self.polls += 1
        return EventId(self.event_ids.get(stream, 0))

    async def project(self, namespace: str, slug: str) -> Document | None:
        return _first(self.projects, {"namespace": namespace, "slug": slug})

    async def project_episode(self, namespace: str, project: str, name: str) -> Document | None:
        return _first(
            self.project_episodes_, {"namespace": namespace, "project": project, "name": name, "deleted": False}
        )

    async def project_episodes(self, project_id: str, where: Slice) -> Sequence[Document]:
        living = [
            document
            for document in self.project_episodes_
            if document["project_id"] == project_id and not document["deleted"] and document["ordinal"] > where.after
        ]
        return sorted(living, key=lambda document: document["ordinal"])[where.skip : where.skip + where.limit]

    async def tenant_episode(self, tenant_id: str, episode_id: str) -> Document | None:
        return _first(self.tenant_episodes, {"tenant_id": tenant_id, "_id": episode_id})


def _first(documents: Sequence[Document], like: Mapping[str, Any]) -> Document | None:
    return next((document for document in documents if like.items() <= document.items()), None)


class InMemoryReadModels:
    """Has one generation, unless it is told to be away."""

    def __init__(self) -> None:
        self.model = InMemoryReadModel()
        self.missing: str | None = None

    def current(self) -> ReadModel:
        if self.missing is not None:
            raise Unavailable(self.missing)
        return self.model


def project_document(**given: Any) -> Document:
    return {
        "_id": ID,
        "namespace": "alice",
        "slug": "robotics",
        "name": "robotics",
        "created_at": AT,
        "total": 0,
        "blocks": [],
    } | given


def project_episode_document(**given: Any) -> Document:
    return {
        "_id": ID,
        "namespace": "alice",
        "project": "robotics",
        "project_id": ID,
        "ordinal": 1,
        "name": "run-042",
        "description": None,
        "tags": [],
        "status": "running",
        "write_protected": False,
        "folder": None,
        "metadata": "null",
        "created_at": AT,
        "updated_at": AT,
        "deleted": False,
        "deleted_at": None,
        "event_id": 1,
    } | given


def tenant_episode_document(**given: Any) -> Document:
    return {
        "_id": f"ep_{ID}",
        "tenant_id": "my-app",
        "namespace": None,
        "event_id": 42,
        "type": "decision",
        "content": "Chose CockroachDB for the payments service.",
        "source": "meeting-notes",
        "author": "prashant",
        "channel": None,
        "timestamp": datetime(2026, 3, 15, 10, tzinfo=UTC),
        "metadata": "{}",
        "entities": [{"id": f"ent_{ID}", "name": "CockroachDB", "type": "technology"}],
        "status": "active",
        "created_at": datetime(2026, 3, 15, 10, 0, 1, tzinfo=UTC),
    } | given


def settings(**given: Any) -> GatewaySettings:
    told: dict[str, Any] = {
        "jwt_secret": SECRET,
        "api_keys": {sha256(API_KEY.encode()).hexdigest(): ("my-app",)},
        "gateway_min_event_wait": 0.02,
        "gateway_refusal_seconds": 0.01,
    }
    return GatewaySettings(**(told | given))


def token(username: str, **claims: Any) -> str:
    return jwt.encode({"sub": username, "username": username, "exp": 4_000_000_000, **claims}, SECRET, "HS256")


class Gateway:
    """The application on fakes, with a client for it."""

    def __init__(self, **told: Any) -> None:
        self.dispatcher = FakeDispatcher()
        self.read_models = InMemoryReadModels()
        self.lifecycle = Lifecycle()
        configured = settings(**told)
        app = create_app(
            dispatcher=self.dispatcher,
            read_models=self.read_models,
            project_callers=project_authenticator(configured),
            batch_callers=batch_authenticator(configured),
            settings=configured,
            lifecycle=self.lifecycle,
        )
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway"
        )

    @property
    def model(self) -> InMemoryReadModel:
        return self.read_models.model

    @property
    def command(self) -> Any:
        """The one command that was dispatched."""
        [command] = self.dispatcher.commands
        return command

    async def ask(self, method: str, path: str, *, authorization: str | None = "alice", **given: Any) -> httpx.Response:
        """Send a request, as `alice` to the projects API or with the key to the batch API, and check the answer."""
        headers = dict(given.pop("headers", {}))
        if authorization == "alice":
            authorization = f"Bearer {API_KEY if path.startswith('/v1') else token('alice')}"
        if authorization is not None:
            headers["Authorization"] = authorization
        response = await self._client.request(method, path, headers=headers, **given)
        check(response)
        return response


def check(response: httpx.Response) -> None:
    """Fail if the OpenAPI document does not say that this may be the answer."""
    document = openapi.document()
    assert re.fullmatch(r"[A-Za-z0-9._:+/=@-]{1,128}", response.headers["x-request-id"])
    operation = _operation(document, response.request)
    if operation is None:
        assert response.status_code in {404, 405}
        _check_body(document, document["components"]["responses"][str(response.status_code)], response)
        return
    described = operation["responses"].get(str(response.status_code))
    assert described is not None, f"{response.status_code} is not described: {response.text}"
    _check_body(document, described, response)


def _operation(document: Any, request: httpx.Request) -> Any:
    path = request.url.raw_path.partition(b"?")[0].decode()
    method = {"HEAD": "get"}.get(request.method, request.method.lower())
    for template, item in document["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            return item.get(method)
    return None


def _check_body(document: Any, described: Any, response: httpx.Response) -> None:
    described = _resolve(document, described)
    for name, reference in described["headers"].items():
        header = _resolve(document, reference)
        if header.get("required"):
            assert name in response.headers
        if name in response.headers and header["schema"].get("type") == "integer":
            assert response.headers[name].isdecimal()
    known = {name.lower() for name in described["headers"]} | {"content-type", "content-length", "connection"}
    assert not {name for name in response.headers if name not in known}
    [(media_type, content)] = described["content"].items()
    assert response.headers["content-type"].partition(";")[0] == media_type
    if media_type.endswith("json") and response.request.method != "HEAD":
        schema = {**content["schema"], "components": document["components"]}
        errors = [error.message for error in Draft202012Validator(schema).iter_errors(response.json())]
        assert not errors, errors


def _resolve(document: Any, part: Any) -> Any:
    while "$ref" in part:
        kind, name = part["$ref"].removeprefix("#/components/").split("/")
        part = document["components"][kind][name]
    return part
