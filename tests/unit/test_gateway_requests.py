"""Bodies → commands: what is taken, what is not, and with which sentence."""

from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import UNSET, Raw

from gateway.entities import WordListExtractor
from gateway.problems import Problem
from gateway.requests import MAX_CONTENT_BYTES, Batch, patch_episode, record_episodes, upsert_episode
from shared.commands import NO_METADATA, EpisodeFields, ItemError

NAME = "Field 'name' must be 1 to 255 characters, not blank, without control characters, and not '.' or '..'"
STATUS = "Field 'status' must be one of running, completed, failed, archived"
TYPE = "Field 'type' must be a word of 1 to 64 characters out of a-z, 0-9, '_' and '-'"
ENTITIES = (
    "Field 'entities' must be a list of at most 50 objects with a name and a type, strings of 1 to 255 characters"
)
TIMESTAMP = "Field 'timestamp' must be a date and time in ISO 8601"
KEY = "Field 'idempotency_key' must be a string of 1 to 255 visible ASCII characters"
LABEL = "must be 1 to 255 characters, not blank, without control characters"


def refused(read: Any, body: Any) -> str:
    with pytest.raises(Problem) as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value.detail


def batch(*items: Any) -> Batch:
    return record_episodes({"tenant_id": "my-app", "episodes": [*items]}, WordListExtractor())


def item_error(item: Any) -> ItemError:
    recorded = batch({"content": "x"}, item)
    assert len(recorded.items) == 1
    [error] = recorded.errors
    assert error.index == 1
    return error


# --- A


def test_only_the_keys_that_are_present_are_said() -> None:
    assert upsert_episode({"name": "x", "unknown": 1}) == ("x", EpisodeFields())
    assert patch_episode({}) == (UNSET, EpisodeFields())


def test_null_clears_where_it_may() -> None:
    body = {"description": None, "tags": None, "folder": None, "metadata": None}
    cleared = EpisodeFields(description=None, tags=(), folder=None, metadata=NO_METADATA)
    assert upsert_episode({"name": "x", **body}) == ("x", cleared)
    assert patch_episode(body) == (UNSET, cleared)


def test_everything_that_can_be_said() -> None:
    body = {
        "name": "x",
        "description": "d\x00",
        "tags": ["a", "", "a"],
        "status": "archived",
        "writeProtected": True,
        "folder": "/a/b",
        "metadata": {"b": 1, "a": [None, 1.5, 2**64]},
    }
    said = EpisodeFields(
        description="d\x00",
        tags=("a", "", "a"),
        status="archived",
        write_protected=True,
        folder="/a/b",
        metadata=Raw(b'{"b":1,"a":[null,1.5,18446744073709551616]}'),
    )
    assert upsert_episode(body) == patch_episode(body) == ("x", said)


def each(field: str, message: str, *values: Any) -> list[tuple[str, Any, str]]:
    return [(field, value, message) for value in values]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *each("name", NAME, "", " ", "\t", "\u3000", ".", "..", "a" * 256, "a\x00", "\x85", 1, [], {}),
        *each("description", "Field 'description' must be a string or null", 1, [], {}, 1.5),
        *each("tags", "Field 'tags' must be a list of strings", "a", {}, [1], [None], 0),
        *each("folder", "Field 'folder' must be a string or null", 1, [], {}, 1.5),
        *each("writeProtected", "Field 'writeProtected' must be true or false", None, 1, "true", 0),
        *each("status", STATUS, None, "", "Running", 1, [], {}),
        *each("metadata", "Field 'metadata' must be an object or null", [], "x", 1, 1.5),
    ],
)
def test_what_is_wrong_is_told_by_field(field: str, value: Any, message: str) -> None:
    assert refused(upsert_episode, {"name": "x", field: value}) == message
    assert refused(patch_episode, {field: value}) == message


def test_a_name_is_required_where_an_episode_may_be_made() -> None:
    assert refused(upsert_episode, {}) == "Field 'name' is required"
    assert refused(upsert_episode, {"name": None}) == "Field 'name' is required"
    assert refused(patch_episode, {"name": None}) == NAME


def test_the_first_wrong_field_in_the_documents_order_is_told() -> None:
    wrong = dict.fromkeys(("metadata", "writeProtected", "status", "folder", "tags", "description", "name"), 0)
    orders = {
        upsert_episode: ["name", "description", "tags", "folder", "writeProtected", "metadata", "status"],
        patch_episode: ["name", "description", "tags", "status", "writeProtected", "folder", "metadata"],
    }
    for read, order in orders.items():
        body = dict(wrong)
        for field in order:
            assert f"'{field}'" in refused(read, body)
            if field == "name":
                body["name"] = "x"  # type: ignore[assignment]
            else:
                del body[field]


@pytest.mark.parametrize("name", ["a", "a" * 255, "日" * 255, "a/b", " a ", "...", "%2F", "a\u2028b"])
def test_names_may_be_nearly_anything(name: str) -> None:
    assert upsert_episode({"name": name})[0] == name


@pytest.mark.parametrize(
    ("given", "normalised"),
    [
        ("/a/b", "/a/b"),
        ("a/b", "/a/b"),
        ("//a///b//", "/a/b"),
        ("/", None),
        ("", None),
        ("///", None),
        (" a /b ", "/ a /b "),
        ("/" + "/".join(["a"] * 32), "/" + "/".join(["a"] * 32)),
        ("a" * 255, "/" + "a" * 255),
    ],
)
def test_folders_are_normalised(given: str, normalised: str | None) -> None:
    assert patch_episode({"folder": given})[1].folder == normalised


@pytest.mark.parametrize(
    "folder", ["/./a", "/a/..", "a,b", "/a/ /b", "/a\x00", "/\x85", "a" * 256, "/".join(["a"] * 33)]
)
def test_what_is_no_folder_is_told(folder: str) -> None:
    assert "Field 'folder' must be a path of at most 32 segments" in refused(patch_episode, {"folder": folder})


def test_metadata_may_nest_500_levels() -> None:
    def nested(levels: int) -> Any:
        value: Any = {}
        for _ in range(levels - 1):
            value = {"a": value}
        return value

    assert patch_episode({"metadata": nested(500)})[1].metadata is not UNSET
    assert patch_episode({"metadata": {"wide": [[] for _ in range(600)]}})[1].metadata is not UNSET
    for levels in (501, 100_000):
        said = refused(patch_episode, {"metadata": nested(levels)})
        assert said == "Field 'metadata' must not nest deeper than 500 levels"


# --- B


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        ({}, "Field 'tenant_id' is required"),
        ({"tenant_id": None}, "Field 'tenant_id' is required"),
        ({"tenant_id": 1}, f"Field 'tenant_id' {LABEL}"),
        ({"tenant_id": " "}, f"Field 'tenant_id' {LABEL}"),
        ({"tenant_id": "a" * 256}, f"Field 'tenant_id' {LABEL}"),
        ({"tenant_id": "a\n"}, f"Field 'tenant_id' {LABEL}"),
        ({"tenant_id": "t", "namespace": 1}, "Field 'namespace' must be a string of at most 255 characters"),
        ({"tenant_id": "t", "namespace": "a" * 256}, "Field 'namespace' must be a string of at most 255 characters"),
        ({"tenant_id": "t"}, "Field 'episodes' is required"),
        ({"tenant_id": "t", "episodes": None}, "Field 'episodes' is required"),
        ({"tenant_id": "t", "episodes": {}}, "Field 'episodes' must be a list of 1 to 1000 objects"),
        ({"tenant_id": "t", "episodes": []}, "Field 'episodes' must be a list of 1 to 1000 objects"),
        ({"tenant_id": "t", "episodes": [{}] * 1001}, "Field 'episodes' must be a list of 1 to 1000 objects"),
    ],
)
def test_an_envelope_that_is_wrong_is_400(envelope: Any, message: str) -> None:
    assert refused(lambda body: record_episodes(body, WordListExtractor()), envelope) == message


def test_an_item_has_defaults() -> None:
    [item] = batch({"content": "x", "unknown": 1}).items
    assert (item.type, item.source, item.author, item.channel) == ("message", None, None, None)
    assert (item.timestamp, item.metadata, item.entities, item.idempotency_key) == (UNSET, Raw(b"{}"), (), None)
    nulls = dict.fromkeys(
        ("type", "source", "author", "channel", "timestamp", "metadata", "entities", "idempotency_key")
    )
    assert batch({"content": "x", **nulls}).items == (item,)


def test_an_item_says_everything() -> None:
    given = {
        "content": "x",
        "type": "decision_2-b",
        "source": "",
        "author": "a" * 255,
        "channel": "日",
        "timestamp": "2026-03-15T09:00:00Z",
        "metadata": {"a": 2**70},
        "entities": [{"name": " CockroachDB", "type": "technology"}, {"name": "cockroachdb ", "type": "technology"}],
        "idempotency_key": "k",
    }
    [item] = batch(given).items
    assert (item.type, item.source, item.author, item.channel) == ("decision_2-b", "", "a" * 255, "日")
    assert item.timestamp == datetime(2026, 3, 15, 9, tzinfo=UTC)
    assert item.metadata == Raw(b'{"a":1180591620717411303424}')
    assert [entity.name for entity in item.entities] == [" CockroachDB"]
    assert item.idempotency_key == "k"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (None, "An episode must be an object"),
        ([], "An episode must be an object"),
        ("x", "An episode must be an object"),
        ({}, "Field 'content' is required"),
        ({"content": None}, "Field 'content' is required"),
        ({"content": ""}, "Field 'content' is required"),
        ({"content": " \n\u3000"}, "Field 'content' is required"),
        ({"content": 1}, "Field 'content' must be a string"),
        ({"content": ["x"]}, "Field 'content' must be a string"),
    ],
)
def test_what_is_no_item_is_told(item: Any, message: str) -> None:
    assert item_error(item) == ItemError(1, "validation_error", message)


ENTITY = {"name": "x", "type": "t"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *each("type", TYPE, "", "A", "a b", "a" * 65, 1, "ä", "a\n"),
        *each("source", "Field 'source' must be a string of at most 255 characters", 1, [], "a" * 256),
        *each("author", "Field 'author' must be a string of at most 255 characters", 1, [], "a" * 256),
        *each("channel", "Field 'channel' must be a string of at most 255 characters", 1, [], "a" * 256),
        *each("timestamp", TIMESTAMP, 1, "", "now", "2026-13-01", "2026-02-30T00:00Z", "2026-03-15X09:00"),
        *each("timestamp", TIMESTAMP, "20260315", "2026-W11-1", "2026-03-15T09:00Z ", "\u0662026-03-15"),
        *each("timestamp", TIMESTAMP, "2026-03-15T24:01Z", "0001-01-01T00:00+14:00"),
        *each("metadata", "Field 'metadata' must be an object", [], "x", 1),
        *each("entities", ENTITIES, {}, "x", [1], [{}], [{"name": "x"}], [ENTITY | {"name": ""}], [ENTITY] * 51),
        *each("entities", ENTITIES, [ENTITY | {"type": 1}], [ENTITY | {"name": "a" * 256}]),
        *each("idempotency_key", KEY, 1, "", "a b", "ü", "a" * 256),
    ],
)
def test_what_is_wrong_with_an_item_is_told_by_field(field: str, value: Any, message: str) -> None:
    assert item_error({"content": "x", field: value}) == ItemError(1, "validation_error", message)


def test_content_is_measured_in_bytes() -> None:
    for fits in ("x" * MAX_CONTENT_BYTES, "ü" * (MAX_CONTENT_BYTES // 2)):
        assert batch({"content": fits}).items[0].content == fits
    for too_much in ("x" * (MAX_CONTENT_BYTES + 1), "ü" * (MAX_CONTENT_BYTES // 2 + 1)):
        error = item_error({"content": too_much})
        assert error.code == "payload_too_large"
        assert error.message == "Field 'content' must be at most 102400 bytes of UTF-8"


def test_an_item_has_one_error_the_first_in_the_documents_order() -> None:
    wrong = dict.fromkeys(
        ("idempotency_key", "entities", "metadata", "timestamp", "channel", "author", "source", "content", "type"), 0
    )
    right = {"type": "message", "content": "x"}
    for field in ("type", "content", "source", "author", "channel", "timestamp", "metadata", "entities"):
        assert f"'{field}'" in item_error(wrong).message
        wrong[field] = right.get(field)  # type: ignore[assignment]
    assert "'idempotency_key'" in item_error(wrong).message


def test_errors_have_the_index_in_the_request() -> None:
    recorded = batch({}, {"content": "a"}, {}, {"content": "b"}, None)
    assert [item.content for item in recorded.items] == ["a", "b"]
    assert [error.index for error in recorded.errors] == [0, 2, 4]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-03-15T09:00:00Z", datetime(2026, 3, 15, 9, tzinfo=UTC)),
        ("2026-03-15T09:00:00.123456789Z", datetime(2026, 3, 15, 9, 0, 0, 123_000, tzinfo=UTC)),
        ("2026-03-15T09:00:00,9999Z", datetime(2026, 3, 15, 9, 0, 0, 999_000, tzinfo=UTC)),
        ("2026-03-15t11:00+02:00", datetime(2026, 3, 15, 9, tzinfo=UTC)),
        ("2026-03-15 09:00:00", datetime(2026, 3, 15, 9, tzinfo=UTC)),
        ("2026-03-15T04:00:00-0500", datetime(2026, 3, 15, 9, tzinfo=UTC)),
        ("2026-03-15", datetime(2026, 3, 15, tzinfo=UTC)),
    ],
)
def test_timestamps_become_utc_in_milliseconds(text: str, at: datetime) -> None:
    assert batch({"content": "x", "timestamp": text}).items[0].timestamp == at
