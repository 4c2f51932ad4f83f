"""Commands that nobody can read: put aside with the reason, never skipped in silence. Too many stop the partition."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from http import HTTPStatus

import pytest
from aiokafka import AIOKafkaProducer

from tests.cluster import Cluster, throw_away_cluster
from tests.e2e.client import Http, Tenant, a_tenant, assert_problem, described, open_http, unique
from tests.e2e.ledger import COMMANDS, DEAD_LETTERS, REPLIES, Record, load_log, read_topic
from tests.e2e.load import assert_accounts_agree, eventually, left_running, recorded

LIMIT = 8
SETTINGS = {"INGESTOR_DEAD_LETTERS_PER_MINUTE": str(LIMIT), "GATEWAY_REPLY_TIMEOUT": "3"}

UNREADABLE: Sequence[bytes | None] = (
    b"no JSON",
    b"\xff\xfe\x00",
    b"{}",
    b"[]",
    b'{"type": "BurnEverything", "command_id": "x"}',
    b'{"type": "UpsertEpisode"}',
    None,
)


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
        yield http


async def test_an_unreadable_command_is_put_aside_and_the_partition_goes_on(breakable: Cluster, http: Http) -> None:
    tenant, partition = await a_tenant_in_a_partition_of_its_own(breakable, http, used=set())
    offsets = [await put(breakable, partition, value, key=b"a key") for value in UNREADABLE]
    key = unique("key")
    after = await tenant.record({"content": "After."}, headers={"Idempotency-Key": key})
    assert after.status_code == HTTPStatus.CREATED, described(after)

    letters = (await read_topic(breakable.servers.kafka_bootstrap, DEAD_LETTERS))[partition]
    assert [(letter.key, letter.value) for letter in letters] == [(b"a key", value or b"") for value in UNREADABLE]
    for letter, offset in zip(letters, offsets, strict=True):
        headers = dict(letter.headers)
        assert headers["source-topic"] == COMMANDS.encode()
        assert headers["source-partition"] == str(partition).encode()
        assert headers["source-offset"] == str(offset).encode()
        assert headers["reason"], "the reason is missing"
    await assert_accounts_agree(breakable, [recorded(tenant, key, ["After."], after)])


async def test_a_caller_who_is_known_is_told(breakable: Cluster, http: Http) -> None:
    _, partition = await a_tenant_in_a_partition_of_its_own(breakable, http, used=await parked(breakable))
    caller, reply_partition = unique("command"), 3
    headers = [("correlation-id", caller.encode()), ("reply-partition", str(reply_partition).encode())]
    await put(breakable, partition, b"no JSON", headers=headers)

    async def answered() -> list[Record]:
        replies = (await read_topic(breakable.servers.kafka_bootstrap, REPLIES))[reply_partition]
        return [reply for reply in replies if json.loads(reply.value)["command_id"] == caller]

    (reply,) = await eventually(answered, what="the caller has an answer")
    assert json.loads(reply.value)["outcome"]["code"] == "validation_error"


async def test_too_many_unreadable_commands_stop_the_partition_loudly(breakable: Cluster, http: Http) -> None:
    ingestor = breakable.processes["ingestor"]
    tenant, partition = await a_tenant_in_a_partition_of_its_own(breakable, http, used=await parked(breakable))
    other, _ = await a_tenant_in_a_partition_of_its_own(breakable, http, used={partition})
    for number in range(LIMIT + 1):
        await put(breakable, partition, b"no JSON %d" % number)

    async def says_why() -> bool:
        said = await asyncio.to_thread(ingestor.missing)
        return said is not None and "stopped" in said and str(LIMIT) in said

    await eventually(says_why, what="/readyz says that the partition is stopped")
    assert ingestor.running
    letters = (await read_topic(breakable.servers.kafka_bootstrap, DEAD_LETTERS))[partition]
    assert [letter.value for letter in letters] == [b"no JSON %d" % number for number in range(LIMIT)]
    waiting = await tenant.record({"content": "Behind them."})
    assert_problem(waiting, HTTPStatus.GATEWAY_TIMEOUT, "timeout")
    await other.given({"content": "The other partitions go on."})

    # A person has looked, and starts it again: nothing was skipped meanwhile.
    ingestor.kill()
    ingestor.start()
    await eventually(functools.partial(holds, breakable, tenant, "Behind them."), what="the partition goes on")
    letters = (await read_topic(breakable.servers.kafka_bootstrap, DEAD_LETTERS))[partition]
    assert [letter.value for letter in letters] == [b"no JSON %d" % number for number in range(LIMIT + 1)]
    await assert_accounts_agree(breakable, [])


async def a_tenant_in_a_partition_of_its_own(breakable: Cluster, http: Http, *, used: set[int]) -> tuple[Tenant, int]:
    """Return a tenant with one episode, in none of the partitions `used`, and its partition."""
    while True:
        tenant = a_tenant(http, breakable)
        await tenant.given({"content": "First."})
        log = await load_log(breakable.servers.kafka_bootstrap)
        (partition,) = {event.partition for event in log.events if event.stream == tenant.stream}
        if partition not in used:
            return tenant, partition


async def put(
    breakable: Cluster,
    partition: int,
    value: bytes | None,
    *,
    key: bytes | None = None,
    headers: Sequence[tuple[str, bytes]] = (),
) -> int:
    """Put a record into the commands topic, past the gateway. Returns its offset."""
    producer = AIOKafkaProducer(bootstrap_servers=breakable.servers.kafka_bootstrap, acks="all")
    await producer.start()
    try:
        sent = await producer.send_and_wait(COMMANDS, value, key=key, partition=partition, headers=list(headers))
    finally:
        await producer.stop()
    return int(sent.offset)


async def parked(breakable: Cluster) -> set[int]:
    """Return the partitions in which commands were put aside: their minute may not be over."""
    letters = await read_topic(breakable.servers.kafka_bootstrap, DEAD_LETTERS)
    return {partition for partition, records in letters.items() if records}


async def holds(breakable: Cluster, tenant: Tenant, content: str) -> bool:
    log = await load_log(breakable.servers.kafka_bootstrap)
    return any(event.stream == tenant.stream and event.text == content for event in log.events)
