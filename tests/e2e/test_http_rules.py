"""What holds for every route: problems, methods, media types, bodies, sizes, HEAD, and the pages without auth."""

import asyncio
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import pytest

from tests.e2e.client import (
    MAX_BODY_BYTES,
    PROBLEM_KEYS,
    Call,
    Http,
    Project,
    Tenant,
    assert_problem,
    body_of,
    event_id_of,
    padded,
)

pytest_plugins = ["tests.e2e.contract_fixtures"]

JSON = {"Content-Type": "application/json"}


# ---- routes and methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/", "/nowhere", "/v1", "/v2/episodes", "/namespaces", "/v1/episodes/ep_1/restore", "/favicon.ico"]
)
async def test_an_unknown_route_is_404(http: Http, project: Project, target: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        response = await http.send(method, target, authorization=project.authorization)
        assert_problem(response, HTTPStatus.NOT_FOUND, "not_found")


async def test_a_trailing_slash_is_404(http: Http, project: Project, tenant: Tenant) -> None:
    await project.given("run-042")
    for method in ("GET", "POST"):
        response = await http.send(method, f"{project.target}/", authorization=project.authorization)
        assert_problem(response, HTTPStatus.NOT_FOUND)
    for method in ("GET", "PATCH", "DELETE"):
        target = f"{project.episode_target('run-042')}/"
        assert_problem(await http.send(method, target, authorization=project.authorization), HTTPStatus.NOT_FOUND)
    response = await http.send("POST", f"{tenant.target}/", authorization=tenant.authorization)
    assert_problem(response, HTTPStatus.NOT_FOUND)
    assert_problem(await http.send("GET", "/healthz/"), HTTPStatus.NOT_FOUND)
    assert await project.names() == ["run-042"]


async def test_a_method_that_is_not_allowed_is_405_and_says_which_are(
    http: Http, project: Project, tenant: Tenant
) -> None:
    episode = await tenant.recorded()
    await project.given("run-042")
    for target, authorization, methods, allowed in (
        (project.target, project.authorization, ["PUT", "PATCH", "DELETE"], {"GET", "HEAD", "POST"}),
        (
            project.episode_target("run-042"),
            project.authorization,
            ["PUT", "POST"],
            {"GET", "HEAD", "PATCH", "DELETE"},
        ),
        (f"{project.episode_target('run-042')}/restore", project.authorization, ["GET", "PATCH"], {"POST"}),
        (tenant.target, tenant.authorization, ["GET", "PUT", "PATCH"], {"POST"}),
        (tenant.episode_target(episode["id"]), tenant.authorization, ["POST", "PUT"], {"GET", "HEAD"}),
        ("/healthz", None, ["POST"], {"GET", "HEAD"}),
    ):
        for method in methods:
            response = await http.send(method, target, authorization=authorization)
            assert_problem(response, HTTPStatus.METHOD_NOT_ALLOWED)
            allow = {word.strip() for word in response.headers["allow"].split(",")}
            assert allow - {"OPTIONS"} == allowed, (method, target)


async def test_errors_have_their_own_request_id(http: Http) -> None:
    ids = [assert_problem(await http.send("GET", "/nowhere"), 404)["request_id"] for _ in range(3)]
    assert len(set(ids)) == 3


async def test_a_problem_names_its_status(project: Project) -> None:
    problem = assert_problem(await project.post({}), HTTPStatus.BAD_REQUEST, "validation_error")
    assert problem.keys() >= PROBLEM_KEYS
    assert "name" in problem["detail"]


# ---- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/xml",
        "multipart/form-data; boundary=x",
        "application/jsonl",
        "text/json",
        "nonsense",
    ],
)
async def test_a_body_that_is_not_json_by_type_is_415(write_with_body: Call, media: str) -> None:
    content = json.dumps(write_with_body.body).encode()
    response = await write_with_body.send(content=content, headers={"Content-Type": media})
    assert_problem(response, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


async def test_a_body_without_type_is_415(write_with_body: Call) -> None:
    response = await write_with_body.send(content=json.dumps(write_with_body.body).encode())
    assert_problem(response, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


@pytest.mark.parametrize(
    "media", ["application/json; charset=utf-8", "application/json;charset=UTF-8", "Application/JSON"]
)
async def test_the_json_type_may_be_written_in_its_other_ways(write_with_body: Call, media: str) -> None:
    content = json.dumps(write_with_body.body).encode()
    response = await write_with_body.send(content=content, headers={"Content-Type": media})
    assert response.is_success, response.text


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"{'name': 'run-042'}",
        b'{"name": "run-042"',
        b'{"name": "run-042",}',
        b'{"name": "run-042"} {}',
        b'{"name": "run-042"} x',
        b"{name: 1}",
        b'{"name": "a\nb"}',
        b'{"name": "\\x41"}',
        b'{"name": 01}',
        b"undefined",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: str(content)[:40],
)
async def test_broken_json_is_400(write_with_body: Call, content: bytes) -> None:
    response = await write_with_body.send(content=content, headers=JSON)
    assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("content", [b"", b" ", b"\n"])
async def test_a_post_that_needs_a_body_is_400_without(project: Project, tenant: Tenant, content: bytes) -> None:
    for place in (project, tenant):
        response = await place.post(content=content, headers=JSON)
        assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("content", [b"[]", b'[{"name": "run-042"}]', b'"run-042"', b"42", b"true", b"null"])
async def test_json_that_is_not_an_object_is_400(write_with_body: Call, content: bytes) -> None:
    response = await write_with_body.send(content=content, headers=JSON)
    assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")


BAD_WORDS = {
    "bad UTF-8": b'"\xff\xfe"',
    "UTF-8 cut short": b'"\xc3"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
}


@pytest.mark.parametrize("word", list(BAD_WORDS.values()), ids=list(BAD_WORDS))
async def test_words_that_are_not_json_are_400_wherever_they_stand(
    project: Project, tenant: Tenant, word: bytes
) -> None:
    await project.given("run-042")
    tenant_id = tenant.tenant_id.encode()
    for call, content in (
        (Call(project.http, "POST", project.target, project.authorization), b'{"name": "a", "metadata": {"b": [%b]}}'),
        (
            Call(project.http, "PATCH", project.episode_target("run-042"), project.authorization),
            b'{"metadata": {"b": %b}}',
        ),
        (
            Call(tenant.http, "POST", tenant.target, tenant.authorization),
            b'{"tenant_id": "' + tenant_id + b'", "episodes": [{"content": "x", "metadata": {"b": %b}}]}',
        ),
        (
            Call(tenant.http, "POST", tenant.target, tenant.authorization),
            b'{"tenant_id": "' + tenant_id + b'", "unknown": %b, "episodes": [{"content": "x"}]}',
        ),
    ):
        response = await call.send(content=content.replace(b"%b", word), headers=JSON)
        assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")
    assert await project.names() == ["run-042"]
    assert (await tenant.given({"content": "The first."}))["event_ids"] == [1]


async def test_of_duplicate_keys_the_last_is_taken(http: Http, project: Project, tenant: Tenant) -> None:
    response = await http.write(
        project.stream,
        "POST",
        project.target,
        authorization=project.authorization,
        content=b'{"name": "first", "tags": 42, "name": "last", "tags": ["a"], "metadata": {"b": 1, "b": 2}}',
        headers=JSON,
    )
    episode = body_of(response, HTTPStatus.CREATED)["episode"]
    assert (episode["name"], episode["tags"], episode["metadata"]) == ("last", ["a"], {"b": 2})

    content = (
        b'{"tenant_id": "nobody", "episodes": [], "tenant_id": "%b", "episodes": [{"content": "", "content": "b"}]}'
    )
    response = await http.write(
        tenant.stream,
        "POST",
        tenant.target,
        authorization=tenant.authorization,
        content=content.replace(b"%b", tenant.tenant_id.encode()),
        headers=JSON,
    )
    (episode_id,) = body_of(response, HTTPStatus.CREATED)["episode_ids"]
    assert (await tenant.seen(episode_id))["content"] == "b"


async def test_a_request_without_body_may_carry_a_content_type(http: Http, project: Project, tenant: Tenant) -> None:
    episode = await tenant.recorded()
    await project.given("run-042")
    await project.seen("run-042")
    target, authorization = project.episode_target("run-042"), project.authorization
    for media in ("application/json", "text/plain"):
        for method, path, who in (
            ("GET", project.target, authorization),
            ("GET", target, authorization),
            ("GET", tenant.episode_target(episode["id"]), tenant.authorization),
            ("DELETE", target, authorization),
            ("POST", f"{target}/restore", authorization),
            ("GET", "/healthz", None),
        ):
            headers = {"Content-Type": media}
            if method != "GET":
                response = await http.write(project.stream, method, path, authorization=who, headers=headers)
            else:
                response = await http.send(method, path, authorization=who, headers=headers)
            body_of(response, HTTPStatus.OK)
        await project.seen("run-042")


# ---- sizes -----------------------------------------------------------------------------------------------------------

PROJECT_BODIES = {
    "description": b'{"name": "run-042", "description": "PADDING"}',
    "metadata": b'{"name": "run-042", "metadata": {"text": "PADDING"}}',
}


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("key", list(PROJECT_BODIES))
async def test_a_project_body_of_8_mib_is_taken_and_one_byte_more_is_413(
    project: Project, method: str, key: str
) -> None:
    await project.given("run-042")
    before = await project.seen("run-042")
    target = project.target if method == "POST" else project.episode_target("run-042")

    async def send(size: int) -> Any:
        content = padded(PROJECT_BODIES[key], size)
        return await project.http.write(
            project.stream, method, target, authorization=project.authorization, content=content, headers=JSON
        )

    response = await send(MAX_BODY_BYTES + 1)
    assert_problem(response, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "payload_too_large")
    assert await project.seen("run-042") == before

    body_of(await send(MAX_BODY_BYTES), HTTPStatus.OK)
    sent = json.loads(padded(PROJECT_BODIES[key], MAX_BODY_BYTES))[key]
    assert (await project.seen("run-042"))[key] == sent


async def test_a_batch_of_8_mib_is_recorded_and_one_byte_more_is_413(http: Http, tenant: Tenant) -> None:
    items = [{"content": "x" * 102_400} for _ in range(81)]
    text = json.dumps({"tenant_id": tenant.tenant_id, "episodes": [*items, {"content": "PADDING"}]}).encode()

    async def send(size: int) -> Any:
        content = padded(text, size)
        return await http.write(
            tenant.stream, "POST", tenant.target, authorization=tenant.authorization, content=content, headers=JSON
        )

    response = await send(MAX_BODY_BYTES + 1)
    assert_problem(response, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "payload_too_large")

    answer = body_of(await send(MAX_BODY_BYTES), HTTPStatus.CREATED)
    assert answer["errors"] == []
    assert answer["event_ids"] == list(range(1, 83))
    for place in (0, 80):
        assert (await tenant.seen(answer["episode_ids"][place]))["content"] == "x" * 102_400
    last = json.loads(padded(text, MAX_BODY_BYTES))["episodes"][-1]["content"]
    assert (await tenant.seen(answer["episode_ids"][81]))["content"] == last


async def test_the_limit_holds_without_a_content_length(http: Http, project: Project) -> None:
    async def chunks(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65_536):
            yield content[start : start + 65_536]

    async def send(size: int) -> Any:
        content = chunks(padded(PROJECT_BODIES["description"], size))
        return await http.write(
            project.stream, "POST", project.target, authorization=project.authorization, content=content, headers=JSON
        )

    response = await send(MAX_BODY_BYTES + 1)
    assert_problem(response, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "payload_too_large")
    body_of(await send(MAX_BODY_BYTES), HTTPStatus.CREATED)


async def test_large_bodies_at_the_same_time_are_taken_or_put_off(project: Project) -> None:
    await project.given("run")
    large = "x" * (4 * 1024 * 1024)
    responses = await asyncio.gather(*(project.upsert(f"run-{number}", description=large) for number in range(4)))
    for number, response in enumerate(responses):
        if response.is_success:
            body_of(response, HTTPStatus.CREATED)
            assert (await project.seen(f"run-{number}"))["description"] == large
        else:
            assert_problem(response, HTTPStatus.SERVICE_UNAVAILABLE, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
    assert any(response.is_success for response in responses)


# ---- reads -----------------------------------------------------------------------------------------------------------


async def test_head_answers_as_get_does_without_a_body(read: Call) -> None:
    got = await read.send()
    body_of(got, HTTPStatus.OK)
    headed = await read.send(method="HEAD")
    assert headed.status_code == HTTPStatus.OK
    assert headed.headers["content-type"] == got.headers["content-type"]
    assert event_id_of(headed) >= event_id_of(got)


async def test_head_answers_404_where_get_does(http: Http, project: Project) -> None:
    await project.given("run-042")
    await project.seen("run-042")
    target = project.episode_target("run-043")
    response = await http.send("HEAD", target, authorization=project.authorization)
    assert response.status_code == HTTPStatus.NOT_FOUND


# ---- the pages without auth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/openapi.json"])
async def test_the_service_says_how_it_is_without_auth(http: Http, target: str) -> None:
    response = await http.send("GET", target)
    assert response.status_code == HTTPStatus.OK, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert (await http.send("HEAD", target)).status_code == HTTPStatus.OK


async def test_the_documentation_can_be_read_without_auth(http: Http) -> None:
    response = await http.send("GET", "/docs")
    assert response.status_code == HTTPStatus.OK
    assert response.headers["content-type"].startswith("text/html")


async def test_bad_credentials_do_not_matter_where_none_are_needed(http: Http) -> None:
    for target in ("/healthz", "/readyz", "/openapi.json"):
        response = await http.send("GET", target, authorization="Bearer nonsense")
        assert response.status_code == HTTPStatus.OK
