"""What the extractor finds, and that it finds no more than it may."""

import pytest

from gateway.entities import MAX_PER_ITEM, EntityFinder, Mention, WordListExtractor
from shared.ids import entity_id

TEXT = "Chose CockroachDB for the payments service. Ask @bob.smith or Grace Hopper, see https://Docs.Example.com:80/x."


def found(text: str) -> list[tuple[str, str]]:
    return [(mention.type, mention.name) for mention in WordListExtractor().mentions(text)]


def test_the_documents_example() -> None:
    assert found("Chose CockroachDB for the payments service.") == [
        ("technology", "CockroachDB"),
        ("service", "payments service"),
    ]


def test_everything_it_knows_in_the_order_of_the_text() -> None:
    assert found(TEXT) == [
        ("technology", "CockroachDB"),
        ("service", "payments service"),
        ("person", "bob.smith"),
        ("name", "Grace Hopper"),
        ("host", "docs.example.com"),
    ]


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("", []),
        ("nothing here at all", []),
        ("Monday", []),
        ("The Standup", []),
        ("The Great Migration", [("name", "Great Migration")]),
        ("the service and a team", []),
        ("search services, auth service", [("service", "auth service")]),
        ("platform team", [("team", "platform team")]),
        ("mail bob@example.com", []),
        ("Node.js and C++", [("technology", "Node.js")]),
        ("http://user:pw@host.org/", [("host", "host.org")]),
        ("service", []),
        (" team", []),
    ],
)
def test_small_texts(text: str, mentions: list[tuple[str, str]]) -> None:
    assert found(text) == mentions


def test_the_callers_own_come_first_and_each_thing_once() -> None:
    finder = EntityFinder(WordListExtractor(), "my-app", 1)
    entities = finder.entities([Mention("technology", "cockroachDB"), Mention("technology", "COCKROACHDB")], TEXT)
    assert [entity.name for entity in entities][:2] == ["cockroachDB", "payments service"]
    assert entities[0].id == entity_id("my-app", "technology", "CockroachDB")


def test_there_are_never_too_many() -> None:
    text = " and ".join(f"Alpha Beta{chr(65 + n % 26)}{chr(65 + n // 26)}" for n in range(100))
    assert len(EntityFinder(WordListExtractor(), "t", 1).entities([], text)) == MAX_PER_ITEM


def test_a_request_is_read_only_in_part() -> None:
    text = "x" * 150 + " Grace Hopper"
    assert EntityFinder(WordListExtractor(), "t", 1).entities([], text)
    assert not EntityFinder(WordListExtractor(), "t", 1_000).entities([], text)


def test_the_same_text_gives_the_same() -> None:
    assert len({EntityFinder(WordListExtractor(), "t", 1).entities([], TEXT) for _ in range(3)}) == 1
    assert WordListExtractor().version == "1"
