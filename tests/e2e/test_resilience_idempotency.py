"""One Idempotency-Key is one effect: whatever dies meanwhile, the retry gets the receipt of the first attempt."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from tests.cluster import Cluster, throw_away_cluster
from tests.e2e.client import Http, a_project, a_tenant, event_id_of, open_http, unique
from tests.e2e.ledger import COMMANDS, Acknowledged, load_log, read_topic
from tests.e2e.load import assert_accounts_agree, eventually, left_running, recorded, upserted


@dataclass(frozen=True)
class Retried:
    """One write under one key, to be sent as often as one likes."""

    stream: str
    key: str
    send: Callable[[], Awaitable[httpx.Response]]
    entry: Callable[[httpx.Response], Acknowledged]


@pytest.fixture(scope="module")
def breakable() -> Iterator[Cluster]:
    with throw_away_cluster() as running:
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
def writes(breakable: Cluster, http: Http) -> list[Retried]:
    """Return a write to each API."""
    project, tenant, key = a_project(http, breakable), a_tenant(http, breakable), unique("key")
    headers, contents = {"Idempotency-Key": key}, ["First.", "Second."]
    return [
        Retried(
            project.stream,
            key,
            lambda: project.upsert("run-042", folder="/experiments/batch-1", headers=headers),
            lambda response: upserted(project, key, response),
        ),
        Retried(
            tenant.stream,
            key,
            lambda: tenant.record(*({"content": content} for content in contents), {}, headers=headers),
            lambda response: recorded(tenant, key, contents, response),
        ),
    ]


async def test_20_concurrent_retries_are_one_effect(breakable: Cluster, writes: list[Retried]) -> None:
    for write in writes:
        responses = await asyncio.gather(*(write.send() for _ in range(20)))
        assert {response.status_code for response in responses} == {HTTPStatus.CREATED}
        assert len({response.text for response in responses}) == 1
        assert len({event_id_of(response) for response in responses}) == 1
        assert [is_replay(response) for response in responses].count(False) == 1
        await assert_one_effect(breakable, write, responses[0])


async def test_a_gateway_killed_mid_request_leaves_one_effect(breakable: Cluster, writes: list[Retried]) -> None:
    await kill_gateway_mid_request(breakable, writes)
    breakable.processes["ingestor"].resume()
    for write in writes:
        await assert_retry_gets_the_first_receipt(breakable, write)


async def test_gateway_and_ingestor_killed_mid_request_leave_one_effect(
    breakable: Cluster, writes: list[Retried]
) -> None:
    await kill_gateway_mid_request(breakable, writes)
    breakable.processes["ingestor"].kill()
    breakable.processes["ingestor"].start()
    for write in writes:
        await assert_retry_gets_the_first_receipt(breakable, write)


async def test_a_cold_start_knows_the_keys_and_the_answers_from_the_log(
    breakable: Cluster, writes: list[Retried]
) -> None:
    # One answer that a caller had, and one that nobody had: its gateway was dead.
    had, missed = writes
    first = await had.send()
    assert first.status_code == HTTPStatus.CREATED, first.text
    await kill_gateway_mid_request(breakable, [missed])
    breakable.processes["ingestor"].resume()
    await eventually(lambda: effects(breakable, missed), what="the command without a gateway has happened")
    breakable.processes["ingestor"].stop()
    delete_ingestor_state(breakable)
    breakable.processes["ingestor"].start()

    again = await had.send()
    assert is_replay(again)
    assert (again.status_code, again.text) == (first.status_code, first.text)
    assert event_id_of(again) == event_id_of(first)
    await assert_one_effect(breakable, had, first)
    await assert_retry_gets_the_first_receipt(breakable, missed)


async def test_a_cold_start_judges_another_request_under_a_known_key(breakable: Cluster, http: Http) -> None:
    tenant, headers = a_tenant(http, breakable), {"Idempotency-Key": unique("key")}
    item = {"content": "First.", "idempotency_key": "item-1"}
    first = await tenant.record(item, headers=headers)
    breakable.processes["ingestor"].kill()
    delete_ingestor_state(breakable)
    breakable.processes["ingestor"].start()

    mismatch = await tenant.record({"content": "Other."}, headers=headers)
    assert (mismatch.status_code, mismatch.json()["code"]) == (422, "idempotency_mismatch")
    again = await tenant.record(item, {"content": "Second."})
    assert again.json()["event_ids"] == [*first.json()["event_ids"], 2], "a cold start must know the items' keys too"


# ---- steps -----------------------------------------------------------------------------------------------------------


async def kill_gateway_mid_request(breakable: Cluster, writes: list[Retried]) -> None:
    """Send the writes, kill the gateway that waits for their outcome, and start another; the ingestor is paused."""
    gateway = breakable.processes["gateway"]
    breakable.processes["ingestor"].pause()
    attempts = [asyncio.ensure_future(write.send()) for write in writes]
    await eventually(lambda: published(breakable, writes), what="the commands are in Kafka")
    gateway.kill()
    for attempt in await asyncio.gather(*attempts, return_exceptions=True):
        assert isinstance(attempt, httpx.TransportError), f"the request was not under way: {attempt}"
    gateway.start()
    await asyncio.to_thread(gateway.wait_ready)


def delete_ingestor_state(breakable: Cluster) -> None:
    folder = Path(breakable.processes["ingestor"].env["INGESTOR_STATE_DIR"])
    assert any(folder.rglob("*.mdb")), f"there is no state in {folder}"
    shutil.rmtree(folder)


async def assert_retry_gets_the_first_receipt(breakable: Cluster, write: Retried) -> None:
    retry = await write.send()
    assert retry.status_code == HTTPStatus.CREATED, retry.text
    assert is_replay(retry), "the first attempt had reached Kafka: the retry must repeat its receipt"
    await assert_one_effect(breakable, write, retry)


async def assert_one_effect(breakable: Cluster, write: Retried, response: httpx.Response) -> None:
    log = await assert_accounts_agree(breakable, [write.entry(response)])
    assert len(log.under_key(write.stream, write.key)) == 1
    assert max(event.event_id for event in log.events if event.stream == write.stream) == event_id_of(response)


async def published(breakable: Cluster, writes: list[Retried]) -> bool:
    partitions = await read_topic(breakable.servers.kafka_bootstrap, COMMANDS)
    commands = [record for records in partitions.values() for record in records]
    return all(
        any(record.key == write.stream.encode() and write.key.encode() in record.value for record in commands)
        for write in writes
    )


async def effects(breakable: Cluster, write: Retried) -> int:
    return len((await load_log(breakable.servers.kafka_bootstrap)).under_key(write.stream, write.key))


def is_replay(response: httpx.Response) -> bool:
    return bool(response.headers.get("idempotency-replayed") == "true")
