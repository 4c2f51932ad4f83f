"""The service's own document: that it tells every route, and tells the shapes exactly.

That every answer is as documented is checked by the client of all these tests.
"""

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.e2e.client import Http, Project, Tenant, body_of

pytest_plugins = ["tests.e2e.contract_fixtures"]

EPISODES = "/namespaces/{}/projects/{}/episodes"
ROUTES = {
    EPISODES: {"get", "post"},
    f"{EPISODES}/{{}}": {"get", "patch", "delete"},
    f"{EPISODES}/{{}}/restore": {"post"},
    "/v1/episodes": {"post"},
    "/v1/episodes/{}": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
}
ERRORS = {
    (EPISODES, "post"): {"400", "401", "403", "404", "410", "413", "415", "422", "503", "504"},
    (EPISODES, "get"): {"400", "401", "403", "404", "503"},
    (f"{EPISODES}/{{}}", "get"): {"400", "401", "403", "404", "503"},
    (f"{EPISODES}/{{}}", "patch"): {"400", "401", "403", "404", "409", "413", "415", "422", "503", "504"},
    (f"{EPISODES}/{{}}", "delete"): {"400", "401", "403", "404", "422", "503", "504"},
    (f"{EPISODES}/{{}}/restore", "post"): {"400", "401", "403", "404", "422", "503", "504"},
    ("/v1/episodes", "post"): {"400", "401", "403", "413", "415", "422", "503", "504"},
    ("/v1/episodes/{}", "get"): {"400", "401", "403", "404", "503"},
}


def without_names(template: str) -> str:
    return re.sub(r"{[^}]*}", "{}", template)


def every_schema(value: Any) -> Iterator[Any]:
    """Yield whatever stands under a key `schema`, and the components."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "schema":
                yield inner
            else:
                yield from every_schema(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from every_schema(inner)


def every_reference(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from every_reference(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from every_reference(inner)


async def test_every_route_is_documented(http: Http) -> None:
    paths = (await http.document()).document["paths"]
    documented = {without_names(template): set(operations) for template, operations in paths.items()}
    for route, methods in ROUTES.items():
        assert documented[route] >= methods, route


@pytest.mark.parametrize(("route", "method"), list(ERRORS), ids=str)
async def test_every_error_is_documented_as_a_problem(http: Http, route: str, method: str) -> None:
    document = await http.document()
    (template,) = [path for path in document.document["paths"] if without_names(path) == route]
    responses = document.at("paths", template, method, "responses")
    ranges = {status[0] for status in responses if status.endswith("XX")}
    missing = {status for status in ERRORS[route, method] if status not in responses and status[0] not in ranges}
    assert not missing, f"undocumented: {sorted(missing)}"
    for status in responses:
        if status[0] in "45":
            content = document.at("paths", template, method, "responses", status, "content")
            assert list(content) == ["application/problem+json"], status


async def test_schemas_are_schemas_and_references_lead_somewhere(http: Http) -> None:
    document = await http.document()
    schemas = [*every_schema(document.document["paths"])]
    schemas += document.document.get("components", {}).get("schemas", {}).values()
    assert schemas
    for schema in schemas:
        Draft202012Validator.check_schema(schema)
    for reference in every_reference(document.document):
        assert reference.startswith("#/"), reference
        document.at(*reference.removeprefix("#/").split("/"))


async def test_documented_answers_have_exactly_the_keys_that_are_sent(
    http: Http, project: Project, tenant: Tenant
) -> None:
    document = await http.document()
    created = await project.upsert("run-042", folder="/a")
    updated = await project.upsert("run-042")
    listed = await project.list()
    patched = await project.patch("run-042", tags=["a"])
    single = await project.get("run-042")
    deleted = await project.delete("run-042")
    restored = await project.restore("run-042")
    refused = await project.post({})
    recorded = await tenant.record({"content": "A word."}, {})
    episode = await tenant.get(recorded.json()["episode_ids"][0])
    for route, response in (
        (EPISODES, created),
        (EPISODES, updated),
        (EPISODES, listed),
        (f"{EPISODES}/{{}}", patched),
        (f"{EPISODES}/{{}}", single),
        (f"{EPISODES}/{{}}", deleted),
        (f"{EPISODES}/{{}}/restore", restored),
        (EPISODES, refused),
        ("/v1/episodes", recorded),
        ("/v1/episodes/{}", episode),
    ):
        (template,) = [path for path in document.document["paths"] if without_names(path) == route]
        method, media = response.request.method.lower(), response.headers["content-type"].partition(";")[0]
        validator = document.validator(
            "paths", template, method, "responses", str(response.status_code), "content", media, "schema"
        )
        answer = response.json()
        assert validator.is_valid(answer)
        assert not validator.is_valid({**answer, "unheard-of": 1}), f"{method} {route} allows any key"
        for key in answer:
            less = {other: value for other, value in answer.items() if other != key}
            assert not validator.is_valid(less), f"{method} {route}: {key} is always there, and not required"


REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    (EPISODES, "post", {"name": "run-042"}),
    (
        EPISODES,
        "post",
        {
            "name": "run-042",
            "description": "A walk",
            "tags": ["a"],
            "folder": "/experiments/batch-1",
            "writeProtected": True,
            "metadata": {"a": {"b": 1}},
        },
    ),
    (EPISODES, "post", {"name": "run-042", "description": None, "tags": None, "folder": None, "metadata": None}),
    (f"{EPISODES}/{{}}", "patch", {}),
    (
        f"{EPISODES}/{{}}",
        "patch",
        {
            "name": "run-043",
            "description": "Updated description",
            "tags": ["batch-1"],
            "status": "completed",
            "writeProtected": True,
            "folder": "/experiments/batch-1",
            "metadata": {"a": 1},
        },
    ),
    (
        "/v1/episodes",
        "post",
        {
            "tenant_id": "my-app",
            "namespace": "engineering",
            "episodes": [
                {
                    "type": "message",
                    "content": "Standup: completed auth refactor, starting rate limiter.",
                    "source": "slack",
                    "author": "bob",
                    "timestamp": "2026-03-15T09:00:00Z",
                    "channel": "standup",
                    "metadata": {"a": 1},
                    "entities": [{"name": "CockroachDB", "type": "technology"}],
                    "idempotency_key": "k1",
                },
                {"content": "First."},
            ],
        },
    ),
]


@pytest.mark.parametrize(("route", "method", "body"), REQUESTS, ids=lambda value: str(value)[:40])
async def test_good_requests_are_as_documented(http: Http, route: str, method: str, body: dict[str, Any]) -> None:
    document = await http.document()
    (template,) = [path for path in document.document["paths"] if without_names(path) == route]
    validator = document.validator("paths", template, method, "requestBody", "content", "application/json", "schema")
    errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(body)]
    assert not errors, errors


@pytest.mark.parametrize(
    ("route", "method", "body"),
    [
        (EPISODES, "post", {}),
        (EPISODES, "post", {"name": 42}),
        (EPISODES, "post", {"name": "run-042", "tags": [1]}),
        (EPISODES, "post", {"name": "run-042", "metadata": "text"}),
        (f"{EPISODES}/{{}}", "patch", {"status": "finished"}),
        (f"{EPISODES}/{{}}", "patch", {"writeProtected": "true"}),
        ("/v1/episodes", "post", {"episodes": [{"content": "First."}]}),
        ("/v1/episodes", "post", {"tenant_id": "my-app"}),
        ("/v1/episodes", "post", {"tenant_id": "my-app", "episodes": {}}),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_requests_are_not_as_documented(http: Http, route: str, method: str, body: dict[str, Any]) -> None:
    document = await http.document()
    (template,) = [path for path in document.document["paths"] if without_names(path) == route]
    validator = document.validator("paths", template, method, "requestBody", "content", "application/json", "schema")
    assert not validator.is_valid(body)


async def test_parameters_of_the_lists_are_documented(http: Http) -> None:
    document = await http.document()
    (template,) = [path for path in document.document["paths"] if without_names(path) == EPISODES]
    operation = document.at("paths", template, "get")
    shared = document.at("paths", template).get("parameters", [])
    names = {parameter["name"] for parameter in [*operation.get("parameters", []), *shared] if "name" in parameter}
    assert names >= {"page", "pageSize"}
    for place, parameter in enumerate(operation["parameters"]):
        if parameter.get("name") == "page":
            schema = document.at("paths", template, "get", "parameters")[place]["schema"]
            assert schema.get("default", 1) == 1


async def test_the_document_is_the_same_for_everybody(http: Http) -> None:
    one = body_of(await http.send("GET", "/openapi.json"), HTTPStatus.OK)
    other = body_of(await http.send("GET", "/openapi.json", authorization="Bearer nonsense"), HTTPStatus.OK)
    assert one == other
