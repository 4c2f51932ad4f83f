"""What the dead-letters topic says: the commands parked in it, and the marks that say what became of them. Pure.

Nothing is ever taken out of the topic. What is done about a letter is a mark: a record appended to the letter's own
partition, whose order decides between rivals.

=========  ============================================================================================================
mark       counts
=========  ============================================================================================================
Claimed    if nothing is done yet and ``after`` names the claim that holds at that point: a compare-and-set
Replayed   always: it tells where in ``episodes.commands`` the command is now
Dropped    if nothing is done yet and its run holds the claim
=========  ============================================================================================================

An ingestor that dies while it parks a command parks it again: both copies are one letter, named by the first. What
letters are told apart by is their `Letter.origin`.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Protocol

import msgspec
from msgspec import Struct

from shared.codec import decode_command
from shared.commands import DEAD_LETTER, REPLY_PARTITION
from shared.errors import EpisodesError, PoisonRecord

MARK = "mark"
"""Header that tells marks from parked commands."""
_ORIGINAL = "original-"


class LetterRefused(EpisodesError):
    """What was asked for cannot be done with this letter. Nothing was changed."""


class Record(Protocol):
    """A Kafka record, as far as it matters here."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


class Claimed(Struct, frozen=True, tag="claimed"):
    """A run is about to put the letter back, or to drop it."""

    letter: str
    run: str
    by: str
    """For people: who runs it."""
    after: int | None
    """Offset of the claim that it takes over, because its run seems to be dead."""
    commands: tuple[int, ...]
    """For each partition of ``episodes.commands`` its end before the claim: a copy put in under it comes later."""


class Replayed(Struct, frozen=True, tag="replayed"):
    """The command stands in ``episodes.commands`` again."""

    letter: str
    run: str
    partition: int
    offset: int


class Dropped(Struct, frozen=True, tag="dropped"):
    """Somebody saw to it otherwise."""

    letter: str
    run: str


Mark = Claimed | Replayed | Dropped

_decode_mark: msgspec.json.Decoder[Mark] = msgspec.json.Decoder(Mark)


class Claim(Struct, frozen=True):
    """The claim that holds."""

    offset: int
    at: datetime
    run: str
    by: str
    taken_over: bool


class Done(Struct, frozen=True):
    """What became of a letter, and when."""

    at: datetime
    mark: Replayed | Dropped


class Letter(Struct, kw_only=True):
    """A parked command, without its value."""

    id: str
    """Partition and offset of its first copy in the dead letters: ``0/17``."""
    origin: str
    """Partition and offset in ``episodes.commands``, and a digest: the topic may be made anew."""
    offset: int
    parked_at: datetime
    source_partition: int
    source_offset: int
    reason: str
    size: int
    copies: int = 1
    claim: Claim | None = None
    search_from: tuple[int, ...] = ()
    """``commands`` of the first claim: no copy that was put in stands before that."""
    done: Done | None = None

    @property
    def state(self) -> str:
        """One word, and where the command is now."""
        if self.done is None:
            return "waiting" if self.claim is None else "claimed"
        mark = self.done.mark
        return f"replayed to {mark.partition}/{mark.offset}" if isinstance(mark, Replayed) else "dropped"


class Letters:
    """The letters of one partition, from its records in order."""

    def __init__(self, partition: int) -> None:
        self.foreign: list[int] = []
        """Offsets of records that are neither parked commands nor marks."""
        self._partition = partition
        self._letters: dict[str, Letter] = {}
        self._origins: dict[int, str] = {}

    def __iter__(self) -> Iterator[Letter]:
        return iter(self._letters.values())

    def at(self, offset: int) -> Letter:
        """The letter of which a copy is at ``offset``.

        Raises:
            LetterRefused: there is none.
        """
        origin = self._origins.get(offset)
        if origin is None:
            raise LetterRefused(f"{self._partition}/{offset} is no dead letter")
        return self._letters[origin]

    def take(self, record: Record) -> None:
        """Take the next record of the partition."""
        headers, at = dict(record.headers), datetime.fromtimestamp(record.timestamp / 1000, UTC)
        try:
            if MARK in headers:
                self._take_mark(_decode_mark.decode(record.value or b""), record.offset, at)
            else:
                self._take_letter(record, headers, at)
        except (KeyError, ValueError):  # msgspec's errors are ValueErrors
            self.foreign.append(record.offset)

    def _take_letter(self, record: Record, headers: dict[str, bytes], at: datetime) -> None:
        partition, offset = int(headers["source-partition"]), int(headers["source-offset"])
        content = msgspec.msgpack.encode((record.key, record.value))
        origin = f"{partition}/{offset}/{blake2b(content, digest_size=6).hexdigest()}"
        self._origins[record.offset] = origin
        if origin in self._letters:
            self._letters[origin].copies += 1
            return
        self._letters[origin] = Letter(
            id=f"{self._partition}/{record.offset}",
            origin=origin,
            offset=record.offset,
            parked_at=at,
            source_partition=partition,
            source_offset=offset,
            reason=headers["reason"].decode(errors="replace"),
            size=len(record.value or b""),
        )

    def _take_mark(self, mark: Mark, offset: int, at: datetime) -> None:
        letter = self._letters.get(mark.letter)
        if letter is None:
            return  # the letter has expired
        if isinstance(mark, Claimed):
            if letter.done is None and mark.after == (letter.claim.offset if letter.claim else None):
                letter.search_from = letter.search_from if letter.claim else mark.commands
                letter.claim = Claim(offset, at, mark.run, mark.by, taken_over=letter.claim is not None)
        elif isinstance(mark, Replayed):
            if letter.done is None or isinstance(letter.done.mark, Dropped):
                letter.done = Done(at, mark)
        elif letter.done is None and letter.claim is not None and letter.claim.run == mark.run:
            letter.done = Done(at, mark)


class Body(Struct, frozen=True):
    """What is to be put into ``episodes.commands``."""

    key: bytes | None
    value: bytes
    headers: tuple[tuple[str, bytes], ...]


def body_of(letter: Letter, record: Record, *, as_is: bool = False, corrected: bytes | None = None) -> Body:
    """The letter's command with its original headers, but for where to reply to: nobody waits for it any more.

    Args:
        letter: the letter.
        record: one of its copies.
        as_is: do not ask whether it can be read now.
        corrected: the value to put in instead; it goes to the stream that it names.

    Raises:
        LetterRefused: it would only be parked again.
    """
    key, value = record.key, record.value if corrected is None else corrected
    if value is None:
        raise LetterRefused(f"{letter.id} has no value: give it one with --file, or drop it")
    if not as_is:
        try:
            stream = decode_command(value).stream.encode()
        except PoisonRecord as error:
            raise LetterRefused(
                f"{letter.id} still cannot be read: {error}. Correct it with --file, upgrade, or insist with --as-is"
            ) from error
        if corrected is not None:
            key = stream
        elif key != stream:
            raise LetterRefused(
                f"{letter.id} has the key {printable(key)}, which is not its command's stream: "
                "it would be parked again. Put in what is right with --file"
            )
    kept = [(name, text) for name, text in original_headers(record) if name not in {REPLY_PARTITION, DEAD_LETTER}]
    return Body(key, value, (*kept, (DEAD_LETTER, letter.origin.encode())))


def original_headers(record: Record) -> list[tuple[str, bytes]]:
    """The headers that the command had."""
    return [(name.removeprefix(_ORIGINAL), value) for name, value in record.headers if name.startswith(_ORIGINAL)]


def printable(raw: bytes | None) -> str:
    """Bytes of unknown origin for a terminal: nothing in them can control it."""
    text = "" if raw is None else raw.decode(errors="backslashreplace")
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
