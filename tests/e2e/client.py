"""A thin client of both APIs. It holds every answer it gets against the service's own OpenAPI document."""

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote, urlencode
from uuid import uuid4

import httpx
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

MAX_BODY_BYTES = 8 * 1024 * 1024
PROBLEM_KEYS = frozenset({"type", "title", "status", "detail", "error", "message", "code", "request_id"})
NO_BODY: Any = object()

# The pages that describe the service are not described by it.
_UNDOCUMENTED_PAGES = frozenset({"/openapi.json", "/docs"})
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_PROJECT_ID = re.compile(r"[0-9a-f]{24}")
_DOCUMENT = "urn:openapi"


class Cluster(Protocol):
    """What these tests need of the running service."""

    @property
    def url(self) -> str: ...
    @property
    def jwt_secret(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    def token(self, username: str, **claims: Any) -> str: ...
    def api_key_for(self, tenants: list[str]) -> str: ...


# ---- sending ---------------------------------------------------------------------------------------------------------


class Http:
    """Sends targets and bodies byte for byte as given, and refuses answers that the service does not document."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url.rstrip("/")
        self.last_event_ids: dict[str, int] = {}
        self._client = client
        self._document: ApiDocument | None = None

    async def send(
        self,
        method: str,
        target: str,
        *,
        authorization: str | None = None,
        body: Any = NO_BODY,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send one request. `body` is sent as JSON, `content` as it is and without a Content-Type of its own."""
        document = await self.document()
        all_headers = httpx.Headers()
        if authorization is not None:
            all_headers["Authorization"] = authorization
        if body is not NO_BODY:
            content = json.dumps(body).encode()
            all_headers["Content-Type"] = "application/json"
        all_headers.update(dict(headers or {}))
        request = self._client.build_request(method, self.url + target, content=content, headers=all_headers)
        sent = request.url.raw_path.decode()
        assert sent == target, f"the client library changed the target from {target} to {sent}"
        response = await self._client.send(request)
        _check_form(response)
        document.check(response)
        return response

    async def document(self) -> "ApiDocument":
        if self._document is None:
            response = await self._client.get(f"{self.url}/openapi.json")
            assert response.status_code == HTTPStatus.OK, f"GET /openapi.json: {response.text[:500]}"
            self._document = ApiDocument(response.json())
        return self._document

    async def write(self, stream: str, method: str, target: str, **options: Any) -> httpx.Response:
        """Send a write and remember, for the reads of its stream, how far the stream went."""
        response = await self.send(method, target, **options)
        if response.is_success and "x-event-id" in response.headers:
            self.last_event_ids[stream] = max(self.last_event_ids.get(stream, 0), event_id_of(response))
        return response

    async def read(
        self, stream: str, method: str, target: str, *, headers: Mapping[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        """Send a read that asks for what was written before. Headers given by the caller replace that."""
        if headers is None and stream in self.last_event_ids:
            headers = {"X-Min-Event-Id": str(self.last_event_ids[stream]), "Prefer": "wait=10"}
        response = await self.send(method, target, headers=headers, **options)
        if response.is_success:
            event_id_of(response)
        return response


@asynccontextmanager
async def open_http(url: str) -> AsyncIterator[Http]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False) as client:
        yield Http(url, client)


@dataclass(frozen=True)
class Project:
    """One project of the projects API, as one caller sees it."""

    http: Http
    namespace: str
    slug: str
    token: str

    @property
    def stream(self) -> str:
        return f"namespace:{self.namespace}"

    @property
    def authorization(self) -> str:
        return f"Bearer {self.token}"

    @property
    def target(self) -> str:
        return f"/namespaces/{segment(self.namespace)}/projects/{segment(self.slug)}/episodes"

    def episode_target(self, name: str) -> str:
        return f"{self.target}/{segment(name)}"

    def beside(self, *, namespace: str | None = None, slug: str | None = None, token: str | None = None) -> "Project":
        """Return the same caller's view of another place, or another caller's view of this one."""
        return Project(self.http, namespace or self.namespace, slug or self.slug, token or self.token)

    async def post(self, body: Any = NO_BODY, *, query: str = "", **options: Any) -> httpx.Response:
        return await self.http.write(
            self.stream, "POST", self.target + query, authorization=self.authorization, body=body, **options
        )

    async def upsert(
        self, name: str, *, query: str = "", headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        return await self.post({"name": name, **fields}, query=query, headers=headers)

    async def patch(
        self, episode: str, *, query: str = "", headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        target = self.episode_target(episode) + query
        return await self.http.write(
            self.stream, "PATCH", target, authorization=self.authorization, body=fields, headers=headers
        )

    async def delete(self, name: str, *, query: str = "", headers: Mapping[str, str] | None = None) -> httpx.Response:
        target = self.episode_target(name) + query
        return await self.http.write(self.stream, "DELETE", target, authorization=self.authorization, headers=headers)

    async def restore(self, name: str, *, query: str = "", headers: Mapping[str, str] | None = None) -> httpx.Response:
        target = f"{self.episode_target(name)}/restore{query}"
        return await self.http.write(self.stream, "POST", target, authorization=self.authorization, headers=headers)

    async def get(self, name: str, *, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return await self.http.read(
            self.stream, "GET", self.episode_target(name), authorization=self.authorization, headers=headers
        )

    async def list(self, *, headers: Mapping[str, str] | None = None, **query: Any) -> httpx.Response:
        target = f"{self.target}?{urlencode(query)}" if query else self.target
        return await self.http.read(self.stream, "GET", target, authorization=self.authorization, headers=headers)

    async def given(self, name: str, **fields: Any) -> dict[str, Any]:
        """Create an episode that was not there, or say why that failed. Returns the episode of the answer."""
        episode = body_of(await self.upsert(name, **fields), HTTPStatus.CREATED)["episode"]
        assert isinstance(episode, dict)
        return episode

    async def seen(self, name: str) -> dict[str, Any]:
        """Return the single episode as a reader sees it."""
        return body_of(await self.get(name), HTTPStatus.OK)

    async def names(self) -> Sequence[str]:
        """Return the names of the first 200 listed episodes, in the order of the list."""
        return [episode["name"] for episode in body_of(await self.list(pageSize=200), HTTPStatus.OK)["episodes"]]


@dataclass(frozen=True)
class Tenant:
    """One tenant of the batch API, as the holder of one key sees it."""

    http: Http
    tenant_id: str
    api_key: str
    target: str = field(default="/v1/episodes", init=False)

    @property
    def stream(self) -> str:
        return f"tenant:{self.tenant_id}"

    @property
    def authorization(self) -> str:
        return f"Bearer {self.api_key}"

    def episode_target(self, episode_id: str) -> str:
        return f"{self.target}/{segment(episode_id)}?{urlencode({'tenant_id': self.tenant_id})}"

    async def post(self, body: Any = NO_BODY, *, query: str = "", **options: Any) -> httpx.Response:
        return await self.http.write(
            self.stream, "POST", self.target + query, authorization=self.authorization, body=body, **options
        )

    async def record(
        self, *items: Any, query: str = "", headers: Mapping[str, str] | None = None, **envelope: Any
    ) -> httpx.Response:
        body = {"tenant_id": self.tenant_id, "episodes": list(items), **envelope}
        return await self.post(body, query=query, headers=headers)

    async def get(self, episode_id: str, *, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return await self.http.read(
            self.stream, "GET", self.episode_target(episode_id), authorization=self.authorization, headers=headers
        )

    async def given(self, *items: Any) -> dict[str, Any]:
        """Record items that are all good, or say why that failed. Returns the answer."""
        answer = body_of(await self.record(*items), HTTPStatus.CREATED)
        assert answer["errors"] == [], answer
        return answer

    async def seen(self, episode_id: str) -> dict[str, Any]:
        return body_of(await self.get(episode_id), HTTPStatus.OK)

    async def recorded(self, **item: Any) -> dict[str, Any]:
        """Record one item and return the episode as a reader sees it."""
        answer = await self.given({"content": "A word.", **item})
        return await self.seen(answer["episode_ids"][0])


@dataclass(frozen=True)
class Call:
    """One request that would succeed as it stands, for rules that hold on every route."""

    http: Http
    method: str
    target: str
    authorization: str
    body: Any = NO_BODY

    async def send(self, **changes: Any) -> httpx.Response:
        options = {"authorization": self.authorization, "body": self.body, **changes}
        if "content" in changes:
            options["body"] = NO_BODY
        return await self.http.send(options.pop("method", self.method), options.pop("target", self.target), **options)


# ---- words of the tests ----------------------------------------------------------------------------------------------


def unique(word: str) -> str:
    """Return a slug, tenant or key that no other test uses."""
    return f"{word}-{uuid4().hex[:12]}"


def segment(text: str) -> str:
    """Encode a text as one segment of a path: slashes and lone dots too, which clients would otherwise act on."""
    return quote(text, safe="") if text not in {".", ".."} else text.replace(".", "%2E")


def a_project(http: Http, cluster: Cluster, *, slug: str = "robotics") -> Project:
    """Return a project of a caller who has not been seen before."""
    username = unique("alice")
    return Project(http, username, slug, cluster.token(username))


def a_tenant(http: Http, cluster: Cluster) -> Tenant:
    return Tenant(http, unique("my-app"), cluster.api_key)


def body_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, f"{described(response)}, expected {int(status)}"
    body = response.json()
    assert isinstance(body, dict), f"{described(response)} is not an object"
    return body


def event_id_of(response: httpx.Response) -> int:
    value = response.headers.get("x-event-id")
    assert value is not None, f"no X-Event-Id: {described(response)}"
    assert value.isascii(), value
    assert value.isdigit(), f"X-Event-Id is not a number: {value!r}"
    return int(value)


def assert_problem(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Check that the answer is this problem. Its form is checked for every answer."""
    problem = body_of(response, status)
    assert code is None or problem["code"] == code, f"{described(response)}, expected {code}"
    return problem


def assert_project_id(value: object) -> None:
    assert isinstance(value, str), value
    assert _PROJECT_ID.fullmatch(value), f"not 24 lower-case hex digits: {value}"


def assert_time(value: object) -> datetime:
    """Check that a time is ISO 8601 in UTC, with milliseconds and Z."""
    assert isinstance(value, str), value
    assert _TIME.fullmatch(value), f"not a time with milliseconds and Z: {value}"
    return datetime.strptime(value, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


def padded(text: bytes, size: int) -> bytes:
    """Bring a JSON text with the word PADDING in it to exactly `size` bytes."""
    result = text.replace(b"PADDING", b"x" * (size - len(text) + len(b"PADDING")))
    assert len(result) == size
    return result


def described(response: httpx.Response) -> str:
    text = response.text if len(response.content) <= 600 else f"{response.text[:600]}…"
    return f"{response.request.method} {response.request.url} → {response.status_code} {text}"


# ---- what holds for every answer -------------------------------------------------------------------------------------


def _check_form(response: httpx.Response) -> None:
    assert not response.has_redirect_location, f"a redirect: {described(response)}"
    if response.request.method == "HEAD":
        assert response.content == b"", f"an answer to HEAD has a body: {described(response)}"
        return
    if not response.is_error:
        return
    media = response.headers.get("content-type", "").partition(";")[0]
    assert media == "application/problem+json", f"an error is {media!r}: {described(response)}"
    problem = response.json()
    assert problem.keys() >= PROBLEM_KEYS, f"a problem lacks {PROBLEM_KEYS - problem.keys()}: {described(response)}"
    assert problem["status"] == response.status_code, described(response)
    assert problem["error"] == problem["message"] == problem["detail"], described(response)
    for key in PROBLEM_KEYS - {"status"}:
        assert isinstance(problem[key], str), f"{key} is not a string: {described(response)}"
        assert problem[key], f"{key} is empty: {described(response)}"


class ApiDocument:
    """The OpenAPI document that the service gives of itself."""

    def __init__(self, document: dict[str, Any]) -> None:
        assert str(document["openapi"]).startswith("3.1"), "schemas of OpenAPI 3.1 are JSON Schema 2020-12"
        self.document = document
        resource: Resource[Any] = DRAFT202012.create_resource(document)
        self._registry: Registry[Any] = Registry().with_resource(_DOCUMENT, resource)
        self._validators: dict[str, Draft202012Validator] = {}
        # A path with fewer parameters is the closer match.
        templates = sorted(document["paths"], key=lambda template: template.count("{"))
        self._paths = [(template, re.compile(_pattern(template))) for template in templates]

    def check(self, response: httpx.Response) -> None:
        """Check that the route, the method, the status and the shape of an answer are documented."""
        path = response.request.url.raw_path.decode().partition("?")[0]
        if path in _UNDOCUMENTED_PAGES:
            return
        template = next((template for template, pattern in self._paths if pattern.fullmatch(path)), None)
        if template is None:
            assert response.status_code == HTTPStatus.NOT_FOUND, f"an undocumented route: {described(response)}"
            return
        operations = self.document["paths"][template]
        method = response.request.method.lower()
        if method == "head" and "head" not in operations:
            method = "get"
        if method not in operations:
            assert response.status_code == HTTPStatus.METHOD_NOT_ALLOWED, f"undocumented: {described(response)}"
            return
        self._check_answer(response, ("paths", template, method, "responses"))

    def validator(self, *pointer: str) -> Draft202012Validator:
        """Return the validator of the schema at `pointer`, which must tell every key of an object."""
        pointer = self.resolved(*pointer)
        reference = f"{_DOCUMENT}#{''.join(f'/{_escaped(part)}' for part in pointer)}"
        if reference not in self._validators:
            schema = {"$ref": reference, "unevaluatedProperties": False}
            self._validators[reference] = Draft202012Validator(schema, registry=self._registry)
        return self._validators[reference]

    def at(self, *pointer: str) -> Any:
        """Return what stands at `pointer`, references followed."""
        value: Any = self.document
        for part in self.resolved(*pointer):
            value = value[part]
        return value

    def resolved(self, *pointer: str) -> tuple[str, ...]:
        """Follow the references on the way to `pointer`."""
        value: Any = self.document
        way: tuple[str, ...] = ()
        for part in pointer:
            value, way = value[part], (*way, part)
            while isinstance(value, dict) and "$ref" in value:
                way = tuple(value["$ref"].removeprefix("#/").split("/"))
                value = self.document
                for step in way:
                    value = value[step]
        return way

    def _check_answer(self, response: httpx.Response, responses: tuple[str, ...]) -> None:
        documented = self.at(*responses)
        status = str(response.status_code)
        candidates = [status, f"{status[0]}XX", *(["default"] if response.is_error else [])]
        found = next((candidate for candidate in candidates if candidate in documented), None)
        assert found is not None, f"an undocumented status (documented: {sorted(documented)}): {described(response)}"
        if response.request.method == "HEAD":
            return
        content = self.at(*responses, found).get("content", {})
        media = response.headers.get("content-type", "").partition(";")[0]
        if not content and not response.content:
            return
        assert media in content, f"an undocumented media type {media!r} ({list(content)}): {described(response)}"
        errors = list(self.validator(*responses, found, "content", media, "schema").iter_errors(response.json()))
        assert not errors, f"not as documented: {errors[0].json_path}: {errors[0].message[:300]}; {described(response)}"


def _pattern(template: str) -> str:
    return "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in re.split(r"({[^}]+})", template))


def _escaped(part: str) -> str:
    return quote(part.replace("~", "~0").replace("/", "~1"), safe="~")
