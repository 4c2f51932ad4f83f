"""What a reader is told: how far the read model is, and the wait for what was written."""

import time
from http import HTTPStatus

import pytest

from tests.e2e.client import (
    NO_BODY,
    Call,
    Http,
    Project,
    Tenant,
    assert_problem,
    body_of,
    event_id_of,
)

pytest_plugins = ["tests.e2e.contract_fixtures"]

NO_HEADERS: dict[str, str] = {}


async def test_a_write_says_its_last_event_and_its_stream(project: Project, tenant: Tenant) -> None:
    created = await project.upsert("run-042", folder="/a/b")
    assert created.headers["x-stream"] == f"namespace:{project.namespace}"
    assert event_id_of(created) == 5
    last = 5
    for response in (
        await project.upsert("run-042"),
        await project.patch("run-042", tags=["a"]),
        await project.delete("run-042"),
        await project.restore("run-042"),
    ):
        last += 1
        body_of(response, HTTPStatus.OK)
        assert response.headers["x-stream"] == f"namespace:{project.namespace}"
        assert event_id_of(response) == last

    recorded = await tenant.record({"content": "One."}, {}, {"content": "Two."})
    assert recorded.headers["x-stream"] == f"tenant:{tenant.tenant_id}"
    assert event_id_of(recorded) == body_of(recorded, HTTPStatus.CREATED)["event_ids"][-1] == 2


async def test_a_read_says_how_far_it_is(project: Project, tenant: Tenant) -> None:
    written = event_id_of(await project.upsert("run-042"))
    for response in (await project.list(), await project.get("run-042")):
        assert event_id_of(response) == written
    written = event_id_of(await project.upsert("run-043"))
    assert event_id_of(await project.get("run-042")) == written

    response = await tenant.record({"content": "One."}, {"content": "Two."})
    (episode_id, _) = body_of(response, HTTPStatus.CREATED)["episode_ids"]
    assert event_id_of(await tenant.get(episode_id)) == 2


async def test_a_gateway_shows_its_own_writes_without_being_asked(project: Project, tenant: Tenant) -> None:
    for number in range(20):
        body_of(await project.upsert("run-042", description=str(number)), 200 if number else 201)
        seen = body_of(await project.get("run-042", headers=NO_HEADERS), HTTPStatus.OK)
        assert seen["description"] == str(number)
        body_of(await project.upsert(f"run-{number}"), HTTPStatus.CREATED)
        listed = body_of(await project.list(headers=NO_HEADERS), HTTPStatus.OK)
        assert listed["total"] == number + 2
        answer = body_of(await tenant.record({"content": f"Word {number}."}), HTTPStatus.CREATED)
        seen = body_of(await tenant.get(answer["episode_ids"][0], headers=NO_HEADERS), HTTPStatus.OK)
        assert seen["content"] == f"Word {number}."


async def test_a_gateway_shows_its_own_deletions_and_renames(project: Project) -> None:
    await project.given("one")
    await project.given("two")
    await project.delete("one")
    assert_problem(await project.get("one", headers=NO_HEADERS), HTTPStatus.NOT_FOUND, "not_found")
    await project.patch("two", name="three")
    assert_problem(await project.get("two", headers=NO_HEADERS), HTTPStatus.NOT_FOUND, "not_found")
    body_of(await project.get("three", headers=NO_HEADERS), HTTPStatus.OK)


async def test_a_read_waits_for_the_event_it_asks_for(project: Project, tenant: Tenant) -> None:
    for number in range(10):
        written = event_id_of(await project.upsert("run-042", description=str(number)))
        for response in (
            await project.get("run-042", headers={"X-Min-Event-Id": str(written)}),
            await project.list(headers={"X-Min-Event-Id": str(written)}),
        ):
            body_of(response, HTTPStatus.OK)
            assert event_id_of(response) >= written
            assert str(number) in response.text
        answer = body_of(await tenant.record({"content": "A word."}), HTTPStatus.CREATED)
        headers = {"X-Min-Event-Id": str(answer["event_ids"][0])}
        body_of(await tenant.get(answer["episode_ids"][0], headers=headers), HTTPStatus.OK)


async def test_a_read_that_asks_for_too_much_is_503_after_its_wait(read: Call) -> None:
    for headers, at_least in (
        ({"Prefer": "wait=1"}, 0.9),
        ({"Prefer": "wait=0"}, 0.0),
        ({}, 1.8),
    ):
        started = time.monotonic()
        response = await read.send(headers={"X-Min-Event-Id": "1000000", **headers})
        took = time.monotonic() - started
        assert_problem(response, HTTPStatus.SERVICE_UNAVAILABLE, "unavailable")
        assert int(response.headers["retry-after"]) >= 1
        assert at_least <= took < at_least + 5


async def test_a_read_that_asks_for_less_does_not_wait(read: Call) -> None:
    started = time.monotonic()
    for least in ("0", "1"):
        body_of(await read.send(headers={"X-Min-Event-Id": least, "Prefer": "wait=30"}), HTTPStatus.OK)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("value", ["x", "1.5", "one"])
async def test_an_event_id_that_is_none_is_400(read: Call, value: str) -> None:
    response = await read.send(headers={"X-Min-Event-Id": value})
    assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")


async def test_the_wait_does_not_hide_who_may_read(http: Http, project: Project) -> None:
    await project.given("run-042")
    stranger = project.beside(token="nonsense")
    response = await stranger.list(headers={"X-Min-Event-Id": "1000000"})
    assert_problem(response, HTTPStatus.UNAUTHORIZED)


async def test_a_write_can_wait_until_it_can_be_read(write: Call, project: Project, tenant: Tenant) -> None:
    response = await write.send(target=f"{write.target}?wait=projected")
    assert response.is_success, response.text
    written = event_id_of(response)
    # Nothing to wait for is left, and a wait of no time is enough.
    headers = {"X-Min-Event-Id": str(written), "Prefer": "wait=0"}
    if write.target == tenant.target:
        (episode_id,) = response.json()["episode_ids"]
        read = await tenant.get(episode_id, headers=headers)
    else:
        read = await project.list(headers=headers)
    body_of(read, HTTPStatus.OK)
    assert event_id_of(read) >= written


async def test_a_write_that_waits_answers_as_any_other(project: Project, tenant: Tenant) -> None:
    waited = body_of(await project.upsert("run-042", query="?wait=projected"), HTTPStatus.CREATED)
    assert body_of(await project.upsert("run-042", query="?wait=projected"), HTTPStatus.OK) == waited
    response = await tenant.record({"content": "A word."}, query="?wait=projected")
    assert body_of(response, HTTPStatus.CREATED)["event_ids"] == [1]
    assert_problem(await project.post({}, query="?wait=projected"), HTTPStatus.BAD_REQUEST, "validation_error")
    await project.delete("run-042")
    assert_problem(await project.upsert("run-042", query="?wait=projected"), HTTPStatus.GONE, "gone")


async def test_a_read_without_body_is_the_same_with_every_wait(read: Call) -> None:
    assert read.body is NO_BODY
    plain = await read.send()
    waiting = await read.send(headers={"X-Min-Event-Id": str(event_id_of(plain))})
    assert waiting.json() == plain.json()
