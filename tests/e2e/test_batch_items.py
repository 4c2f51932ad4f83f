"""Items of the batch API: each field, its limits and its error; item keys; entities."""

import re
from http import HTTPStatus
from typing import Any

import pytest

from tests.e2e.client import Cluster, Http, Tenant, a_tenant, assert_time, body_of, unique

pytest_plugins = ["tests.e2e.contract_fixtures"]

MAX_CONTENT = 102_400
DEEP: dict[str, Any] = {"a": {"b": [1, 2.5, "three", None, True, {"c": []}]}, "ü": "機器人 🦾"}


async def the_error_of(tenant: Tenant, item: Any) -> dict[str, Any]:
    """Record the item between two good ones; they are recorded, it is not. Returns its error."""
    answer = body_of(await tenant.record({"content": "Before."}, item, {"content": "After."}), HTTPStatus.CREATED)
    assert answer["count"] == len(answer["event_ids"]) == len(answer["episode_ids"]) == 2
    first, second = answer["event_ids"]
    assert second == first + 1
    (error,) = answer["errors"]
    assert isinstance(error, dict)
    assert error.keys() == {"index", "code", "message"}
    assert error["index"] == 1
    return error


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [{}, {"content": None}, {"content": ""}, {"content": " "}, {"content": " \t\n "}, {"type": "message"}],
    ids=str,
)
async def test_an_item_without_content_says_so(tenant: Tenant, item: dict[str, Any]) -> None:
    assert await the_error_of(tenant, item) == {
        "index": 1,
        "code": "validation_error",
        "message": "Field 'content' is required",
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("content", 42),
        ("content", ["A word."]),
        ("content", {"text": "A word."}),
        ("content", True),
        ("type", "Message"),
        ("type", "two words"),
        ("type", "a.b"),
        ("type", "ü"),
        ("type", ""),
        ("type", "x" * 65),
        ("type", "message\n"),
        ("type", 42),
        ("type", ["message"]),
        ("source", 42),
        ("source", "x" * 256),
        ("source", ["slack"]),
        ("author", 42),
        ("author", "ü" * 256),
        ("author", {"name": "bob"}),
        ("channel", 42),
        ("channel", "x" * 256),
        ("timestamp", "yesterday"),
        ("timestamp", ""),
        ("timestamp", "2026-13-01T00:00:00Z"),
        ("timestamp", "2026-02-30T00:00:00Z"),
        ("timestamp", "2026-03-15T25:00:00Z"),
        ("timestamp", "2026-03-15T09:00:00+99:00"),
        ("timestamp", "2026-03-15T09:00:00Zebra"),
        ("timestamp", 1773565200),
        ("timestamp", ["2026-03-15T09:00:00Z"]),
        ("metadata", "text"),
        ("metadata", ["list"]),
        ("metadata", 42),
        ("entities", "CockroachDB"),
        ("entities", {"name": "CockroachDB", "type": "technology"}),
        ("entities", ["CockroachDB"]),
        ("entities", [{"type": "technology"}]),
        ("entities", [{"name": 42, "type": "technology"}]),
        ("entities", [{"name": "CockroachDB", "type": 42}]),
        ("idempotency_key", 42),
        ("idempotency_key", ["k"]),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_a_bad_field_is_an_error_of_its_item(tenant: Tenant, field: str, value: Any) -> None:
    error = await the_error_of(tenant, {"content": "A word.", field: value})
    assert error["code"] == "validation_error"
    assert re.match(rf"Field '{field}\b[^']*' .", error["message"]), error["message"]


@pytest.mark.parametrize("item", [None, 42, "A word.", True, [], [{"content": "A word."}]], ids=str)
async def test_an_item_that_is_no_object_is_an_error(tenant: Tenant, item: Any) -> None:
    error = await the_error_of(tenant, item)
    assert error["code"] == "validation_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"content": "", "source": 42, "timestamp": "yesterday"}, "content"),
        ({"content": "A word.", "timestamp": "yesterday", "source": 42}, "source"),
        ({"content": "A word.", "timestamp": "yesterday", "author": 42}, "author"),
        ({"content": "A word.", "author": 42, "source": 42}, "source"),
        ({"content": "A word.", "metadata": 42, "type": "Two words"}, "type"),
    ],
    ids=str,
)
async def test_an_item_has_one_error_that_of_the_first_field(tenant: Tenant, item: dict[str, Any], field: str) -> None:
    assert f"'{field}'" in (await the_error_of(tenant, item))["message"]


async def test_errors_are_sorted_by_index(tenant: Tenant) -> None:
    bad: list[Any] = [{}, {"content": "x" * (MAX_CONTENT + 1)}, 42, {"content": "A word.", "timestamp": "yesterday"}]
    items = [bad[index // 2 % 4] if index % 2 else {"content": f"Word {index}."} for index in range(40)]
    answer = body_of(await tenant.record(*items), HTTPStatus.CREATED)
    assert [error["index"] for error in answer["errors"]] == list(range(1, 40, 2))
    codes = ["validation_error", "payload_too_large", "validation_error", "validation_error"]
    assert [error["code"] for error in answer["errors"]] == codes * 5
    assert answer["event_ids"] == list(range(1, 21))


# ---- content ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["x", "x" * MAX_CONTENT, "€" * 34_133 + "x", "🦾" * 25_600, "\\" * MAX_CONTENT, '"' * MAX_CONTENT],
    ids=["1 byte", "ASCII", "3 bytes each", "4 bytes each", "backslashes", "quotes"],
)
async def test_content_of_up_to_102400_bytes_is_recorded(tenant: Tenant, content: str) -> None:
    assert (await tenant.recorded(content=content))["content"] == content


@pytest.mark.parametrize(
    "content",
    ["x" * (MAX_CONTENT + 1), "€" * 34_133 + "xx", "🦾" * 25_600 + "x", "x" * (2 * MAX_CONTENT)],
    ids=["ASCII", "3 bytes each", "4 bytes each", "twice"],
)
async def test_content_of_more_bytes_is_too_large(tenant: Tenant, content: str) -> None:
    error = await the_error_of(tenant, {"content": content})
    assert error["code"] == "payload_too_large"
    assert "'content'" in error["message"]


@pytest.mark.parametrize(
    "content",
    [" leading and trailing ", "line\nbreak\ttab\r\n", "Ünïcode 機器人 🦾 مرحبا", "\u2028\u00a0x", "\x00\x01\x7f\x85x"],
    ids=ascii,
)
async def test_content_is_kept_as_given(tenant: Tenant, content: str) -> None:
    assert (await tenant.recorded(content=content))["content"] == content


# ---- the other fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["message", "decision", "a", "x" * 64, "a-b_c", "0", "-", "_"])
async def test_a_type_is_any_word(tenant: Tenant, kind: str) -> None:
    assert (await tenant.recorded(type=kind))["type"] == kind


async def test_texts_of_255_characters_are_kept(tenant: Tenant) -> None:
    episode = await tenant.recorded(source="x" * 255, author="🦾" * 255, channel="ü" * 255)
    assert episode["source"] == "x" * 255
    assert episode["author"] == "🦾" * 255


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("2026-03-15T09:00:00Z", "2026-03-15T09:00:00.000Z"),
        ("2026-03-15T09:00:00.5Z", "2026-03-15T09:00:00.500Z"),
        ("2026-03-15T09:00:00.123Z", "2026-03-15T09:00:00.123Z"),
        ("2026-03-15T09:00:00.123456Z", "2026-03-15T09:00:00.123Z"),
        ("2026-03-15T09:00:00+00:00", "2026-03-15T09:00:00.000Z"),
        ("2026-03-15T09:00:00+02:00", "2026-03-15T07:00:00.000Z"),
        ("2026-03-15T09:00:00-05:30", "2026-03-15T14:30:00.000Z"),
        ("2026-03-15T00:30:00+01:00", "2026-03-14T23:30:00.000Z"),
        ("2026-03-15T09:00:00", "2026-03-15T09:00:00.000Z"),
        ("2026-03-15T09:00:00.25", "2026-03-15T09:00:00.250Z"),
        ("1969-07-20T20:17:40Z", "1969-07-20T20:17:40.000Z"),
        ("2100-02-28T23:59:59.999Z", "2100-02-28T23:59:59.999Z"),
        ("2024-02-29T12:00:00Z", "2024-02-29T12:00:00.000Z"),
    ],
)
async def test_a_timestamp_is_shown_in_utc(tenant: Tenant, given: str, shown: str) -> None:
    assert (await tenant.recorded(timestamp=given))["timestamp"] == shown


@pytest.mark.parametrize("timestamp", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
async def test_a_timestamp_at_the_edge_of_time_breaks_nothing(tenant: Tenant, timestamp: str) -> None:
    item = {"content": "A word.", "timestamp": timestamp}
    answer = body_of(await tenant.record(item, {"content": "After."}), HTTPStatus.CREATED)
    assert answer["count"] + len(answer["errors"]) == 2
    for episode_id in answer["episode_ids"]:
        assert_time((await tenant.seen(episode_id))["timestamp"])


async def test_items_without_timestamp_share_the_time_of_their_command(tenant: Tenant) -> None:
    answer = await tenant.given({"content": "One."}, {"content": "Two."})
    one, two = [await tenant.seen(episode_id) for episode_id in answer["episode_ids"]]
    assert one["timestamp"] == two["timestamp"]
    assert one["created_at"] == two["created_at"]


async def test_metadata_is_kept_as_given(tenant: Tenant) -> None:
    assert (await tenant.recorded(metadata=DEEP))["metadata"] == DEEP


# ---- item keys -------------------------------------------------------------------------------------------------------


def keyed(key: str, content: str = "A word.") -> dict[str, Any]:
    return {"content": content, "idempotency_key": key}


async def test_an_item_key_seen_before_gets_its_first_event_id(tenant: Tenant) -> None:
    first = await tenant.given(keyed("k1"), keyed("k2"))
    again = await tenant.given(keyed("k1"), keyed("k2"))
    assert again == first
    assert (await tenant.given({"content": "The next."}))["event_ids"] == [3]


async def test_seen_and_new_items_stand_in_the_order_of_the_request(tenant: Tenant) -> None:
    seen = await tenant.given({"content": "Zero."}, keyed("k1"))
    mixed = await tenant.given({"content": "New."}, keyed("k1"), keyed("k2", "Newer."), {"content": "Newest."})
    assert mixed["count"] == 4
    assert mixed["event_ids"] == [3, 2, 4, 5]
    assert mixed["episode_ids"][1] == seen["episode_ids"][1]
    contents = [(await tenant.seen(episode_id))["content"] for episode_id in mixed["episode_ids"]]
    assert contents == ["New.", "A word.", "Newer.", "Newest."]


async def test_an_item_key_counts_within_one_batch_too(tenant: Tenant) -> None:
    answer = await tenant.given(keyed("k1", "First."), keyed("k2"), keyed("k1", "Second."), {"content": "Last."})
    assert answer["count"] == 4
    assert answer["event_ids"] == [1, 2, 1, 3]
    assert answer["episode_ids"][2] == answer["episode_ids"][0]
    assert (await tenant.seen(answer["episode_ids"][2]))["content"] == "First."


async def test_what_was_recorded_first_under_an_item_key_stays(tenant: Tenant) -> None:
    first = await tenant.given(keyed("k1", "First."))
    assert await tenant.given(keyed("k1", "Second.")) == first
    assert (await tenant.seen(first["episode_ids"][0]))["content"] == "First."


async def test_item_keys_belong_to_their_tenant(http: Http, cluster: Cluster) -> None:
    one, other = a_tenant(http, cluster), a_tenant(http, cluster)
    await other.given({"content": "Zero."})
    assert (await one.given(keyed("k1")))["event_ids"] == [1]
    assert (await other.given(keyed("k1")))["event_ids"] == [2]


async def test_a_bad_item_does_not_use_its_key_up(tenant: Tenant) -> None:
    body_of(await tenant.record(keyed("k1", "")), HTTPStatus.CREATED)
    answer = await tenant.given(keyed("k1", "Good."))
    assert answer["event_ids"] == [1]
    assert (await tenant.seen(answer["episode_ids"][0]))["content"] == "Good."


async def test_items_without_key_are_recorded_every_time(tenant: Tenant) -> None:
    item = {"content": "The same."}
    assert (await tenant.given(item, item))["event_ids"] == [1, 2]
    assert (await tenant.given(item))["event_ids"] == [3]


async def test_a_large_batch_of_known_keys_records_only_what_is_new(tenant: Tenant) -> None:
    first = await tenant.given(*(keyed(f"k{number}") for number in range(0, 1000, 2)))
    assert first["event_ids"] == list(range(1, 501))
    second = await tenant.given(*(keyed(f"k{number}") for number in range(1000)))
    assert second["count"] == 1000
    assert second["event_ids"][0::2] == first["event_ids"]
    assert second["event_ids"][1::2] == list(range(501, 1001))
    assert second["episode_ids"][0::2] == first["episode_ids"]


# ---- entities --------------------------------------------------------------------------------------------------------


def named(entities: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entity["name"], entity["type"]) for entity in entities]


async def test_given_entities_come_first_in_their_order(tenant: Tenant) -> None:
    given = [{"name": "payments service", "type": "service"}, {"name": "a zebra", "type": "animal"}]
    episode = await tenant.recorded(content="Chose CockroachDB for the payments service.", entities=given)
    names = named(episode["entities"])
    assert names[:2] == [("payments service", "service"), ("a zebra", "animal")]
    assert ("CockroachDB", "technology") in names[2:]


async def test_known_technologies_are_extracted(tenant: Tenant) -> None:
    episode = await tenant.recorded(content="Chose CockroachDB for the payments service.")
    assert ("CockroachDB", "technology") in named(episode["entities"])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("yesterday we met Ada Lovelace at the office.", "Ada Lovelace"),
        ("please ask @carol about it.", "carol"),
        ("see https://grafana.example.com/d/1?x=y for the graph.", "grafana.example.com"),
    ],
)
async def test_names_in_the_content_are_extracted(tenant: Tenant, content: str, name: str) -> None:
    entities = (await tenant.recorded(content=content))["entities"]
    assert name in [entity["name"].removeprefix("@") for entity in entities], entities


async def test_an_entity_stands_once(tenant: Tenant) -> None:
    given = [{"name": "CockroachDB", "type": "technology"}]
    episode = await tenant.recorded(content="CockroachDB, CockroachDB and CockroachDB.", entities=given)
    ids = [entity["id"] for entity in episode["entities"]]
    assert len(ids) == len(set(ids))
    assert named(episode["entities"]).count(("CockroachDB", "technology")) == 1


async def test_an_entity_has_one_id_in_its_tenant(tenant: Tenant) -> None:
    entities = [{"name": "Payments", "type": "service"}]
    one = await tenant.recorded(entities=entities)
    two = await tenant.recorded(entities=entities)
    upper = await tenant.recorded(entities=[{"name": "PAYMENTS", "type": "service"}])
    team = await tenant.recorded(entities=[{"name": "Payments", "type": "team"}])
    entity_id = one["entities"][0]["id"]
    assert entity_id.startswith("ent_")
    assert two["entities"][0]["id"] == entity_id
    assert upper["entities"][0]["id"] == entity_id
    assert team["entities"][0]["id"] != entity_id


async def test_given_and_extracted_entities_share_their_id(tenant: Tenant) -> None:
    given = await tenant.recorded(entities=[{"name": "CockroachDB", "type": "technology"}])
    extracted = await tenant.recorded(content="Chose CockroachDB.")
    assert given["entities"][0]["id"] in [entity["id"] for entity in extracted["entities"]]


async def test_entities_of_another_tenant_have_other_ids(http: Http, cluster: Cluster) -> None:
    entities = [{"name": unique("thing"), "type": "service"}]
    one = await a_tenant(http, cluster).recorded(entities=entities)
    other = await a_tenant(http, cluster).recorded(entities=entities)
    assert one["entities"][0]["id"] != other["entities"][0]["id"]


async def test_the_same_content_has_the_same_entities(tenant: Tenant) -> None:
    content = "Ada Lovelace and @carol moved Kafka and CockroachDB to https://example.com/a."
    one, two = await tenant.recorded(content=content), await tenant.recorded(content=content)
    assert one["entities"] == two["entities"] != []


async def test_content_full_of_entities_is_recorded(tenant: Tenant) -> None:
    content = " ".join(f"Ada Lovelace{number} @user{number} https://h{number}.example.com/" for number in range(1500))
    assert len(content.encode()) <= MAX_CONTENT
    assert (await tenant.recorded(content=content))["content"] == content
