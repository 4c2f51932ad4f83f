"""The application on fakes: routing, error answers, headers; every answer is held against the OpenAPI document."""

import gc
import json
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from httpx import Response
from jsonschema import Draft202012Validator
from structlog.testing import capture_logs

from gateway import openapi
from gateway.dispatch import CommandTooLarge, NoReply, OutcomeUnknown
from gateway.exchange import MAX_BODY_BYTES
from gateway.problems import Problem
from shared.commands import DeleteEpisode, PatchEpisode, RecordEpisodes, RestoreEpisode, UpsertEpisode
from shared.errors import Unavailable
from shared.ids import CommandId, EventId, StreamId, namespace_stream, tenant_stream
from shared.receipts import CommandRefused
from tests.unit.gateway_fakes import (
    ID,
    Gateway,
    project_document,
    project_episode_document,
    tenant_episode_document,
    token,
    upserted,
)

EPISODES = "/namespaces/alice/projects/robotics/episodes"
EPISODE = f"{EPISODES}/run-042"
COMMAND_ID = CommandId("01900000-0000-7000-8000-000000000001")
WRITES = [
    ("POST", EPISODES, {"name": "run-042"}),
    ("PATCH", EPISODE, {}),
    ("DELETE", EPISODE, None),
    ("POST", f"{EPISODE}/restore", None),
    ("POST", "/v1/episodes", {"tenant_id": "my-app", "episodes": [{"content": "x"}]}),
]
READS = [EPISODES, EPISODE, f"/v1/episodes/ep_{ID}?tenant_id=my-app"]


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def full(gateway: Gateway) -> Gateway:
    gateway.model.projects.append(project_document(total=1, blocks=[1]))
    gateway.model.project_episodes_.append(project_episode_document())
    gateway.model.tenant_episodes.append(tenant_episode_document())
    gateway.model.event_ids |= {namespace_stream("alice"): 7, tenant_stream("my-app"): 42}
    return gateway


def problem(response: Response, status: int, code: str) -> Any:
    body = response.json()
    assert (response.status_code, body["status"], body["code"]) == (status, status, code)
    assert body["detail"] == body["error"] == body["message"]
    assert body["request_id"] == response.headers["x-request-id"]
    return body


# --- the documents' examples


async def test_a_created_episode_is_answered_as_in_the_document(gateway: Gateway) -> None:
    gateway.dispatcher.outcome = lambda _: upserted()
    response = await gateway.ask("POST", EPISODES, json={"name": "run-042"})
    assert response.status_code == 201
    assert response.json() == {
        "episode": {
            "id": ID,
            "name": "run-042",
            "description": None,
            "tags": [],
            "projectId": ID,
            "folderId": None,
            "writeProtected": False,
            "status": "running",
            "metadata": None,
        },
        "workspace": {"id": ID, "slug": "robotics"},
        "folder": None,
        "namespace": {"id": ID, "slug": "alice"},
    }
    assert response.headers["x-event-id"] == "45"
    assert response.headers["x-stream"] == "namespace:alice"


async def test_an_updated_episode_is_answered_200(gateway: Gateway) -> None:
    gateway.dispatcher.outcome = lambda _: upserted(created=False)
    assert (await gateway.ask("POST", EPISODES, json={"name": "run-042"})).status_code == 200


async def test_the_list_is_answered_as_in_the_document(gateway: Gateway) -> None:
    response = await full(gateway).ask("GET", EPISODES)
    assert response.json() == {
        "episodes": [
            {
                "id": ID,
                "name": "run-042",
                "description": None,
                "tags": [],
                "status": "running",
                "writeProtected": False,
                "folderId": None,
                "createdAt": "2026-04-14T10:00:00.123Z",
                "updatedAt": "2026-04-14T10:00:00.123Z",
            }
        ],
        "page": 1,
        "pageSize": 50,
        "total": 1,
        "totalPages": 1,
    }
    assert response.headers["x-event-id"] == "7"


async def test_a_recorded_episode_is_answered_as_in_the_document(gateway: Gateway) -> None:
    response = await full(gateway).ask("GET", READS[2])
    assert response.json() == {
        "id": f"ep_{ID}",
        "event_id": 42,
        "type": "decision",
        "content": "Chose CockroachDB for the payments service.",
        "source": "meeting-notes",
        "author": "prashant",
        "timestamp": "2026-03-15T10:00:00.000Z",
        "metadata": {},
        "entities": [{"id": f"ent_{ID}", "name": "CockroachDB", "type": "technology"}],
        "status": "active",
        "created_at": "2026-03-15T10:00:01.000Z",
    }


async def test_a_batch_with_a_bad_item_is_answered_as_in_the_document(gateway: Gateway) -> None:
    items = [{"type": "message", "content": "First.", "source": "test"}, {"type": "message", "source": "test"}]
    response = await gateway.ask("POST", "/v1/episodes", json={"tenant_id": "my-app", "episodes": items})
    assert response.status_code == 201
    assert response.json() == {
        "count": 1,
        "event_ids": [44],
        "errors": [{"index": 1, "code": "validation_error", "message": "Field 'content' is required"}],
        "episode_ids": [f"ep_{ID}"],
    }


# --- requests → commands


async def test_an_upsert_becomes_a_command(gateway: Gateway) -> None:
    body = {"name": "run-042", "folder": "experiments//batch-1/", "metadata": {"n": 2**70}, "tags": None, "new": 1}
    await gateway.ask("POST", EPISODES, json=body)
    command = gateway.command
    assert isinstance(command, UpsertEpisode)
    assert (command.namespace, command.project, command.name) == ("alice", "robotics", "run-042")
    assert command.owner
    assert command.actor == "alice"
    assert command.fields.folder == "/experiments/batch-1"
    assert command.fields.tags == ()
    assert command.fields.metadata == msgspec.Raw(b'{"n":1180591620717411303424}')
    assert command.fields.description is msgspec.UNSET


async def test_the_other_writes_become_commands(gateway: Gateway) -> None:
    await gateway.ask("PATCH", EPISODE, json={"name": "new"})
    await gateway.ask("DELETE", EPISODE)
    await gateway.ask("POST", f"{EPISODE}/restore")
    patch, delete, restore = gateway.dispatcher.commands
    assert isinstance(patch, PatchEpisode)
    assert (patch.name, patch.new_name) == ("run-042", "new")
    assert isinstance(delete, DeleteEpisode)
    assert isinstance(restore, RestoreEpisode)
    assert len({patch.command_id, delete.command_id, restore.command_id}) == 3


async def test_a_batch_becomes_a_command(gateway: Gateway) -> None:
    body = {"tenant_id": "my-app", "namespace": "engineering", "episodes": [{"content": "x"}, {}]}
    await gateway.ask("POST", "/v1/episodes", json=body)
    command = gateway.command
    assert isinstance(command, RecordEpisodes)
    assert (command.tenant_id, command.namespace, len(command.items)) == ("my-app", "engineering", 1)
    assert [error.index for error in command.errors] == [1]
    assert command.actor.startswith("key:")


async def test_a_granted_namespace_is_not_owned(gateway: Gateway) -> None:
    granted = f"Bearer {token('bob', namespaces=['alice'])}"
    await gateway.ask("POST", EPISODES, json={"name": "x"}, authorization=granted)
    assert not gateway.command.owner


async def test_an_encoded_slash_is_part_of_a_name(gateway: Gateway) -> None:
    await gateway.ask("PATCH", "/namespaces/alice/projects/a%2Fb%20%C3%BC/episodes/%E6%97%A5%2F%252F", json={})
    command = gateway.command
    assert (command.project, command.name) == ("a/b ü", "日/%2F")


@pytest.mark.parametrize("name", ["a/b", "ü", "日本", "a b", "%", "a" * 255, "日" * 255, "...", "episodes", "restore"])
async def test_names_of_all_kinds_arrive_as_they_are(gateway: Gateway, name: str) -> None:
    await gateway.ask("DELETE", f"{EPISODES}/{quote(name, safe='')}")
    assert gateway.command.name == name


@pytest.mark.parametrize("name", ["%FF", "%C0%AF", "%00", "%7F", "%C2%85", "%20", "a" * 256, "%2E", "%2E%2E", "%0A"])
async def test_what_is_no_name_in_a_path_is_400(gateway: Gateway, name: str) -> None:
    for path in (f"{EPISODES}/{name}", f"/namespaces/alice/projects/{name}/episodes/x"):
        problem(await gateway.ask("DELETE", path), 400, "validation_error")
        problem(await gateway.ask("GET", path), 400, "validation_error")
    problem(await gateway.ask("GET", f"/namespaces/{name}/projects/p/episodes"), 400, "validation_error")


# --- what is answered when something is wrong


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
async def test_nobody_known_is_401(gateway: Gateway, method: str, path: str, body: Any) -> None:
    for authorization in (None, "Bearer", "Bearer x", "Basic abc", "Bearer a.b.c"):
        response = await gateway.ask(method, path, json=body, authorization=authorization)
        problem(response, 401, "unauthorized")
    for read in READS:
        problem(await gateway.ask("GET", read, authorization="Bearer x"), 401, "unauthorized")
    assert not gateway.dispatcher.commands


async def test_somebody_elses_is_403(gateway: Gateway) -> None:
    bob = f"Bearer {token('bob')}"
    for method, path, body in WRITES[:4]:
        problem(await gateway.ask(method, path, json=body, authorization=bob), 403, "forbidden")
    for path in READS[:2]:
        problem(await gateway.ask("GET", path, authorization=bob), 403, "forbidden")
    batch = {"tenant_id": "other", "episodes": [{"content": "x"}]}
    problem(await gateway.ask("POST", "/v1/episodes", json=batch), 403, "forbidden")
    problem(await gateway.ask("GET", "/v1/episodes/x?tenant_id=other"), 403, "forbidden")


async def test_what_is_wrong_comes_before_what_is_forbidden_and_after_who_asks(gateway: Gateway) -> None:
    bob = f"Bearer {token('bob')}"
    problem(await gateway.ask("POST", EPISODES, json={}, authorization=bob), 400, "validation_error")
    problem(await gateway.ask("POST", EPISODES, content=b"{", authorization=bob), 415, "unsupported_media_type")
    problem(await gateway.ask("GET", f"{EPISODES}?page=0", authorization=bob), 400, "validation_error")
    problem(await gateway.ask("POST", EPISODES, json={}, authorization=None), 401, "unauthorized")


@pytest.mark.parametrize("path", ["/", "/nothing", f"{EPISODES}/", "/v1/episodes/", "/v1", f"{EPISODE}/restore/x"])
async def test_what_is_nowhere_is_404(gateway: Gateway, path: str) -> None:
    problem(await gateway.ask("GET", path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", EPISODES, "GET, HEAD, POST"),
        ("POST", EPISODE, "DELETE, GET, HEAD, PATCH"),
        ("GET", f"{EPISODE}/restore", "POST"),
        ("GET", "/v1/episodes", "POST"),
        ("DELETE", "/v1/episodes/x", "GET, HEAD"),
        ("OPTIONS", "/healthz", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_hears_the_right_ones(
    gateway: Gateway, method: str, path: str, allowed: str
) -> None:
    response = await gateway.ask(method, path)
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/jsonp"},
    ],
)
async def test_a_body_that_is_not_json_by_its_type_is_415(gateway: Gateway, headers: dict[str, str]) -> None:
    for method, path, _ in (WRITES[0], WRITES[1], WRITES[4]):
        response = await gateway.ask(method, path, content=b"{}", headers=headers)
        problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=UTF-8", "application/json;v=1"])
async def test_json_is_known_by_its_type(gateway: Gateway, media_type: str) -> None:
    response = await gateway.ask("POST", EPISODES, content=b'{"name":"x"}', headers={"Content-Type": media_type})
    assert response.status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"name":"x"}x',
        b'{"name":NaN}',
        b'{"name":"\xff"}',
        b'{"name":"\\ud800"}',
        b"[" * 100_000,
        b"\xef\xbb\xbf{}",
        b"[]",
        b"null",
        b'"name"',
        b'{"name":"x","n":1e999}',
        b'{"name":"x","metadata":{"a":' + b"[" * 600 + b"]" * 600 + b"}}",
    ],
)
async def test_a_body_that_is_no_json_object_is_400(gateway: Gateway, body: bytes) -> None:
    for path in (EPISODES, "/v1/episodes"):
        response = await gateway.ask("POST", path, content=body, headers={"Content-Type": "application/json"})
        problem(response, 400, "validation_error")


async def test_of_duplicate_keys_the_last_counts(gateway: Gateway) -> None:
    headers = {"Content-Type": "application/json"}
    await gateway.ask("POST", EPISODES, content=b'{"name":"a","name":"b"}', headers=headers)
    assert gateway.command.name == "b"


async def test_a_body_may_be_8_mib_and_not_a_byte_more(gateway: Gateway) -> None:
    def body(size: int) -> bytes:
        head, tail = b'{"name":"x","description":"', b'"}'
        return head + b"x" * (size - len(head) - len(tail)) + tail

    async def in_parts(content: bytes) -> Any:
        for start in range(0, len(content), 1024 * 1024):
            yield content[start : start + 1024 * 1024]

    headers = {"Content-Type": "application/json"}
    for content in (body(MAX_BODY_BYTES), in_parts(body(MAX_BODY_BYTES))):
        assert (await gateway.ask("POST", EPISODES, content=content, headers=headers)).status_code == 201
    for content in (body(MAX_BODY_BYTES + 1), in_parts(body(MAX_BODY_BYTES + 1))):
        problem(await gateway.ask("POST", EPISODES, content=content, headers=headers), 413, "payload_too_large")


async def test_too_many_bytes_of_bodies_at_once_are_503() -> None:
    gateway = Gateway(gateway_max_in_flight_bytes=10)
    for _ in range(2):
        response = await gateway.ask("POST", EPISODES, json={"name": "run-042"})
        problem(response, 503, "unavailable")
        assert response.headers["retry-after"] == "1"


async def test_a_body_where_none_is_expected_is_ignored(gateway: Gateway) -> None:
    for method, path, _ in WRITES[2:4]:
        response = await gateway.ask(method, path, content=b"{", headers={"Content-Type": "text/plain"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("not_found", 404),
        ("gone", 410),
        ("write_protected", 403),
        ("conflict", 409),
        ("payload_too_large", 413),
        ("idempotency_mismatch", 422),
        ("validation_error", 400),
    ],
)
async def test_a_refusal_is_a_problem(gateway: Gateway, code: str, status: int) -> None:
    gateway.dispatcher.outcome = lambda _: CommandRefused(code, "Because.")
    described = openapi.document()["paths"]
    for method, path, body in WRITES:
        template = next(each for each in described if len(each.split("/")) == len(path.split("/")))
        if str(status) not in described[template][method.lower()]["responses"]:
            continue
        response = await gateway.ask(method, path, json=body)
        assert problem(response, status, code)["detail"] == "Because."
        assert response.headers["x-event-id"] == "45"


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
async def test_what_can_happen_to_a_write(gateway: Gateway, method: str, path: str, body: Any) -> None:
    async def ask() -> Response:
        return await gateway.ask(method, path, json=body)

    gateway.dispatcher.error = Unavailable("Kafka does not answer")
    response = await ask()
    assert "command_id" not in problem(response, 503, "unavailable")
    assert response.headers["retry-after"] == "1"
    gateway.dispatcher.error = OutcomeUnknown(COMMAND_ID)
    response = await ask()
    assert problem(response, 503, "unavailable")["command_id"] == COMMAND_ID
    assert response.headers["retry-after"] == "1"
    gateway.dispatcher.error = NoReply(COMMAND_ID)
    assert problem(await ask(), 504, "timeout")["command_id"] == COMMAND_ID
    gateway.dispatcher.error = CommandTooLarge()
    problem(await ask(), 413, "payload_too_large")


async def test_a_bug_is_500_and_logged_once(gateway: Gateway) -> None:
    gateway.dispatcher.error = ZeroDivisionError("oops")
    with capture_logs() as logged:
        response = await gateway.ask("DELETE", EPISODE)
    body = problem(response, 500, "internal_error")
    assert "oops" not in body["detail"]
    assert [line["request_id"] for line in logged] == [body["request_id"]]


@pytest.mark.parametrize("path", READS)
async def test_what_is_not_found_by_a_read_says_how_far_the_read_model_is(gateway: Gateway, path: str) -> None:
    response = await gateway.ask("GET", path)
    problem(response, 404, "not_found")
    assert response.headers["x-event-id"] == "0"


@pytest.mark.parametrize("path", READS)
async def test_a_read_without_mongodb_is_503(gateway: Gateway, path: str) -> None:
    gateway.read_models.missing = "MongoDB does not answer"
    response = await gateway.ask("GET", path)
    problem(response, 503, "unavailable")
    assert response.headers["retry-after"] == "1"


async def test_a_deleted_episode_is_not_found(gateway: Gateway) -> None:
    gateway.model.project_episodes_.append(project_episode_document(deleted=True))
    problem(await gateway.ask("GET", EPISODE), 404, "not_found")


async def test_another_tenants_episode_is_not_found(gateway: Gateway) -> None:
    gateway.model.tenant_episodes.append(tenant_episode_document(tenant_id="other"))
    problem(await gateway.ask("GET", READS[2]), 404, "not_found")


# --- headers and queries


@pytest.mark.parametrize("given", ["k", '"k"', "!~" * 100, "a" * 255])
async def test_an_idempotency_key_is_passed_on_without_its_quotes(gateway: Gateway, given: str) -> None:
    await gateway.ask("DELETE", EPISODE, headers={"Idempotency-Key": given})
    assert gateway.command.idempotency_key == given.strip('"')
    assert gateway.command.request_hash


@pytest.mark.parametrize("given", ["", '""', "a b", "a" * 256, "ü"])
async def test_what_is_no_idempotency_key_is_400(gateway: Gateway, given: str) -> None:
    for method, path, body in WRITES:
        headers = {"Idempotency-Key": given.encode()}
        problem(await gateway.ask(method, path, json=body, headers=headers), 400, "validation_error")


async def test_requests_are_the_same_by_method_path_and_parsed_body(gateway: Gateway) -> None:
    async def ask(path: str, body: str) -> None:
        headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
        await gateway.ask("POST", path, content=body.encode(), headers=headers)

    await ask(EPISODES, '{"name": "x", "tags": ["a"]}')
    await ask(EPISODES.replace("robotics", "%72obotics") + "?wait=projected", '{"tags":["a"],"name":"\\u0078"}')
    await ask(EPISODES, '{"name":"x","tags":["b"]}')
    await ask(EPISODES.replace("robotics", "other"), '{"name":"x","tags":["a"]}')
    first, same, *others = [command.request_hash for command in gateway.dispatcher.commands]
    assert first == same
    assert first not in others


async def test_a_replayed_answer_says_so(gateway: Gateway) -> None:
    assert "idempotency-replayed" not in (await gateway.ask("DELETE", EPISODE)).headers
    gateway.dispatcher.replayed = True
    assert (await gateway.ask("DELETE", EPISODE)).headers["idempotency-replayed"] == "true"


async def test_a_write_can_wait_until_it_is_readable(gateway: Gateway) -> None:
    gateway.model.event_ids[namespace_stream("alice")] = 45
    response = await gateway.ask("DELETE", f"{EPISODE}?wait=projected")
    assert response.headers["x-projected"] == "true"
    gateway.read_models.missing = "away"
    response = await gateway.ask("DELETE", f"{EPISODE}?wait=projected")
    assert (response.status_code, response.headers["x-projected"]) == (200, "false")
    problem(await gateway.ask("DELETE", f"{EPISODE}?wait=long"), 400, "validation_error")


@pytest.mark.parametrize("path", READS)
async def test_a_read_can_say_how_fresh_it_must_be(gateway: Gateway, path: str) -> None:
    full(gateway)
    assert (await gateway.ask("GET", path, headers={"X-Min-Event-Id": "7"})).status_code == 200
    response = await gateway.ask("GET", path, headers={"X-Min-Event-Id": "43"})
    problem(response, 503, "unavailable")
    assert int(response.headers["x-event-id"]) < 43
    assert response.headers["retry-after"] == "1"
    response = await gateway.ask("GET", path, headers={"X-Min-Event-Id": "43", "Prefer": "respond-async, wait=0"})
    problem(response, 503, "unavailable")
    for wrong in ("", "x", "-1", "1.5", "9" * 30):
        problem(await gateway.ask("GET", path, headers={"X-Min-Event-Id": wrong}), 400, "validation_error")


async def test_a_stream_with_strange_characters_fits_into_a_header(gateway: Gateway) -> None:
    authorization = f"Bearer {token('日 %')}"
    path = "/namespaces/%E6%97%A5%20%25/projects/p/episodes/x"
    response = await gateway.ask("DELETE", path, authorization=authorization)
    assert response.headers["x-stream"] == "namespace:%E6%97%A5%20%25"


async def test_a_sane_request_id_comes_back(gateway: Gateway) -> None:
    assert (await gateway.ask("GET", "/healthz", headers={"X-Request-Id": "r-1"})).headers["x-request-id"] == "r-1"
    for insane in ("a b", "a" * 129, "<script>"):
        response = await gateway.ask("GET", "/healthz", headers={"X-Request-Id": insane})
        assert response.headers["x-request-id"] != insane


async def test_a_trace_context_is_passed_on_if_it_is_one(gateway: Gateway) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await gateway.ask("DELETE", EPISODE, headers={"traceparent": trace})
    await gateway.ask("DELETE", EPISODE, headers={"traceparent": "x"})
    assert gateway.dispatcher.traceparents == [trace, None]


async def test_the_tenant_of_a_read_is_required(gateway: Gateway) -> None:
    full(gateway)
    for path in (f"/v1/episodes/ep_{ID}", f"/v1/episodes/ep_{ID}?tenant_id=", f"/v1/episodes/ep_{ID}?tenant_id=%20"):
        problem(await gateway.ask("GET", path), 400, "validation_error")
    response = await gateway.ask("GET", f"/v1/episodes/ep_{ID}", headers={"X-Tenant-Id": "my-app"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", [*READS, "/healthz", "/readyz", "/openapi.json", "/docs"])
async def test_head_works_where_get_does(gateway: Gateway, path: str) -> None:
    full(gateway)
    got = await gateway.ask("GET", path)
    head = await gateway.ask("HEAD", path)
    assert got.status_code == head.status_code == 200
    assert got.headers["content-length"] == head.headers["content-length"]


# --- reads that follow writes


async def test_a_read_waits_for_what_this_gateway_acknowledged(gateway: Gateway) -> None:
    full(gateway)
    gateway.dispatcher.event_id = 8
    await gateway.ask("DELETE", EPISODE)
    arrives_at = gateway.model.polls + 3
    poll = gateway.model.event_id

    async def event_id(stream: StreamId) -> EventId:
        if gateway.model.polls + 1 == arrives_at:
            gateway.model.event_ids[stream] = 8
        return await poll(stream)

    gateway.model.event_id = event_id  # type: ignore[method-assign]
    response = await gateway.ask("GET", EPISODE)
    assert response.headers["x-event-id"] == "8"
    assert gateway.model.polls == arrives_at


# --- operations


async def test_readiness_says_what_is_missing(gateway: Gateway) -> None:
    assert (await gateway.ask("GET", "/readyz", authorization=None)).json() == {"ready": True, "waiting_for": {}}
    gateway.dispatcher.missing = "Kafka does not answer"
    response = await gateway.ask("GET", "/readyz")
    assert problem(response, 503, "unavailable")["waiting_for"] == {"kafka": "Kafka does not answer"}
    assert (await gateway.ask("GET", "/readyz?for=writes")).status_code == 503
    assert (await gateway.ask("GET", "/readyz?for=reads")).status_code == 200
    gateway.read_models.missing = "away"
    assert (await gateway.ask("GET", "/readyz?for=reads")).status_code == 503
    problem(await gateway.ask("GET", "/readyz?for=x"), 400, "validation_error")
    assert (await gateway.ask("GET", "/healthz")).status_code == 200


async def test_who_stops_is_not_ready_and_says_good_bye(gateway: Gateway) -> None:
    assert "connection" not in (await gateway.ask("GET", "/healthz")).headers
    gateway.lifecycle.stopping = True
    for query in ("", "?for=reads", "?for=writes"):
        response = await gateway.ask("GET", f"/readyz{query}")
        assert problem(response, 503, "unavailable")["waiting_for"] == {"gateway": "stopping"}
        assert response.headers["connection"] == "close"


async def test_without_authentication_everything_is_open() -> None:
    gateway = Gateway(auth_disabled=True)
    await gateway.ask("DELETE", EPISODE, authorization=None)
    assert gateway.command.owner
    assert gateway.command.actor == "anonymous"
    batch = {"tenant_id": "any", "episodes": [{"content": "x"}]}
    assert (await gateway.ask("POST", "/v1/episodes", json=batch, authorization=None)).status_code == 201


# --- the document


async def test_the_document_is_served_and_sound(gateway: Gateway) -> None:
    document = (await gateway.ask("GET", "/openapi.json", authorization=None)).json()
    assert document == json.loads(json.dumps(openapi.document()))
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    for kind, parts in document["components"].items():
        for name in parts:
            if kind != "securitySchemes" and (kind, name) not in {("responses", "405"), ("schemas", "RecordedItem")}:
                assert f'"#/components/{kind}/{name}"' in text


async def test_the_document_knows_every_route_and_no_others() -> None:
    gateway = Gateway()
    for template, item in openapi.document()["paths"].items():
        path = template.replace("{slug}", "alice").replace("{", "").replace("}", "")
        methods = {method.upper() for method in item if method != "parameters"}
        allowed = (await gateway.ask("TRACE", path)).headers["allow"]
        assert {*allowed.split(", ")} - {"HEAD"} == methods


async def test_what_is_refused_leaves_nothing_behind(gateway: Gateway) -> None:
    gc.collect()
    before = problems()
    gc.disable()  # nobody clears cycles away
    try:
        problem(await gateway.ask("POST", EPISODES, json={"name": 1}), 400, "validation_error")
        assert problems() == before
    finally:
        gc.enable()


def problems() -> list[int]:
    """Which errors of ours there are."""
    return [id(one) for one in gc.get_objects() if type(one) is Problem]  # isinstance asks what a weak proxy stands for
