"""Putting a parked command back into ``episodes.commands``, exactly once.

1. **Claim.** Append a `Claimed` mark, read the partition up to it, and go on only if it is the claim that holds. Of two
   runs at once, one does.
2. **Look**, if the claim took over one whose run seems to be dead: is there a copy in ``episodes.commands``? Every copy
   names its letter in the header ``dead-letter`` and comes after the ends that the first claim wrote down.
3. **Put back**, if there is none.
4. **Mark** as `Replayed`, with the place.

A run that dies after 1 leaves a claim; the next one takes it over once it is `DeadLetterSettings.claim_seconds` old.
If it died after 3, step 2 finds the copy. One gap is left: a run that is *frozen* between 1 and 3 for longer than that,
and goes on after another one has looked. So it looks at the clock before 3, and, because no clock can close the gap,
the ingestor judges a command that was put back under the letter's origin as its Idempotency-Key, unless it has its own:
a second copy gets the first one's receipt and makes no event.
"""

import asyncio
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from msgspec import Struct
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.commands import DEAD_LETTER
from shared.deadletters.letters import (
    MARK,
    Body,
    Claimed,
    Dropped,
    Letter,
    LetterRefused,
    Letters,
    Mark,
    Record,
    Replayed,
    body_of,
)
from shared.errors import Unavailable
from shared.kafka import describe_topic, ends, open_partition, open_producer, read_to, starts, translated
from shared.settings import COMMANDS, DEAD_LETTERS, KafkaSettings, Settings

_ACK_SECONDS = 10.0
_BATCH_BYTES = 32 * 1024 * 1024


class DeadLetterSettings(Settings):
    """Names in the environment begin with ``DEAD_LETTERS_``."""

    model_config = SettingsConfigDict(env_prefix="DEAD_LETTERS_")

    claim_seconds: float = Field(default=60, gt=0)
    """For how long a run that says nothing more is not taken for dead."""


class CopyUnknownError(LetterRefused):
    """Commands are gone among which a copy may have been."""


class Result(Struct, frozen=True):
    """What came of a letter. ``partition`` and ``offset`` are those of the command, where it is in again."""

    id: str
    outcome: Literal["replayed", "dropped", "busy"]
    detail: str
    now: bool = False
    """Whether this run did it; else it was done before."""
    partition: int | None = None
    offset: int | None = None


@dataclass
class Shelf:
    """One partition of the dead letters, read up to an end that moves on."""

    consumer: AIOKafkaConsumer
    partition: int
    letters: Letters
    read_until: int

    async def catch_up(self) -> None:
        """Read what has come since."""
        end = (await ends(self.consumer, DEAD_LETTERS, [self.partition]))[self.partition]
        async for records in read_to(self.consumer, DEAD_LETTERS, self.partition, self.read_until, end):
            for record in records:
                self.letters.take(record)
        self.read_until = max(self.read_until, end)

    async def record(self, letter: Letter) -> Record:
        """The letter's first copy, with its value."""
        read = read_to(self.consumer, DEAD_LETTERS, self.partition, letter.offset, letter.offset + 1)
        found: list[Record] = [record async for records in read for record in records]
        return found[0]


@dataclass
class Run:
    """One run over letters of one partition. The steps are public: a test may die between them."""

    kafka: KafkaSettings
    producer: AIOKafkaProducer
    shelf: Shelf
    claim_seconds: float
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _claimed_at: float = 0.0

    async def replay(self, offset: int, *, as_is: bool = False, corrected: bytes | None = None) -> Result:
        """Put the letter's command back, unless that was done before.

        Raises:
            LetterRefused: it would only be parked again; or whether it was put back cannot be known any more.
            RecordsLost: the letter has expired.
            Unavailable: Kafka does not answer. The command may be in again: the next run finds out.
        """
        letter = self.shelf.letters.at(offset)
        if letter.done is None:
            body = body_of(letter, await self.shelf.record(letter), as_is=as_is, corrected=corrected)
            if await self.claim(letter):
                place = await self.find_copy(letter)
                found = place is not None
                place = place or await self.put_back(body)
                await self.mark(Replayed(letter.origin, self.id, *place))
                how = "put back by an earlier run that died" if found else "put back"
                detail = f"{how}, as {COMMANDS} {place[0]}/{place[1]}"
                return Result(letter.id, "replayed", detail, now=True, partition=place[0], offset=place[1])
        return _without_us(letter)

    async def drop(self, offset: int) -> Result:
        """Mark the letter as dealt with, unless it was put back.

        Raises:
            LetterRefused: there is no such letter.
            Unavailable: Kafka does not answer.
        """
        letter = self.shelf.letters.at(offset)
        if letter.done is None and await self.claim(letter):
            try:
                place = await self.find_copy(letter)
            except CopyUnknownError:
                place = None
            if place is None:
                await self.mark(Dropped(letter.origin, self.id))
                return Result(letter.id, "dropped", "dropped", now=True)
            await self.mark(Replayed(letter.origin, self.id, *place))
        return _without_us(letter)

    async def claim(self, letter: Letter) -> bool:
        """Step 1. Whether the letter is ours now."""
        held = letter.claim
        if held is not None and self.now() - held.at < timedelta(seconds=self.claim_seconds):
            return False
        self._claimed_at = time.monotonic()
        _, partitions = await describe_topic(self.kafka, COMMANDS)
        async with open_partition(self.kafka, COMMANDS, 0) as commands:
            found = await ends(commands, COMMANDS, range(partitions))
        by = f"process {os.getpid()} on {socket.gethostname()}"
        after = held.offset if held else None
        await self.mark(
            Claimed(letter.origin, self.id, by, after, tuple(found[number] for number in range(partitions)))
        )
        return letter.done is None and letter.claim is not None and letter.claim.run == self.id

    async def find_copy(self, letter: Letter) -> tuple[int, int] | None:
        """Step 2. Partition and offset of the copy that a run which died has put in, if it has.

        Raises:
            CopyUnknownError: commands since its claim have expired.
        """
        if letter.claim is None or not letter.claim.taken_over:
            return None
        wanted = (DEAD_LETTER, letter.origin.encode())
        for partition, start in enumerate(letter.search_from):
            async with open_partition(self.kafka, COMMANDS, partition) as commands:
                first = (await starts(commands, COMMANDS, [partition]))[partition]
                end = (await ends(commands, COMMANDS, [partition]))[partition]
                if not first <= start <= end:
                    raise CopyUnknownError(
                        f"{letter.id} was claimed by a run that died, and {COMMANDS}/{partition} no longer has all "
                        "commands since: whether it was put back cannot be known. Look for what it asked for in the "
                        "read models; then drop the letter, and ask for it anew if it is missing"
                    )
                async for records in read_to(commands, COMMANDS, partition, start, end):
                    for record in records:
                        if wanted in record.headers:
                            return partition, int(record.offset)
        return None

    async def put_back(self, body: Body) -> tuple[int, int]:
        """Step 3. Partition and offset of the command."""
        if time.monotonic() - self._claimed_at > self.claim_seconds / 2:
            raise Unavailable("this took so long that another run may have taken over: nothing was put back, run again")
        with translated(f"putting a command back into {COMMANDS}"):
            async with asyncio.timeout(_ACK_SECONDS):
                appended = await self.producer.send_and_wait(
                    COMMANDS, key=body.key, value=body.value, headers=list(body.headers)
                )
        return int(appended.partition), int(appended.offset)

    async def mark(self, mark: Mark) -> None:
        """Append the mark, and read up to it at least."""
        with translated(f"marking a letter in {DEAD_LETTERS}"):
            async with asyncio.timeout(_ACK_SECONDS):
                await self.producer.send_and_wait(
                    DEAD_LETTERS,
                    value=msgspec.json.encode(mark),
                    headers=[(MARK, type(mark).__name__.encode())],
                    partition=self.shelf.partition,
                )
        await self.shelf.catch_up()


@asynccontextmanager
async def open_shelf(kafka: KafkaSettings, partition: int) -> AsyncIterator[Shelf]:
    """One partition of the dead letters, read up to its present end.

    Raises:
        LetterRefused: there is no such partition.
        Unavailable: Kafka does not answer.
    """
    _, partitions = await describe_topic(kafka, DEAD_LETTERS)
    if partition >= partitions:
        raise LetterRefused(f"{DEAD_LETTERS} has no partition {partition}")
    async with open_partition(kafka, DEAD_LETTERS, partition) as consumer:
        first = (await starts(consumer, DEAD_LETTERS, [partition]))[partition]
        shelf = Shelf(consumer, partition, Letters(partition), first)
        await shelf.catch_up()
        yield shelf


@asynccontextmanager
async def open_run(kafka: KafkaSettings, settings: DeadLetterSettings, partition: int) -> AsyncIterator[Run]:
    """A run over letters of one partition.

    Raises:
        LetterRefused: there is no such partition.
        Unavailable: Kafka does not answer.
    """
    async with open_producer(kafka, batch_bytes=_BATCH_BYTES) as producer, open_shelf(kafka, partition) as shelf:
        yield Run(kafka, producer, shelf, settings.claim_seconds)


def _without_us(letter: Letter) -> Result:
    if letter.done is not None:
        when = f"{letter.done.at:%Y-%m-%d %H:%M:%S} UTC"
        if isinstance(letter.done.mark, Dropped):
            return Result(letter.id, "dropped", f"was dropped before, at {when}")
        partition, offset = letter.done.mark.partition, letter.done.mark.offset
        detail = f"was put back before, at {when}, as {COMMANDS} {partition}/{offset}"
        return Result(letter.id, "replayed", detail, partition=partition, offset=offset)
    assert letter.claim is not None  # noqa: S101 - else we would have it
    detail = (
        f"another run has it, by {letter.claim.by} since {letter.claim.at:%H:%M:%S} UTC: if that one died, try later"
    )
    return Result(letter.id, "busy", detail)
