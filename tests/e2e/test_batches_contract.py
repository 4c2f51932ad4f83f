"""The batch API: its document's examples and tables, envelopes, what a GET answers, tenants."""

from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.client import (
    Cluster,
    Http,
    Tenant,
    a_tenant,
    assert_problem,
    assert_time,
    body_of,
    event_id_of,
    unique,
)

pytest_plugins = ["tests.e2e.contract_fixtures"]

STANDUPS: list[dict[str, Any]] = [
    {
        "type": "message",
        "content": "Standup: completed auth refactor, starting rate limiter.",
        "source": "slack",
        "author": "bob",
        "timestamp": "2026-03-15T09:00:00Z",
    },
    {
        "type": "message",
        "content": "Standup: shipped CockroachDB migration, monitoring for issues.",
        "source": "slack",
        "author": "alice",
        "timestamp": "2026-03-15T09:05:00Z",
    },
]
DECISION: dict[str, Any] = {
    "type": "decision",
    "content": "Chose CockroachDB for the payments service.",
    "source": "meeting-notes",
    "author": "prashant",
    "timestamp": "2026-03-15T10:00:00Z",
}
EPISODE = {
    "id",
    "event_id",
    "type",
    "content",
    "source",
    "author",
    "timestamp",
    "metadata",
    "entities",
    "status",
    "created_at",
}


# ---- the examples ----------------------------------------------------------------------------------------------------


async def test_a_batch_answers_201_with_its_event_ids(tenant: Tenant) -> None:
    answer = body_of(await tenant.record(*STANDUPS, namespace="engineering"), HTTPStatus.CREATED)
    assert answer == {"count": 2, "event_ids": [1, 2], "errors": [], "episode_ids": answer["episode_ids"]}
    assert len(answer["episode_ids"]) == 2


async def test_a_batch_with_a_bad_item_answers_201_with_its_error(tenant: Tenant) -> None:
    bad = {key: value for key, value in STANDUPS[1].items() if key != "content"}
    answer = body_of(await tenant.record(STANDUPS[0], bad), HTTPStatus.CREATED)
    assert answer == {
        "count": 1,
        "event_ids": [1],
        "errors": [{"index": 1, "code": "validation_error", "message": "Field 'content' is required"}],
        "episode_ids": answer["episode_ids"],
    }
    assert len(answer["episode_ids"]) == 1


async def test_the_curl_example_works(tenant: Tenant) -> None:
    answer = await tenant.given(
        {"type": "message", "content": "First.", "source": "test"},
        {"type": "message", "content": "Second.", "source": "test"},
    )
    assert answer["count"] == 2
    first, second = [await tenant.seen(episode_id) for episode_id in answer["episode_ids"]]
    assert (first["content"], second["content"]) == ("First.", "Second.")


async def test_an_episode_has_the_documented_shape(tenant: Tenant) -> None:
    entities = [
        {"name": "CockroachDB", "type": "technology"},
        {"name": "payments service", "type": "service"},
    ]
    answer = await tenant.given({**DECISION, "entities": entities})
    (episode_id,) = answer["episode_ids"]
    episode = await tenant.seen(episode_id)
    assert episode == {
        "id": episode_id,
        "event_id": answer["event_ids"][0],
        "type": "decision",
        "content": "Chose CockroachDB for the payments service.",
        "source": "meeting-notes",
        "author": "prashant",
        "timestamp": "2026-03-15T10:00:00.000Z",
        "metadata": {},
        "entities": episode["entities"],
        "status": "active",
        "created_at": episode["created_at"],
    }
    assert_time(episode["created_at"])
    assert [{"name": entity["name"], "type": entity["type"]} for entity in episode["entities"]][:2] == entities
    for entity in episode["entities"]:
        assert entity.keys() == {"id", "name", "type"}


async def test_an_item_with_content_only_has_every_key(tenant: Tenant) -> None:
    before = datetime.now(UTC)
    episode = await tenant.recorded(content="A word.")
    assert episode.keys() == EPISODE
    assert episode["type"] == "message"
    assert episode["content"] == "A word."
    assert episode["source"] is None
    assert episode["author"] is None
    assert episode["metadata"] == {}
    assert episode["status"] == "active"
    happened, recorded = assert_time(episode["timestamp"]), assert_time(episode["created_at"])
    margin = timedelta(minutes=1)
    assert before - margin < happened <= recorded < datetime.now(UTC) + margin


async def test_ids_cannot_be_guessed(tenant: Tenant) -> None:
    ids = (await tenant.given(*({"content": f"Word {number}."} for number in range(50))))["episode_ids"]
    assert len(set(ids)) == 50
    for episode_id in ids:
        assert episode_id.startswith("ep_")
        assert len(episode_id.removeprefix("ep_")) >= 16
    # Ids that count up differ in few places only.
    first, second = ids[0].removeprefix("ep_"), ids[1].removeprefix("ep_")
    assert sum(one != other for one, other in zip(first, second, strict=True)) >= 8


# ---- the envelope ----------------------------------------------------------------------------------------------------

GOOD = [{"content": "A word."}]


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_id": ...},
        {"tenant_id": None},
        {"tenant_id": ""},
        {"tenant_id": "   "},
        {"tenant_id": 42},
        {"tenant_id": ["my-app"]},
        {"episodes": ...},
        {"episodes": None},
        {"episodes": []},
        {"episodes": {}},
        {"episodes": {"content": "A word."}},
        {"episodes": "A word."},
        {"episodes": GOOD * 1001},
        {"episodes": [None] * 1001},
    ],
    ids=lambda change: str(change)[:40],
)
async def test_a_bad_envelope_is_400_and_nothing_is_recorded(tenant: Tenant, change: dict[str, Any]) -> None:
    envelope = {"tenant_id": tenant.tenant_id, "episodes": GOOD, **change}
    body = {key: value for key, value in envelope.items() if value is not ...}
    assert_problem(await tenant.post(body), HTTPStatus.BAD_REQUEST, "validation_error")
    assert (await tenant.given({"content": "The first."}))["event_ids"] == [1]


async def test_a_namespace_is_a_free_label(tenant: Tenant) -> None:
    for number, namespace in enumerate(["engineering", "two words/and a slash", "Ünïcode", None], start=1):
        answer = body_of(await tenant.record({"content": "A word."}, namespace=namespace), HTTPStatus.CREATED)
        assert answer["event_ids"] == [number]
        assert (await tenant.seen(answer["episode_ids"][0])).keys() == EPISODE


async def test_unknown_keys_are_ignored(tenant: Tenant) -> None:
    item = {"content": "A word.", "colour": "red", "id": "ep_mine", "event_id": 99, "status": "gone"}
    answer = body_of(await tenant.record(item, colour="blue"), HTTPStatus.CREATED)
    assert answer["event_ids"] == [1]
    episode = await tenant.seen(answer["episode_ids"][0])
    assert episode.keys() == EPISODE
    assert episode["status"] == "active"


# ---- numbering -------------------------------------------------------------------------------------------------------


async def test_event_ids_go_on_from_batch_to_batch(tenant: Tenant) -> None:
    expected = 1
    for size in (1, 3, 2, 10):
        response = await tenant.record(*({"content": f"Word {number}."} for number in range(size)))
        answer = body_of(response, HTTPStatus.CREATED)
        assert answer["event_ids"] == list(range(expected, expected + size))
        assert answer["count"] == size
        expected += size
        assert event_id_of(response) == expected - 1


async def test_tenants_have_their_own_numbers(http: Http, cluster: Cluster) -> None:
    for tenant in (a_tenant(http, cluster), a_tenant(http, cluster)):
        assert (await tenant.given({"content": "One."}, {"content": "Two."}))["event_ids"] == [1, 2]


async def test_ids_and_event_ids_are_aligned_with_the_good_items(tenant: Tenant) -> None:
    items: list[dict[str, Any]] = [{"content": f"Word {number}."} if number % 3 else {} for number in range(12)]
    answer = body_of(await tenant.record(*items), HTTPStatus.CREATED)
    assert answer["count"] == 8
    assert answer["event_ids"] == list(range(1, 9))
    assert [error["index"] for error in answer["errors"]] == [0, 3, 6, 9]
    good = [item["content"] for item in items if item]
    for content, event_id, episode_id in zip(good, answer["event_ids"], answer["episode_ids"], strict=True):
        episode = await tenant.seen(episode_id)
        assert (episode["content"], episode["event_id"]) == (content, event_id)


async def test_a_batch_of_bad_items_is_201_and_takes_no_number(tenant: Tenant) -> None:
    answer = body_of(await tenant.record({}, {"content": ""}, 42), HTTPStatus.CREATED)
    assert answer["count"] == 0
    assert answer["event_ids"] == answer["episode_ids"] == []
    assert [error["index"] for error in answer["errors"]] == [0, 1, 2]
    assert (await tenant.given({"content": "The first."}))["event_ids"] == [1]


@pytest.mark.parametrize("bad", [0, 1, 500, 1000])
async def test_a_batch_of_1000_records_its_good_items(tenant: Tenant, bad: int) -> None:
    bad_indexes = {number * 1000 // bad for number in range(bad)} if bad > 1 else {617} if bad else set()
    items: list[dict[str, Any]] = [
        {"source": "test"} if index in bad_indexes else {"content": f"Word {index}.", "source": "test"}
        for index in range(1000)
    ]
    answer = body_of(await tenant.record(*items), HTTPStatus.CREATED)
    good = [index for index in range(1000) if index not in bad_indexes]
    assert answer["count"] == len(good) == 1000 - bad
    assert answer["event_ids"] == list(range(1, len(good) + 1))
    assert answer["errors"] == [
        {"index": index, "code": "validation_error", "message": "Field 'content' is required"}
        for index in sorted(bad_indexes)
    ]
    assert len(set(answer["episode_ids"])) == len(good)
    for place in {0, len(good) // 2, len(good) - 1} if good else set():
        episode = await tenant.seen(answer["episode_ids"][place])
        assert (episode["content"], episode["event_id"]) == (f"Word {good[place]}.", place + 1)
    assert (await tenant.given({"content": "The next."}))["event_ids"] == [len(good) + 1]


async def test_every_item_of_a_large_batch_can_be_read(tenant: Tenant) -> None:
    answer = await tenant.given(*({"content": f"Word {number}."} for number in range(200)))
    for number, episode_id in enumerate(answer["episode_ids"]):
        episode = await tenant.seen(episode_id)
        assert (episode["content"], episode["event_id"]) == (f"Word {number}.", number + 1)


# ---- reading ---------------------------------------------------------------------------------------------------------


async def test_the_tenant_may_come_in_a_header(http: Http, tenant: Tenant) -> None:
    episode = await tenant.recorded()
    response = await http.send(
        "GET",
        f"{tenant.target}/{episode['id']}",
        authorization=tenant.authorization,
        headers={"X-Tenant-Id": tenant.tenant_id},
    )
    assert body_of(response, HTTPStatus.OK) == episode


@pytest.mark.parametrize("query", ["", "?tenant_id=", "?tenant=my-app"])
async def test_a_read_without_tenant_is_400(http: Http, tenant: Tenant, query: str) -> None:
    episode = await tenant.recorded()
    response = await http.send("GET", f"{tenant.target}/{episode['id']}{query}", authorization=tenant.authorization)
    assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")


async def test_an_unknown_id_and_another_tenants_id_are_404_alike(http: Http, cluster: Cluster, tenant: Tenant) -> None:
    theirs = (await a_tenant(http, cluster).recorded())["id"]
    await tenant.recorded()
    unknown = "ep_" + "0" * len(theirs.removeprefix("ep_"))
    answers = []
    for episode_id in (theirs, unknown):
        problem = assert_problem(await tenant.get(episode_id), HTTPStatus.NOT_FOUND, "not_found")
        answers.append(str({**problem, "request_id": ""}).replace(episode_id, "the id"))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("episode_id", ["ep_", "nonsense", "1", "a/b", "ep_$ne", "機", "x" * 1000])
async def test_an_id_that_cannot_be_is_404(tenant: Tenant, episode_id: str) -> None:
    await tenant.recorded()
    assert_problem(await tenant.get(episode_id), HTTPStatus.NOT_FOUND, "not_found")


async def test_an_unknown_tenant_has_no_episodes(http: Http, cluster: Cluster, tenant: Tenant) -> None:
    episode = await tenant.recorded()
    nobody = a_tenant(http, cluster)
    assert_problem(await nobody.get(episode["id"]), HTTPStatus.NOT_FOUND, "not_found")


@pytest.mark.parametrize("word", ["two words", "Ünï-機器人", "a/b", "a+b&c=d", "a:b", "UPPER"])
async def test_a_tenant_id_may_be_any_text(http: Http, cluster: Cluster, word: str) -> None:
    tenant = Tenant(http, word + unique(""), cluster.api_key)
    answer = await tenant.given({"content": "A word."})
    assert answer["event_ids"] == [1]
    target = f"{tenant.target}/{answer['episode_ids'][0]}?tenant_id={quote(tenant.tenant_id, safe='')}"
    response = await http.read(tenant.stream, "GET", target, authorization=tenant.authorization)
    assert body_of(response, HTTPStatus.OK)["content"] == "A word."


async def test_tenants_are_told_apart_by_every_character(http: Http, cluster: Cluster) -> None:
    name = unique("my-app")
    for tenant_id in (name, name.upper(), f"{name}\u00e9", f"{name}e\u0301"):
        tenant = Tenant(http, tenant_id, cluster.api_key)
        assert (await tenant.given({"content": "A word."}))["event_ids"] == [1], tenant_id
