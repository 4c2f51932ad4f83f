"""The Idempotency-Key: a retry gets the first answer, has no second effect, and is scoped to its stream."""

import asyncio
import json
from http import HTTPStatus

import httpx
import pytest

from tests.e2e.client import (
    Call,
    Cluster,
    Http,
    Project,
    Tenant,
    a_project,
    a_tenant,
    assert_problem,
    body_of,
    event_id_of,
    unique,
)

pytest_plugins = ["tests.e2e.contract_fixtures"]


def key(value: str | None = None) -> dict[str, str]:
    return {"Idempotency-Key": value if value is not None else unique("key")}


def is_replay(response: httpx.Response) -> bool:
    return bool(response.headers.get("idempotency-replayed") == "true")


def assert_replayed(again: httpx.Response, first: httpx.Response) -> None:
    assert is_replay(again), f"not a replay: {again.status_code} {again.text}"
    assert again.status_code == first.status_code
    assert again.json() == first.json()
    assert again.headers["x-event-id"] == first.headers["x-event-id"]


# ---- retries ---------------------------------------------------------------------------------------------------------


async def test_a_retry_gets_the_first_answer(write: Call) -> None:
    headers = key()
    first = await write.send(headers=headers)
    assert first.is_success, first.text
    assert not is_replay(first)
    for _ in range(2):
        assert_replayed(await write.send(headers=headers), first)


async def test_a_retry_has_no_second_effect(project: Project, tenant: Tenant) -> None:
    headers = key()
    first = await project.upsert("run-042", headers=headers, tags=["a"])
    before = await project.seen("run-042")
    assert_replayed(await project.upsert("run-042", headers=headers, tags=["a"]), first)
    assert await project.seen("run-042") == before
    assert event_id_of(await project.upsert("run-043")) == event_id_of(first) + 1

    first = await tenant.record({"content": "One."}, {"content": "Two."}, headers=headers)
    assert_replayed(await tenant.record({"content": "One."}, {"content": "Two."}, headers=headers), first)
    assert (await tenant.given({"content": "Three."}))["event_ids"] == [3]


async def test_another_key_is_another_request(project: Project, tenant: Tenant) -> None:
    body_of(await project.upsert("run-042", headers=key()), HTTPStatus.CREATED)
    again = await project.upsert("run-042", headers=key())
    body_of(again, HTTPStatus.OK)
    assert not is_replay(again)
    for number in (1, 2):
        answer = body_of(await tenant.record({"content": "A word."}, headers=key()), HTTPStatus.CREATED)
        assert answer["event_ids"] == [number]


async def test_a_retry_of_a_creation_is_201_again(project: Project) -> None:
    headers = key()
    first = await project.upsert("run-042", headers=headers)
    body_of(first, HTTPStatus.CREATED)
    await project.patch("run-042", description="Meanwhile", status="completed", name="run-043")
    assert_replayed(await project.upsert("run-042", headers=headers), first)
    await project.delete("run-043")
    assert_replayed(await project.upsert("run-042", headers=headers), first)
    assert await project.names() == []


async def test_a_retry_of_a_deletion_is_200_again(project: Project) -> None:
    await project.given("run-042")
    headers = key()
    first = await project.delete("run-042", headers=headers)
    body_of(first, HTTPStatus.OK)
    assert_replayed(await project.delete("run-042", headers=headers), first)
    assert_problem(await project.delete("run-042"), HTTPStatus.NOT_FOUND, "not_found")
    await project.restore("run-042")
    assert_replayed(await project.delete("run-042", headers=headers), first)
    assert await project.names() == ["run-042"]


async def test_a_retry_of_a_rename_is_200_again(project: Project) -> None:
    await project.given("old")
    headers = key()
    first = await project.patch("old", name="new", headers=headers)
    body_of(first, HTTPStatus.OK)
    assert_replayed(await project.patch("old", name="new", headers=headers), first)
    assert_problem(await project.patch("old", name="new"), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_retry_of_a_protection_is_200_again(project: Project) -> None:
    await project.given("run-042")
    headers = key()
    first = await project.patch("run-042", writeProtected=True, headers=headers)
    body_of(first, HTTPStatus.OK)
    assert_replayed(await project.patch("run-042", writeProtected=True, headers=headers), first)
    assert_problem(await project.patch("run-042", writeProtected=True), HTTPStatus.FORBIDDEN, "write_protected")


async def test_a_retry_of_a_restore_is_200_again(project: Project) -> None:
    await project.given("run-042")
    await project.delete("run-042")
    headers = key()
    first = await project.restore("run-042", headers=headers)
    body_of(first, HTTPStatus.OK)
    await project.delete("run-042")
    assert_replayed(await project.restore("run-042", headers=headers), first)
    assert await project.names() == []


async def test_a_retry_of_a_batch_with_errors_has_them_again(tenant: Tenant) -> None:
    headers = key()
    items = [{"content": "One."}, {}, {"content": "Two.", "idempotency_key": "k"}]
    first = await tenant.record(*items, headers=headers)
    answer = body_of(first, HTTPStatus.CREATED)
    assert answer["event_ids"] == [1, 2]
    assert len(answer["errors"]) == 1
    assert_replayed(await tenant.record(*items, headers=headers), first)
    assert (await tenant.given({"content": "Three."}))["event_ids"] == [3]


async def test_a_retry_of_a_batch_of_1000_is_answered_in_full(tenant: Tenant) -> None:
    headers = key()
    items = [{"content": f"Word {number}."} for number in range(1000)]
    first = await tenant.record(*items, headers=headers)
    assert body_of(first, HTTPStatus.CREATED)["count"] == 1000
    assert_replayed(await tenant.record(*items, headers=headers), first)


# ---- the same request ------------------------------------------------------------------------------------------------


async def test_the_same_body_written_otherwise_is_the_same_request(write_with_body: Call) -> None:
    headers = key()
    first = await write_with_body.send(headers=headers)
    assert first.is_success, first.text
    turned = dict(reversed(write_with_body.body.items()))
    for text in (json.dumps(write_with_body.body, indent=4), json.dumps(turned, separators=(",", ":"))):
        again = await write_with_body.send(
            content=text.encode(), headers={**headers, "Content-Type": "application/json; charset=utf-8"}
        )
        assert_replayed(again, first)


async def test_the_same_key_with_another_body_is_422(project: Project, tenant: Tenant) -> None:
    headers = key()
    first = await project.upsert("run-042", headers=headers, tags=["a"])
    for response in (
        await project.upsert("run-042", headers=headers, tags=["b"]),
        await project.upsert("run-042", headers=headers),
        await project.upsert("run-043", headers=headers, tags=["a"]),
    ):
        assert_problem(response, HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_mismatch")
    assert_replayed(await project.upsert("run-042", headers=headers, tags=["a"]), first)
    assert await project.names() == ["run-042"]
    assert (await project.seen("run-042"))["tags"] == ["a"]

    first = await tenant.record({"content": "One."}, headers=headers)
    response = await tenant.record({"content": "Two."}, headers=headers)
    assert_problem(response, HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_mismatch")
    assert_replayed(await tenant.record({"content": "One."}, headers=headers), first)


async def test_the_same_key_with_another_method_or_path_is_422(project: Project) -> None:
    await project.given("one")
    await project.given("two")
    headers = key()
    body_of(await project.patch("one", tags=["a"], headers=headers), HTTPStatus.OK)
    for response in (
        await project.patch("two", tags=["a"], headers=headers),
        await project.delete("one", headers=headers),
        await project.beside(slug="kitchen").upsert("one", headers=headers),
    ):
        assert_problem(response, HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_mismatch")
    assert await project.names() == ["one", "two"]
    assert (await project.seen("two"))["tags"] == []


# ---- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["k", "x" * 255, "!#$%&'()*+,-./:;<=>?@[]^_`{|}~", "8e03978e-40d5-43e8-bc93-6894a57f9324"]
)
async def test_a_key_may_be_any_visible_characters(project: Project, value: str) -> None:
    first = await project.upsert("run-042", headers=key(value))
    body_of(first, HTTPStatus.CREATED)
    assert_replayed(await project.upsert("run-042", headers=key(value)), first)


@pytest.mark.parametrize("value", ["k", "x" * 255, "8e03978e-40d5-43e8-bc93-6894a57f9324"])
async def test_a_key_may_stand_in_quotes(project: Project, value: str) -> None:
    first = await project.upsert("run-042", headers=key(f'"{value}"'))
    body_of(first, HTTPStatus.CREATED)
    assert_replayed(await project.upsert("run-042", headers=key(f'"{value}"')), first)
    assert_replayed(await project.upsert("run-042", headers=key(value)), first)


@pytest.mark.parametrize(
    "value", ["", '""', "two words", "x" * 256, f'"{"x" * 256}"'], ids=lambda value: repr(value)[:20]
)
async def test_a_key_that_is_none_is_400_and_nothing_happens(write: Call, value: str) -> None:
    assert_problem(await write.send(headers=key(value)), HTTPStatus.BAD_REQUEST, "validation_error")
    assert (await write.send()).is_success


async def test_keys_are_case_sensitive(project: Project) -> None:
    value = unique("key")
    body_of(await project.upsert("run-042", headers=key(value)), HTTPStatus.CREATED)
    body_of(await project.upsert("run-043", headers=key(value.upper())), HTTPStatus.CREATED)


async def test_keys_belong_to_their_stream(http: Http, cluster: Cluster) -> None:
    headers = key()
    for _ in range(2):
        place = a_project(http, cluster)
        body_of(await place.upsert("run-042", headers=headers), HTTPStatus.CREATED)
        tenant = a_tenant(http, cluster)
        answer = body_of(await tenant.record({"content": "A word."}, headers=headers), HTTPStatus.CREATED)
        assert answer["event_ids"] == [1]


# ---- at the same time ------------------------------------------------------------------------------------------------


async def test_20_retries_at_the_same_time_have_one_effect(http: Http, cluster: Cluster) -> None:
    project = a_project(http, cluster)
    before = event_id_of(await project.upsert("run-041"))
    headers = key()
    responses = await asyncio.gather(*(project.upsert("run-042", headers=headers, tags=["a"]) for _ in range(20)))
    (first,) = [response for response in responses if not is_replay(response)]
    body_of(first, HTTPStatus.CREATED)
    for response in responses:
        assert response is first or is_replay(response)
        assert (response.status_code, response.json()) == (first.status_code, first.json())
        assert event_id_of(response) == before + 1
    assert event_id_of(await project.upsert("run-043")) == before + 2
    assert await project.names() == ["run-041", "run-042", "run-043"]


async def test_20_retries_of_a_batch_at_the_same_time_have_one_effect(tenant: Tenant) -> None:
    headers = key()
    items = [{"content": f"Word {number}."} for number in range(5)]
    responses = await asyncio.gather(*(tenant.record(*items, headers=headers) for _ in range(20)))
    answers = [body_of(response, HTTPStatus.CREATED) for response in responses]
    assert answers[0]["event_ids"] == [1, 2, 3, 4, 5]
    assert all(answer == answers[0] for answer in answers)
    assert sum(not is_replay(response) for response in responses) == 1
    assert (await tenant.given({"content": "The next."}))["event_ids"] == [6]


async def test_different_requests_under_one_key_at_the_same_time_have_one_effect(project: Project) -> None:
    await project.given("run")
    headers = key()
    responses = await asyncio.gather(*(project.upsert(f"run-{number}", headers=headers) for number in range(10)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [HTTPStatus.CREATED] + [HTTPStatus.UNPROCESSABLE_ENTITY] * 9
    assert len(await project.names()) == 2


# ---- refused requests ------------------------------------------------------------------------------------------------


async def test_the_retry_of_a_refused_request_is_judged_afresh(project: Project) -> None:
    await project.given("run-042")
    await project.delete("run-042")
    headers = key()
    for _ in range(2):
        response = await project.upsert("run-042", headers=headers)
        assert_problem(response, HTTPStatus.GONE, "gone")
        assert not is_replay(response)
    await project.restore("run-042")
    response = await project.upsert("run-042", headers=headers)
    body_of(response, HTTPStatus.OK)
    assert not is_replay(response)
    assert_replayed(await project.upsert("run-042", headers=headers), response)


async def test_a_refused_request_leaves_its_key_free(project: Project, tenant: Tenant) -> None:
    await project.given("locked", writeProtected=True)
    headers = key()
    assert_problem(await project.post({}, headers=headers), HTTPStatus.BAD_REQUEST)
    assert_problem(await project.patch("ghost", tags=[], headers=headers), HTTPStatus.NOT_FOUND)
    assert_problem(await project.upsert("locked", headers=headers), HTTPStatus.FORBIDDEN)
    body_of(await project.upsert("run-042", headers=headers), HTTPStatus.CREATED)

    assert_problem(await tenant.record(headers=headers), HTTPStatus.BAD_REQUEST)
    answer = body_of(await tenant.record({"content": "A word."}, headers=headers), HTTPStatus.CREATED)
    assert answer["event_ids"] == [1]


async def test_a_mismatch_does_not_move_the_key(project: Project) -> None:
    headers = key()
    first = await project.upsert("run-042", headers=headers)
    for _ in range(2):
        response = await project.upsert("run-043", headers=headers)
        assert_problem(response, HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_mismatch")
    assert_replayed(await project.upsert("run-042", headers=headers), first)


async def test_a_key_is_no_way_round_auth(project: Project, cluster: Cluster) -> None:
    headers = key()
    body_of(await project.upsert("run-042", headers=headers), HTTPStatus.CREATED)
    stranger = project.beside(token=cluster.token(unique("stranger")))
    assert_problem(await stranger.upsert("run-042", headers=headers), HTTPStatus.FORBIDDEN, "forbidden")
    nobody = project.beside(token="nonsense")
    assert_problem(await nobody.upsert("run-042", headers=headers), HTTPStatus.UNAUTHORIZED)
