"""Content hashes: the same for the same documents in any order, another one for anything else."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
from bson import Int64
from hypothesis import given
from hypothesis import strategies as st

from projector.digests import Content, digest, digest_of, read_digests, write_digest
from projector.views import INDEXES

DOCUMENTS = st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)), max_size=8)


def content_of(documents: list[dict[str, Any]]) -> Content:
    content = Content()
    for document in documents:
        content.add(digest_of(document))
    return content


@given(DOCUMENTS, st.randoms())
def test_the_content_hash_does_not_depend_on_the_order(documents: list[dict[str, Any]], random: Any) -> None:
    shuffled = [*documents]
    random.shuffle(shuffled)
    assert content_of(documents) == content_of(shuffled)


@given(DOCUMENTS, DOCUMENTS)
def test_contents_can_be_put_together(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    merged = content_of(first)
    merged.merge(content_of(second))
    assert merged == content_of(first + second)
    assert merged.documents == len(first) + len(second)


@given(DOCUMENTS, DOCUMENTS)
def test_other_documents_have_another_hash(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    same = sorted(map(bson.encode, first)) == sorted(map(bson.encode, second))
    assert (content_of(first) == content_of(second)) == same


def test_a_document_twice_is_not_the_same_as_none() -> None:
    assert content_of([{"a": 1}] * 2) != content_of([])
    assert content_of([{"a": 1}, {"b": 1}]) != content_of([{"a": 1}, {"a": 1}])


def test_types_and_the_order_of_fields_count() -> None:
    variants: list[dict[str, Any]] = [
        {"a": 1, "b": 2},
        {"b": 2, "a": 1},
        {"a": 1.0, "b": 2},
        {"a": Int64(1), "b": 2},
        {"a": True, "b": 2},
    ]
    assert len({digest_of(variant) for variant in variants}) == len(variants)


def test_a_digest_is_that_of_what_is_stored() -> None:
    document = {"_id": "ä", "at": datetime(2026, 3, 1, tzinfo=UTC), "tags": ["x", None, {"y": 1.5}]}
    assert digest_of(document) == digest(bson.encode(document))
    assert len(digest_of(document)) == 16


def test_what_is_noted_is_read_again(tmp_path: Path) -> None:
    noted = [
        (collection, key, digest_of({"_id": key}))
        for collection in INDEXES
        for key in ("", "tenant/ent_1", "\N{SNOWMAN}\x00", "x" * 70_000)
    ]
    with (tmp_path / "noted").open("wb") as file:
        for each in noted:
            write_digest(file, *each)
    assert [*read_digests(tmp_path / "noted")] == noted
