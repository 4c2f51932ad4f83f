"""What somebody can do who writes to the service's topics past the gateway: docs/security.md says it, this shows it.

Only the brokers' ACLs keep them out; what is tested here is that nothing is believed that need not be, nothing is
skipped in silence, and one partition's trouble stays its own.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from http import HTTPStatus
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from shared.codec import encode_command, encode_receipt
from shared.commands import CORRELATION_ID, REPLY_PARTITION
from shared.ids import CommandId, EventId, StreamId
from shared.receipts import CommandRefused, Receipt
from tests.builders import upsert
from tests.cluster import Cluster, throw_away_cluster
from tests.e2e.client import Http, Tenant, a_tenant, assert_problem, body_of, open_http, unique
from tests.e2e.ledger import COMMANDS, DEAD_LETTERS, EVENTS, REPLIES, Record, load_log, read_topic
from tests.e2e.load import assert_accounts_agree, eventually, left_running

SETTINGS = {"INGESTOR_DEAD_LETTERS_PER_MINUTE": "100", "GATEWAY_REPLY_TIMEOUT": "5"}
Headers = Sequence[tuple[str, bytes]]


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


async def put(
    cluster: Cluster, topic: str, partition: int, value: bytes | None, key: bytes | None = None, headers: Headers = ()
) -> int:
    """Put a record into a topic, past the service. Returns its offset."""
    producer = AIOKafkaProducer(bootstrap_servers=cluster.servers.kafka_bootstrap, acks="all")
    await producer.start()
    try:
        sent = await producer.send_and_wait(topic, value, key=key, partition=partition, headers=list(headers))
    finally:
        await producer.stop()
    return int(sent.offset)


async def last_record(cluster: Cluster, partition: int) -> Record:
    return (await read_topic(cluster.servers.kafka_bootstrap, EVENTS))[partition][-1]


async def a_partition(cluster: Cluster, http: Http, used: Sequence[int] = ()) -> tuple[Tenant, int]:
    """Return a tenant with one episode, and its partition, which is none of those used."""
    while True:
        tenant = a_tenant(http, cluster)
        await recorded(tenant)
        log = await load_log(cluster.servers.kafka_bootstrap)
        (partition,) = {event.partition for event in log.events if event.stream == tenant.stream}
        if partition not in used:
            return tenant, partition


async def recorded(tenant: Tenant) -> int:
    """Record an episode, again if it is not known whether it is; return its event_id."""
    headers = {"Idempotency-Key": unique("key")}

    async def done() -> int | None:
        answer = await tenant.record({"content": "A word."}, headers=headers)
        return answer.json()["event_ids"][0] if answer.status_code == HTTPStatus.CREATED else None

    return await eventually(done, what="an episode is recorded")


# ---- commands --------------------------------------------------------------------------------------------------------


async def test_commands_under_a_wrong_key_or_in_a_wrong_partition_are_put_aside(breakable: Cluster, http: Http) -> None:
    tenant, partition = await a_partition(breakable, http)
    partitions = len(await read_topic(breakable.servers.kafka_bootstrap, COMMANDS))
    stranger = encode_command(upsert(namespace=unique("victim"), actor="forged"))
    victim = json.loads(stranger)["namespace"]
    values: list[tuple[bytes | None, bytes | None, Headers]] = [
        (stranger, tenant.stream.encode(), ()),
        (stranger, None, ()),
        (stranger, b"\xff\xfe", ()),
        (b'{"hello": "world"}', tenant.stream.encode(), ()),
        (b"[" * 100_000, None, ()),
        (b'{"type": "UpsertEpisode", "name": "\xed\xa0\x80"}', None, ()),
        (b"no JSON", None, [("correlation-id", b"\xff" * 5_000), ("original-reason", b"x" * 5_000)]),
        (b"no JSON", None, [("correlation-id", b"x"), ("reply-partition", b"-1")]),
        (b"no JSON", None, [("correlation-id", b"x"), ("reply-partition", b"\xc2\xb2")]),
    ]
    for value, key, headers in values:
        await put(breakable, COMMANDS, partition, value, key, headers)
    for other in range(partitions):  # at most one of them is the right one
        if other != partition:
            await put(breakable, COMMANDS, other, b'{"hello": "world"}', tenant.stream.encode())
    assert await recorded(tenant) == 2

    letters = (await read_topic(breakable.servers.kafka_bootstrap, DEAD_LETTERS))[partition]
    assert [letter.value for letter in letters] == [value for value, _, _ in values]
    log = await load_log(breakable.servers.kafka_bootstrap)
    assert not [event for event in log.events if event.stream == f"namespace:{victim}"]
    await assert_accounts_agree(breakable, [])


async def test_a_forged_command_that_is_well_formed_is_obeyed(breakable: Cluster, http: Http) -> None:
    """The ingestor has no other way to know who asks: that is why only the gateway may write to the topic."""
    slug = unique("victim")
    command = upsert(namespace=slug, project="robotics", name="planted", actor="somebody else")
    partitions = len(await read_topic(breakable.servers.kafka_bootstrap, COMMANDS))
    for partition in range(partitions):  # one of them is the right one, the others put it aside
        await put(breakable, COMMANDS, partition, encode_command(command), command.stream.encode())

    async def obeyed() -> bool:
        log = await load_log(breakable.servers.kafka_bootstrap)
        return any(event.stream == f"namespace:{slug}" for event in log.events)

    await eventually(obeyed, what="the forged command is in the log")
    await assert_accounts_agree(breakable, [])


# ---- replies ---------------------------------------------------------------------------------------------------------


async def test_junk_among_the_replies_is_dropped(breakable: Cluster, http: Http) -> None:
    tenant, _ = await a_partition(breakable, http)
    for partition in range(len(await read_topic(breakable.servers.kafka_bootstrap, REPLIES))):
        for value in (b"no JSON", b"[" * 100_000, None):
            await put(breakable, REPLIES, partition, value, key=b"x")
    assert await recorded(tenant) == 2


async def test_a_forged_receipt_is_told_to_its_caller_and_the_log_stays_right(breakable: Cluster, http: Http) -> None:
    tenant, partition = await a_partition(breakable, http)
    before = len((await read_topic(breakable.servers.kafka_bootstrap, COMMANDS))[partition])
    ingestor = breakable.processes["ingestor"]
    ingestor.pause()
    try:
        asking = asyncio.create_task(tenant.record({"content": "A word."}))

        async def asked() -> Record | None:
            records = (await read_topic(breakable.servers.kafka_bootstrap, COMMANDS))[partition]
            return records[before] if len(records) > before else None

        command = await eventually(asked, what="the command is in its topic")
        headers = dict(command.headers)
        receipt = Receipt(
            command_id=CommandId(headers[CORRELATION_ID].decode()),
            stream=StreamId(tenant.stream),
            event_id=EventId(999),
            outcome=CommandRefused("validation_error", "Forged."),
        )
        await put(breakable, REPLIES, int(headers[REPLY_PARTITION]), encode_receipt(receipt))
        assert_problem(await asking, HTTPStatus.BAD_REQUEST, "validation_error")
    finally:
        ingestor.resume()
    assert await recorded(tenant) == 3, "what was refused by the forged receipt has happened"
    await assert_accounts_agree(breakable, [])


# ---- events ----------------------------------------------------------------------------------------------------------


async def test_a_forged_fence_ends_a_tenure_and_the_writer_comes_back(breakable: Cluster, http: Http) -> None:
    tenant, partition = await a_partition(breakable, http)
    fence: dict[str, Any] = {
        "specversion": "1.0",
        "id": "forged",
        "source": "/fences",
        "type": "episodes.WriterFenced.v1",
        "time": "2026-04-14T12:00:00Z",
        "data": {"owner": "mallory", "nonce": "forged"},
    }
    for number in range(3):
        await put(breakable, EVENTS, partition, json.dumps(fence).encode())
        assert await recorded(tenant) == 2 + number
    await assert_accounts_agree(breakable, [])


async def test_a_forged_event_out_of_its_place_did_not_happen(breakable: Cluster, http: Http) -> None:
    tenant, partition = await a_partition(breakable, http)
    last = await last_record(breakable, partition)
    event = json.loads(last.value)
    forged = [
        {**event, "writer": event["writer"] + 1, "position": event["position"] + 1},
        {**event, "position": event["position"] + 2},
        {**event, "position": event["position"]},
        {**event, "position": -1, "writer": -1},
        {**event, "position": 2**62, "writer": 2**62},
    ]
    for number, each in enumerate(forged):
        each |= {"id": "999", "eventid": 999, "streamid": "tenant:somebody-else", "actor": "forged"}
        await put(breakable, EVENTS, partition, json.dumps(each).encode(), b"a wrong key")
        assert await recorded(tenant) == 2 + number
    log = await assert_accounts_agree(breakable, [])
    assert not [event for event in log.events if event.stream == "tenant:somebody-else"]


async def test_a_forged_event_in_its_exact_place_is_believed(breakable: Cluster, http: Http) -> None:
    """Whoever reads the log can make one that fits: that is why only ingestors may write to the topic."""
    tenant, partition = await a_partition(breakable, http)
    last = await last_record(breakable, partition)
    event = json.loads(last.value)
    event |= {"position": event["position"] + 1, "eventid": 2, "id": "2", "actor": "forged"}
    event["data"] = {**event["data"], "id": "ep_000000000000000000000000", "content": "Never said."}
    event["subject"] = event["data"]["id"]
    for attribute in ("idempotencykey", "requesthash"):
        event.pop(attribute, None)
    await put(breakable, EVENTS, partition, json.dumps(event).encode(), last.key)
    assert await recorded(tenant) == 3
    seen = await tenant.get(event["subject"])
    assert body_of(seen, HTTPStatus.OK)["content"] == "Never said."


async def test_a_foreign_record_in_the_log_stops_its_partition_loudly_and_no_other() -> None:
    with throw_away_cluster(settings=SETTINGS) as doomed:
        async with open_http(doomed.url) as http:
            tenant, partition = await a_partition(doomed, http)
            other, _ = await a_partition(doomed, http, used=[partition])
            offset = await put(doomed, EVENTS, partition, b'{"hello": "world"}')
            answer = await tenant.record({"content": "Behind it."})
            assert_problem(answer, HTTPStatus.GATEWAY_TIMEOUT, "timeout")
            for name in ("ingestor", "projector"):
                process = doomed.processes[name]

                async def says_why(process: Any = process) -> bool:
                    said = await asyncio.to_thread(process.missing)
                    return said is not None and "not a record of this log" in said and str(offset) in said

                await eventually(says_why, what=f"the {name} says which record it cannot read")
                assert process.running
            assert await recorded(other) == 2
            episode = await other.recorded(content="Others go on.")
            assert episode["event_id"] == 3


async def test_a_command_that_wants_its_reply_where_there_is_no_place_harms_nobody() -> None:
    with throw_away_cluster(settings=SETTINGS) as doomed:
        async with open_http(doomed.url) as http:
            tenant, partition = await a_partition(doomed, http)
            pid = doomed.processes["ingestor"].pid
            for place in (b"16", b"4294967296", b"9" * 5_000, b"-1", b"\xc2\xb2", b""):
                headers = [("correlation-id", b"x"), ("reply-partition", place)]
                await put(doomed, COMMANDS, partition, b"no JSON", headers=headers)
            assert await recorded(tenant) == 2
            assert doomed.processes["ingestor"].pid == pid
