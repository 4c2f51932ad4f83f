"""What callers see while a part of the service is down, and that all is well by itself when it is back."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http import HTTPStatus

import httpx
import pytest

from tests.cluster import Cluster, throw_away_cluster
from tests.e2e.client import (
    Http,
    Project,
    Tenant,
    a_project,
    a_tenant,
    assert_problem,
    body_of,
    described,
    event_id_of,
    open_http,
    unique,
)
from tests.e2e.ledger import load_log
from tests.e2e.load import applied, assert_accounts_agree, eventually, left_running, recorded, running_load, upserted

SETTINGS = {"GATEWAY_REPLY_TIMEOUT": "2", "GATEWAY_MIN_EVENT_WAIT": "0.5"}
SANE_SECONDS = 10
"""No caller waits longer for a no. A limit of sanity, not a measurement."""


@pytest.fixture(scope="module")
def breakable() -> Iterator[Cluster]:
    with throw_away_cluster(settings=SETTINGS) as running:
        yield running


@pytest.fixture(autouse=True)
def all_run(request: pytest.FixtureRequest, breakable: Cluster) -> Iterator[None]:
    with left_running(request, breakable):
        yield


@pytest.fixture(scope="module")
async def http(breakable: Cluster) -> AsyncIterator[Http]:
    async with open_http(breakable.url) as http:
        await http.document()
        yield http


@pytest.fixture
def project(breakable: Cluster, http: Http) -> Project:
    return a_project(http, breakable)


@pytest.fixture
def tenant(breakable: Cluster, http: Http) -> Tenant:
    return a_tenant(http, breakable)


# ---- MongoDB ---------------------------------------------------------------------------------------------------------


async def test_without_mongodb_writes_go_on_and_reads_catch_up(
    breakable: Cluster, project: Project, tenant: Tenant
) -> None:
    mongodb = breakable.servers.mongodb
    await project.given("before")
    first = (await tenant.given({"content": "Before."}))["episode_ids"][0]
    await project.seen("before")
    await tenant.seen(first)
    acknowledged = []
    await asyncio.to_thread(mongodb.stop)
    try:
        for number in range(5):
            key, name, content = unique("key"), f"meanwhile-{number}", f"Meanwhile {number}."
            response = await project.upsert(name, headers={"Idempotency-Key": key})
            assert response.status_code == HTTPStatus.CREATED, described(response)
            acknowledged.append(upserted(project, key, response))
            response = await tenant.record({"content": content}, headers={"Idempotency-Key": key})
            assert response.status_code == HTTPStatus.CREATED, described(response)
            acknowledged.append(recorded(tenant, key, [content], response))
        for read in (project.list, functools.partial(project.get, "before"), functools.partial(tenant.get, first)):
            assert_unavailable(await within_sane_time(read()))
    finally:
        mongodb.start()
    await eventually(lambda: is_readable(project), what="reads work again")
    assert await project.names() == ["before", *(f"meanwhile-{number}" for number in range(5))]
    assert (await tenant.seen(acknowledged[-1].facts[0].id))["content"] == "Meanwhile 4."
    await assert_accounts_agree(breakable, acknowledged)


# ---- Kafka -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_without_kafka_reads_go_on_and_writes_resume_by_themselves(
    breakable: Cluster, project: Project, tenant: Tenant, way: str
) -> None:
    kafka = breakable.servers.kafka
    await project.given("before")
    first = (await tenant.given({"content": "Before."}))["episode_ids"][0]
    await project.seen("before")
    await tenant.seen(first)
    async with running_load(breakable) as load:
        await asyncio.to_thread(getattr(kafka, way))
        try:
            for write in (
                functools.partial(project.upsert, "meanwhile"),
                functools.partial(tenant.record, {"content": "Meanwhile."}),
            ):
                refusal = await eventually(
                    functools.partial(refused, write), within=SANE_SECONDS, what="writes are refused with 503"
                )
                assert_unavailable(refusal)
            await project.seen("before")
            await tenant.seen(first)
        finally:
            await asyncio.to_thread(kafka.start)
        await load.progress(5, within=60)
        await load.visible()
    await assert_accounts_agree(breakable, load.acknowledged)


# ---- our processes ---------------------------------------------------------------------------------------------------


async def test_without_an_ingestor_a_write_is_504_and_happens_once_when_it_is_back(
    breakable: Cluster, project: Project, tenant: Tenant
) -> None:
    ingestor = breakable.processes["ingestor"]
    key = unique("key")
    headers = {"Idempotency-Key": key}
    await asyncio.to_thread(ingestor.stop)
    try:
        unknown = await asyncio.gather(
            project.upsert("run-042", headers=headers),
            tenant.record({"content": "First."}, headers=headers),
            tenant.record({"content": "Without a key."}),
        )
    finally:
        ingestor.start()
    for response in unknown:
        assert_problem(response, HTTPStatus.GATEWAY_TIMEOUT, "timeout")
    await asyncio.to_thread(ingestor.wait_ready)
    log, _ = await applied(breakable)
    ours = [command for command in log.commands if command.events[0].stream in {project.stream, tenant.stream}]
    assert sorted(command.events[0].command_id for command in ours) == sorted(
        response.json()["command_id"] for response in unknown
    ), "every command that was told happens once"

    retry = await project.upsert("run-042", headers=headers)
    assert (retry.status_code, retry.headers["idempotency-replayed"]) == (HTTPStatus.CREATED, "true")
    again = await tenant.record({"content": "First."}, headers=headers)
    assert (again.status_code, again.headers["idempotency-replayed"]) == (HTTPStatus.CREATED, "true")
    await assert_accounts_agree(breakable, [upserted(project, key, retry), recorded(tenant, key, ["First."], again)])
    assert len((await load_log(breakable.servers.kafka_bootstrap)).commands) == len(log.commands)


async def test_without_a_projector_reads_are_stale_and_say_so(
    breakable: Cluster, project: Project, tenant: Tenant
) -> None:
    projector = breakable.processes["projector"]
    await project.given("before")
    first = (await tenant.given({"content": "Before."}))["episode_ids"][0]
    seen = event_id_of(await project.get("before"))
    assert event_id_of(await tenant.get(first)) == 1
    assert await asyncio.to_thread(projector.stop) == 0
    try:
        written = event_id_of(await project.upsert("meanwhile"))
        second = (await tenant.given({"content": "Meanwhile."}))["episode_ids"][0]

        stale = await project.list(headers={})
        assert [episode["name"] for episode in body_of(stale, HTTPStatus.OK)["episodes"]] == ["before"]
        assert event_id_of(stale) == seen
        stale = await tenant.get(first, headers={})
        assert (stale.status_code, event_id_of(stale)) == (HTTPStatus.OK, 1)

        assert_unavailable(await project.list(headers={"X-Min-Event-Id": str(written)}))
        assert_unavailable(await tenant.get(second, headers={"X-Min-Event-Id": "2"}))
        up_to_here = await project.list(headers={"X-Min-Event-Id": str(seen)})
        assert up_to_here.status_code == HTTPStatus.OK
    finally:
        projector.start()
    await asyncio.to_thread(projector.wait_ready)
    assert await project.names() == ["before", "meanwhile"]
    assert (await tenant.seen(second))["content"] == "Meanwhile."
    await assert_accounts_agree(breakable, [])


# ---- words of these tests --------------------------------------------------------------------------------------------


def assert_unavailable(response: httpx.Response) -> None:
    assert_problem(response, HTTPStatus.SERVICE_UNAVAILABLE, "unavailable")
    assert int(response.headers["retry-after"]) > 0, described(response)


async def within_sane_time(answer: Awaitable[httpx.Response]) -> httpx.Response:
    async with asyncio.timeout(SANE_SECONDS):
        return await answer


async def refused(write: Callable[[], Awaitable[httpx.Response]]) -> httpx.Response | None:
    """Return the refusal of a write, if it is one. What was on its way to Kafka when it stopped may be unknown: 504."""
    response = await within_sane_time(write())
    if response.status_code == HTTPStatus.GATEWAY_TIMEOUT or "command_id" in response.json():
        return None
    return response


async def is_readable(project: Project) -> bool:
    return (await project.list()).status_code == HTTPStatus.OK
