"""Values that JSON allows and databases choke on: each is stored as given or refused, and the stream goes on."""

from http import HTTPStatus
from typing import Any

import pytest

from tests.e2e.client import Project, Tenant, body_of

pytest_plugins = ["tests.e2e.contract_fixtures"]


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


KEPT: dict[str, Any] = {
    "operators": {"$set": {"$inc": 1}, "$where": "x", "$literal": "$name"},
    "dots": {"a.b": 1, "a..b": {".": 2}},
    "empty key": {"": 1},
    "ids": {"_id": "mine", "id": 7, "ordinal": 3, "__proto__": {}},
    "numbers": {"int": 2**53, "negative": -(2**63), "big": 2**63 - 1, "float": 1e300, "small": 5e-324, "zero": 0.1},
    "texts": {"nul": "a\x00b", "line": "\u2028", "astral": "🦾", "long": "x" * 100_000, "dollar": "$name"},
    "many keys": {f"key-{number}": number for number in range(2_000)},
    "a date that is a text": {"$date": "2026-03-15T09:00:00Z", "at": "2026-03-15T09:00:00Z"},
    "nothing": {"list": [], "object": {}, "null": None, "false": False, "text": ""},
}

# Where a store has limits of its own, a clear refusal is as good.
KEPT_OR_REFUSED = {
    "a NUL in a key": b'{"a\\u0000b": 1}',
    "an integer of 65 bits": b'{"a": 18446744073709551616}',
    "an unsigned integer of 64 bits": b'{"a": 18446744073709551615}',
    "an integer of 1000 digits": b'{"a": 1' + b"0" * 999 + b"}",
    "a float past all floats": b'{"a": 1e400}',
    "a lone surrogate": b'{"a": "\\ud800"}',
    "a lone surrogate in a key": b'{"\\ud800": 1}',
    "90 levels": nested(90),
    "120 levels": nested(120),
    "1,000 levels": nested(1_000),
    "100,000 levels": nested(100_000),
    "a list of two million numbers": b'{"a": [' + b"0," * 2_000_000 + b"0]}",
    "a hundred thousand keys": b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}",
}


@pytest.mark.parametrize("metadata", list(KEPT.values()), ids=list(KEPT))
async def test_metadata_of_a_project_episode_is_kept_as_given(project: Project, metadata: dict[str, Any]) -> None:
    assert (await project.given("run-042", metadata=metadata))["metadata"] == metadata
    assert (await project.seen("run-042"))["metadata"] == metadata
    body_of(await project.patch("run-042", metadata={"again": metadata}), HTTPStatus.OK)
    assert (await project.seen("run-042"))["metadata"] == {"again": metadata}


@pytest.mark.parametrize("metadata", list(KEPT.values()), ids=list(KEPT))
async def test_metadata_of_a_tenant_episode_is_kept_as_given(tenant: Tenant, metadata: dict[str, Any]) -> None:
    assert (await tenant.recorded(metadata=metadata))["metadata"] == metadata


@pytest.mark.parametrize("text", ["", " ", "\x00", "a\x00b", "\x1b[31m", "$name", "\ufeff", "\u202e", "🦾"], ids=ascii)
async def test_a_description_is_kept_as_given(project: Project, text: str) -> None:
    await project.given("run-042", description=text, tags=[text])
    seen = await project.seen("run-042")
    assert (seen["description"], seen["tags"]) == (text, [text])


@pytest.mark.parametrize("metadata", list(KEPT_OR_REFUSED.values()), ids=list(KEPT_OR_REFUSED))
async def test_unusual_metadata_never_stops_a_namespace(project: Project, metadata: bytes) -> None:
    response = await project.post(
        content=b'{"name": "run-042", "metadata": ' + metadata + b"}",
        headers={"Content-Type": "application/json"},
    )
    if response.is_success:
        body_of(response, HTTPStatus.CREATED)
        assert (await project.seen("run-042"))["metadata"] == response.json()["episode"]["metadata"]
    else:
        assert response.status_code in {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}, response.text[
            :500
        ]
    await project.given("the next")
    assert "the next" in await project.names()


@pytest.mark.parametrize("metadata", list(KEPT_OR_REFUSED.values()), ids=list(KEPT_OR_REFUSED))
async def test_unusual_metadata_never_stops_a_tenant(tenant: Tenant, metadata: bytes) -> None:
    envelope = b'{"tenant_id": "%b", "episodes": [{"content": "Unusual.", "metadata": ' % tenant.tenant_id.encode()
    response = await tenant.post(content=envelope + metadata + b"}]}", headers={"Content-Type": "application/json"})
    if response.is_success:
        answer = body_of(response, HTTPStatus.CREATED)
        assert answer["count"] + len(answer["errors"]) == 1
        for episode_id in answer["episode_ids"]:
            assert (await tenant.seen(episode_id))["content"] == "Unusual."
    else:
        assert response.status_code in {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}, response.text[
            :500
        ]
    assert (await tenant.recorded(content="The next."))["content"] == "The next."


@pytest.mark.parametrize("text", [b"\\ud800", b"\\udc00x", b"\\ud83e"])
async def test_text_that_is_no_text_never_stops_a_stream(project: Project, tenant: Tenant, text: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (
        b'{"name": "run-' + text + b'"}',
        b'{"name": "run", "description": "' + text + b'"}',
        b'{"name": "run", "tags": ["' + text + b'"]}',
        b'{"name": "run", "folder": "/' + text + b'"}',
    ):
        response = await project.post(content=body, headers=headers)
        assert response.status_code == HTTPStatus.BAD_REQUEST, response.text
    envelope = b'{"tenant_id": "%b", "episodes": [{"content": "' % tenant.tenant_id.encode()
    response = await tenant.post(content=envelope + text + b'"}]}', headers=headers)
    assert response.status_code in {HTTPStatus.BAD_REQUEST, HTTPStatus.CREATED}
    if response.is_success:
        assert response.json()["count"] == 0
    await project.given("the next")
    assert await project.names() == ["the next"]
    assert (await tenant.recorded(content="The next."))["event_id"] == 1
