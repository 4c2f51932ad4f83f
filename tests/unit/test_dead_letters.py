"""What the dead-letters topic says of its letters: marks in the order of the partition, and nothing else, decide."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from shared.codec import encode_command
from shared.commands import CORRELATION_ID, DEAD_LETTER, REPLY_PARTITION
from shared.deadletters.letters import (
    MARK,
    Claimed,
    Dropped,
    Letter,
    LetterRefused,
    Letters,
    Mark,
    Replayed,
    body_of,
    original_headers,
    printable,
)
from tests.builders import upsert

COMMAND = encode_command(upsert("run-1"))


@dataclass
class ARecord:
    """A record as Kafka gives it."""

    offset: int
    value: bytes | None = b"{broken"
    key: bytes | None = b"namespace:alice"
    headers: Sequence[tuple[str, bytes]] = ()
    timestamp: int = 1_790_000_000_000


def parked(offset: int, source_offset: int = 70, **named: object) -> ARecord:
    headers = [
        ("source-topic", b"episodes.commands"),
        ("source-partition", b"2"),
        ("source-offset", str(source_offset).encode()),
        ("reason", b"not a command"),
        (f"original-{CORRELATION_ID}", b"c-1"),
        (f"original-{REPLY_PARTITION}", b"5"),
    ]
    return ARecord(offset, headers=headers, **named)  # type: ignore[arg-type]


@dataclass
class Topic:
    """A partition that is written as it is read."""

    letters: Letters = field(default_factory=lambda: Letters(2))
    end: int = 0

    def put(self, record: ARecord) -> int:
        record.offset, self.end = self.end, self.end + 1
        self.letters.take(record)
        return record.offset

    def mark(self, mark: Mark) -> int:
        return self.put(ARecord(0, msgspec.json.encode(mark), None, [(MARK, b"x")]))

    def claim(self, letter: Letter, run: str, after: int | None = None, commands: tuple[int, ...] = (0, 0)) -> int:
        return self.mark(Claimed(letter.origin, run, f"{run} on a machine", after, commands))

    @property
    def letter(self) -> Letter:
        [letter] = self.letters
        return letter


@pytest.fixture
def topic() -> Topic:
    made = Topic(end=17)
    made.put(parked(0))
    return made


def test_a_parked_command_is_a_letter_that_waits(topic: Topic) -> None:
    letter = topic.letter
    assert (letter.id, letter.source_partition, letter.source_offset) == ("2/17", 2, 70)
    assert (letter.reason, letter.size, letter.state) == ("not a command", 7, "waiting")
    assert topic.letters.at(17) is letter


def test_a_command_that_was_parked_twice_is_one_letter(topic: Topic) -> None:
    topic.put(parked(0))
    assert topic.letter.copies == 2
    assert topic.letters.at(18) is topic.letters.at(17)


def test_another_command_at_the_same_place_is_another_letter(topic: Topic) -> None:
    """The commands topic may have been made anew."""
    topic.put(parked(0, value=b"{other"))
    topic.put(parked(0, key=b"other"))
    topic.put(parked(0, key=None))
    topic.put(parked(0, value=None))
    assert len({letter.origin for letter in topic.letters}) == 5


def test_what_is_neither_a_letter_nor_a_mark_is_listed(topic: Topic) -> None:
    topic.put(ARecord(0))
    topic.put(ARecord(0, headers=[("source-partition", b"x"), ("source-offset", b"1"), ("reason", b"")]))
    topic.put(ARecord(0, b"{}", headers=[(MARK, b"x")]))
    topic.put(ARecord(0, None, headers=[(MARK, b"x")]))
    assert topic.letters.foreign == [18, 19, 20, 21]
    with pytest.raises(LetterRefused, match="2/18 is no dead letter"):
        topic.letters.at(18)


def test_of_two_claims_the_first_holds(topic: Topic) -> None:
    topic.claim(topic.letter, "one", commands=(3, 4))
    topic.claim(topic.letter, "two", commands=(5, 6))
    claim = topic.letter.claim
    assert claim is not None
    assert (claim.run, claim.taken_over, topic.letter.search_from) == ("one", False, (3, 4))
    assert topic.letter.state == "claimed"


def test_a_claim_is_taken_over_by_who_names_it_and_by_one_only(topic: Topic) -> None:
    first = topic.claim(topic.letter, "one", commands=(3, 4))
    topic.claim(topic.letter, "two", after=first, commands=(5, 6))
    topic.claim(topic.letter, "three", after=first, commands=(7, 8))
    claim = topic.letter.claim
    assert claim is not None
    assert (claim.run, claim.taken_over) == ("two", True)
    assert topic.letter.search_from == (3, 4), "a copy may have been put in ever since the first claim"


def test_a_claim_on_what_is_done_does_not_count(topic: Topic) -> None:
    first = topic.claim(topic.letter, "one")
    topic.mark(Replayed(topic.letter.origin, "one", 1, 99))
    topic.claim(topic.letter, "two", after=first)
    assert topic.letter.claim is not None
    assert topic.letter.claim.run == "one"
    assert topic.letter.state == "replayed to 1/99"


def test_only_who_holds_the_claim_drops(topic: Topic) -> None:
    topic.mark(Dropped(topic.letter.origin, "one"))
    assert topic.letter.state == "waiting"
    first = topic.claim(topic.letter, "one")
    topic.mark(Dropped(topic.letter.origin, "two"))
    assert topic.letter.state == "claimed"
    topic.claim(topic.letter, "two", after=first)
    topic.mark(Dropped(topic.letter.origin, "one"))
    assert topic.letter.state == "claimed"
    topic.mark(Dropped(topic.letter.origin, "two"))
    assert topic.letter.state == "dropped"


def test_that_a_command_is_in_counts_whoever_says_so(topic: Topic) -> None:
    """A run that was taken for dead and was not: what it did is a fact."""
    first = topic.claim(topic.letter, "one")
    topic.claim(topic.letter, "two", after=first)
    topic.mark(Dropped(topic.letter.origin, "two"))
    topic.mark(Replayed(topic.letter.origin, "one", 1, 99))
    assert topic.letter.state == "replayed to 1/99"
    topic.mark(Dropped(topic.letter.origin, "two"))
    topic.mark(Replayed(topic.letter.origin, "three", 1, 100))
    assert topic.letter.state == "replayed to 1/99"


def test_a_mark_whose_letter_has_expired_is_nothing(topic: Topic) -> None:
    topic.mark(Dropped("0/0/gone", "one"))
    assert topic.letter.state == "waiting"
    assert topic.letters.foreign == []


def test_a_mark_of_one_letter_does_not_touch_another(topic: Topic) -> None:
    topic.put(parked(0, source_offset=71))
    one, two = topic.letters
    topic.claim(one, "one")
    topic.mark(Dropped(two.origin, "one"))
    assert (one.state, two.state) == ("claimed", "waiting")


def test_a_command_goes_back_with_its_headers_but_nobody_to_answer(topic: Topic) -> None:
    record = parked(17, value=COMMAND)
    body = body_of(topic.letter, record)
    assert (body.key, body.value) == (b"namespace:alice", COMMAND)
    assert body.headers == ((CORRELATION_ID, b"c-1"), (DEAD_LETTER, topic.letter.origin.encode()))
    assert original_headers(record) == [(CORRELATION_ID, b"c-1"), (REPLY_PARTITION, b"5")]


def test_a_command_that_was_put_back_and_parked_again_names_the_new_letter_only(topic: Topic) -> None:
    record = parked(17, value=COMMAND)
    record.headers = [*record.headers, (f"original-{DEAD_LETTER}", b"0/0/older")]
    names = [name for name, _ in body_of(topic.letter, record).headers]
    assert names == [CORRELATION_ID, DEAD_LETTER]


def test_what_would_only_be_parked_again_is_refused(topic: Topic) -> None:
    with pytest.raises(LetterRefused, match="2/17 still cannot be read: not a command"):
        body_of(topic.letter, parked(17))
    with pytest.raises(LetterRefused, match="has the key namespace:mallory, which is not its command's stream"):
        body_of(topic.letter, parked(17, value=COMMAND, key=b"namespace:mallory"))
    with pytest.raises(LetterRefused, match="has no value"):
        body_of(topic.letter, parked(17, value=None), as_is=True)
    with pytest.raises(LetterRefused, match="still cannot be read"):
        body_of(topic.letter, parked(17), corrected=b"{worse")


def test_as_is_asks_nothing(topic: Topic) -> None:
    body = body_of(topic.letter, parked(17, key=None), as_is=True)
    assert (body.key, body.value) == (None, b"{broken")


def test_a_corrected_command_goes_to_the_stream_that_it_names(topic: Topic) -> None:
    body = body_of(topic.letter, parked(17, key=b"junk"), corrected=COMMAND)
    assert (body.key, body.value) == (b"namespace:alice", COMMAND)
    body = body_of(topic.letter, parked(17, key=b"junk"), corrected=b"{worse", as_is=True)
    assert (body.key, body.value) == (b"junk", b"{worse")


def test_nothing_in_a_letter_controls_the_terminal() -> None:
    assert printable(b"a\x1b[2J\x9b\xff\r\nb\xc3\xa9") == "a\\x1b[2J\\x9b\\xff\\r\nbé"
    assert printable(None) == ""
