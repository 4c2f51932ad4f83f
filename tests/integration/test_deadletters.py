"""Dead letters on a real Kafka: a command comes back exactly once, whoever dies, freezes or does the same meanwhile."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from typer.testing import CliRunner

from ingestor.replies import Replies
from ingestor.settings import IngestorSettings
from ingestor.writer import Writer
from local.process import ROOT
from shared.codec import encode_command
from shared.commands import CORRELATION_ID, DEAD_LETTER, REPLY_PARTITION, Command, UpsertEpisode
from shared.deadletters.__main__ import app
from shared.deadletters.letters import LetterRefused, Replayed, body_of
from shared.deadletters.replay import CopyUnknownError, DeadLetterSettings, Result, Run, open_run, open_shelf
from shared.errors import Unavailable
from shared.events import LoggedEvent
from shared.kafka import open_admin, open_producer, partition_of
from shared.log import Commit, Cursor, LogReader
from shared.probes import Status
from shared.settings import COMMANDS, DEAD_LETTERS, EVENTS, KafkaSettings
from tests.builders import patch, upsert
from tests.topics import everything, remake_topics, until

PARTITIONS = (0, 1)
SETTINGS = DeadLetterSettings(claim_seconds=1_000)


@pytest.fixture
async def kafka(kafka: KafkaSettings) -> KafkaSettings:
    await remake_topics(kafka, len(PARTITIONS))
    return kafka


@contextlib.asynccontextmanager
async def ingestor(kafka: KafkaSettings, folder: Path) -> AsyncIterator[None]:
    settings = IngestorSettings(instance_id="one", state_dir=folder / "state")
    writer = Writer(kafka, settings, Replies(), Status())
    tasks = [asyncio.create_task(writer.run(partition)) for partition in PARTITIONS]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def park(kafka: KafkaSettings, folder: Path, *commands: bytes | Command) -> list[tuple[int, int]]:
    """Let an ingestor find commands in the wrong partition, or ones that it cannot read. Partition and offset of each.

    The places are those in the dead letters.
    """
    before = {partition: len(await everything(kafka, DEAD_LETTERS, partition)) for partition in PARTITIONS}
    async with open_producer(kafka) as producer:
        places = []
        for command in commands:
            key = b"namespace:alice" if isinstance(command, bytes) else command.stream.encode()
            value = command if isinstance(command, bytes) else encode_command(command)
            headers = [(CORRELATION_ID, b"c-1"), (REPLY_PARTITION, b"3")]
            wrong = 1 - partition_of(key, len(PARTITIONS))
            await producer.send_and_wait(COMMANDS, value, key=key, headers=headers, partition=wrong)
            places.append((wrong, before[wrong]))
            before[wrong] += 1

    async def all_parked() -> bool:
        return before == {number: len(await everything(kafka, DEAD_LETTERS, number)) for number in PARTITIONS}

    async with ingestor(kafka, folder):
        await until(all_parked)
    return places


async def copies(kafka: KafkaSettings) -> Counter[bytes]:
    """Letter → how often its command was put into the commands topic."""
    found: Counter[bytes] = Counter()
    for partition in PARTITIONS:
        for record in await everything(kafka, COMMANDS, partition):
            found.update(value for name, value in record.headers if name == DEAD_LETTER)
    return found


async def events(kafka: KafkaSettings) -> list[LoggedEvent]:
    commits: list[Commit | None] = []
    for partition in PARTITIONS:
        reader = LogReader(Cursor())
        commits += [reader.read(record.offset, record.value) for record in await everything(kafka, EVENTS, partition)]
    return [event for commit in commits if commit for event in commit.events]


async def decided(kafka: KafkaSettings, folder: Path) -> list[LoggedEvent]:
    """The events when an ingestor has decided all that is there: a last command of every partition is through."""
    last = [upsert("last", namespace=name) for name in ("alice", "bob", "carol", "dave")]
    assert {partition_of(command.stream.encode(), len(PARTITIONS)) for command in last} == set(PARTITIONS)
    async with open_producer(kafka) as producer:
        for command in last:
            await producer.send_and_wait(COMMANDS, encode_command(command), key=command.stream.encode())
    wanted = {command.command_id for command in last}

    async def all_decided() -> bool:
        return wanted <= {event.command_id for event in await events(kafka)}

    async with ingestor(kafka, folder):
        await until(all_decided)
    return [event for event in await events(kafka) if event.command_id not in wanted]


@contextlib.asynccontextmanager
async def a_run(kafka: KafkaSettings, partition: int, *, hours_later: int = 0) -> AsyncIterator[Run]:
    """A run, now or when the claims of now look stale."""
    async with open_run(kafka, SETTINGS, partition) as run:
        run.now = lambda: datetime.now(UTC) + timedelta(hours=hours_later)
        yield run


async def replay(kafka: KafkaSettings, place: tuple[int, int], *, hours_later: int = 0, as_is: bool = False) -> Result:
    async with a_run(kafka, place[0], hours_later=hours_later) as run:
        return await run.replay(place[1], as_is=as_is)


def tool(kafka: KafkaSettings, *arguments: object, claim_seconds: float = 60) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "shared.deadletters", *map(str, arguments)],
        env={
            **os.environ,
            "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "DEAD_LETTERS_CLAIM_SECONDS": str(claim_seconds),
        },
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def said(kafka: KafkaSettings, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the tool."""
    argv = [*map(str, arguments)]
    result = await asyncio.to_thread(
        CliRunner().invoke, app, argv, env={"KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers}, catch_exceptions=False
    )
    return result.exit_code, result.stdout, result.stderr


async def test_a_command_that_was_parked_comes_back_once_and_answers_nobody(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    command = upsert("run-1")
    [place] = await park(kafka, tmp_path, command)
    first = await replay(kafka, place)
    assert (first.outcome, first.now) == ("replayed", True)
    again = await replay(kafka, place)
    assert (again.outcome, again.now, again.partition, again.offset) == (
        "replayed",
        False,
        first.partition,
        first.offset,
    )
    found = await decided(kafka, tmp_path)
    assert [(event.event_id, event.command_id) for event in found] == [(n, command.command_id) for n in (1, 2, 3)]
    assert first.partition == partition_of(command.stream.encode(), len(PARTITIONS))
    put = (await everything(kafka, COMMANDS, first.partition))[first.offset or 0]
    assert (put.key, put.value) == (command.stream.encode(), encode_command(command))
    assert [name for name, _ in put.headers] == [CORRELATION_ID, DEAD_LETTER]


async def test_the_tool_lists_shows_replays_and_drops(kafka: KafkaSettings, tmp_path: Path) -> None:
    command = upsert("run-1", idempotency_key="k")
    places = await park(kafka, tmp_path, command, b"{broken \x1b[2J", b"[1]", patch("run-1"))
    one, broken, other, last = (f"{partition}/{offset}" for partition, offset in places)
    assert (await said(kafka, "replay", one))[:2] == (
        0,
        f"{one}: put back, as episodes.commands {1 - places[0][0]}/0\n",
    )
    code, out, err = await said(kafka, "replay", broken)
    assert (code, out) == (1, "")
    assert err.startswith(f"python -m shared.deadletters replay: {broken} still cannot be read: not a command")
    code, out, _ = await said(kafka, "drop", other, one, "--json")
    assert code == 1, "one of them was replayed, not dropped"
    assert [(letter["id"], letter["outcome"], letter["now"]) for letter in json.loads(out)["letters"]] == [
        (other, "dropped", True),
        (one, "replayed", False),
    ]
    fixed = tmp_path / "fixed.json"
    fixed.write_bytes(encode_command(upsert("run-2")))
    assert (await said(kafka, "replay", broken, "--file", fixed))[0] == 0
    code, out, _ = await said(kafka, "list", "--json")
    assert code == 0
    listed = {letter["id"]: letter for letter in json.loads(out)["letters"]}
    assert [listed[letter]["done"]["mark"]["type"] for letter in (one, broken, other)] == [
        "replayed",
        "replayed",
        "dropped",
    ]
    assert listed[last]["done"] is None
    assert "does not belong into partition" in listed[one]["reason"]
    async with open_producer(kafka) as producer:
        foreign = (await producer.send_and_wait(DEAD_LETTERS, b"junk", partition=0)).offset
    code, out, err = await said(kafka, "list")
    assert code == 0
    assert "replayed to" in out
    assert err == f"episodes.dead-letters 0/{foreign} is neither a parked command nor a mark: who wrote it?\n"
    code, out, _ = await said(kafka, "show", one)
    assert code == 0
    assert '"idempotency_key": "k"' in out
    assert f"header   {CORRELATION_ID}: c-1" in out
    assert "{broken \\x1b[2J" in (await said(kafka, "show", broken))[1]
    assert (await said(kafka, "show", broken, "--value"))[1] == "{broken \x1b[2J"
    assert json.loads((await said(kafka, "show", one, "--json"))[1])["value"] == encode_command(command).decode()
    assert (await said(kafka, "show", "0/999"))[2] == "python -m shared.deadletters show: 0/999 is no dead letter\n"
    assert (await said(kafka, "show", "9/0"))[2].endswith("episodes.dead-letters has no partition 9\n")
    assert "is not PARTITION/OFFSET" in (await said(kafka, "show", "9"))[2]
    assert "a file is for one letter" in (await said(kafka, "replay", one, last, "--file", fixed))[2]
    found = await decided(kafka, tmp_path)
    assert [event.command_id for event in found].count(command.command_id) == 3
    assert len({event.command_id for event in found}) == 2


async def test_a_run_that_died_with_a_claim_is_succeeded_by_the_next(kafka: KafkaSettings, tmp_path: Path) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as dies:
        assert await dies.claim(dies.shelf.letters.at(offset))
    refused = await replay(kafka, (partition, offset))
    assert refused.outcome == "busy"
    assert "another run has it" in refused.detail
    assert not await copies(kafka)
    assert (await replay(kafka, (partition, offset), hours_later=1)).now
    assert list((await copies(kafka)).values()) == [1]


async def test_a_run_that_died_behind_its_append_is_recognised_by_the_copy(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as dies:
        place = await claim_and_put(dies, offset)
    found = await replay(kafka, (partition, offset), hours_later=1)
    assert (found.outcome, found.partition, found.offset) == ("replayed", *place)
    assert "by an earlier run that died" in found.detail
    assert list((await copies(kafka)).values()) == [1]


async def test_a_second_death_does_not_hide_the_copy_of_the_first(kafka: KafkaSettings, tmp_path: Path) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as dies:
        place = await claim_and_put(dies, offset)
    for hours in (1, 2):
        async with a_run(kafka, partition, hours_later=hours) as dies_too:
            assert await dies_too.claim(dies_too.shelf.letters.at(offset))
    found = await replay(kafka, (partition, offset), hours_later=3)
    assert (found.partition, found.offset) == place
    assert list((await copies(kafka)).values()) == [1]


async def test_a_run_that_was_frozen_for_too_long_puts_nothing_back(kafka: KafkaSettings, tmp_path: Path) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as frozen:
        letter = frozen.shelf.letters.at(offset)
        body = body_of(letter, await frozen.shelf.record(letter))
        assert await frozen.claim(letter)
        frozen.claim_seconds = 0
        with pytest.raises(Unavailable, match="nothing was put back, run again"):
            await frozen.put_back(body)
    assert not await copies(kafka)


@pytest.mark.parametrize("own_key", [None, "k"])
async def test_even_two_copies_make_one_set_of_events(
    kafka: KafkaSettings, tmp_path: Path, own_key: str | None
) -> None:
    """A run that froze right before its append, whom no clock can stop."""
    command = replace_key(upsert("run-1"), own_key)
    [(partition, offset)] = await park(kafka, tmp_path, command)
    async with a_run(kafka, partition) as frozen:
        letter = frozen.shelf.letters.at(offset)
        body = body_of(letter, await frozen.shelf.record(letter))
        assert await frozen.claim(letter)
        second = await replay(kafka, (partition, offset), hours_later=1)
        assert second.now
        place = await frozen.put_back(body)
        await frozen.mark(Replayed(letter.origin, frozen.id, *place))
    assert list((await copies(kafka)).values()) == [2]
    found = await decided(kafka, tmp_path)
    assert [event.event_id for event in found] == [1, 2, 3], "the second copy is a retry of the first"
    async with open_shelf(kafka, partition) as shelf:
        assert shelf.letters.at(offset).state == f"replayed to {second.partition}/{second.offset}"


async def test_of_runs_at_the_same_time_one_puts_it_back(kafka: KafkaSettings, tmp_path: Path) -> None:
    places = await park(kafka, tmp_path, *(upsert(f"run-{number}") for number in range(12)))

    async def one_run() -> list[Result]:
        async with a_run(kafka, places[0][0]) as run:
            return [await run.replay(offset) for _, offset in places]

    results = await asyncio.gather(*(one_run() for _ in range(6)))
    for of_letter in zip(*results, strict=True):
        assert [result.now for result in of_letter].count(True) == 1
        assert {result.outcome for result in of_letter} <= {"replayed", "busy"}
    assert sum(result.outcome == "busy" for of_run in results for result in of_run) > 0, "they never met"
    assert list((await copies(kafka)).values()) == [1] * len(places)


async def test_runs_killed_at_any_moment_put_each_command_back_once(kafka: KafkaSettings, tmp_path: Path) -> None:
    """By kill -9 of the real tool, again and again, two of them at once."""
    commands = [upsert(f"run-{number}", namespace="alice") for number in range(10)]
    places = await park(kafka, tmp_path, *commands)
    ids = [f"{partition}/{offset}" for partition, offset in places]
    dice, killed = random.Random(3), 0  # noqa: S311
    for _ in range(8):
        runs = [tool(kafka, "replay", *ids, claim_seconds=2) for _ in range(2)]
        # Wait for the first sign of work, so that the kill hits something.
        for run in runs:
            assert run.stdout is not None
            await asyncio.to_thread(run.stdout.readline)
        await asyncio.sleep(dice.random() * 0.15)
        for run in runs:
            killed += run.poll() is None
            run.send_signal(signal.SIGKILL)
            await asyncio.to_thread(run.communicate)
    assert killed
    for place in places:
        assert (await replay(kafka, place, hours_later=1)).outcome == "replayed"
    assert list((await copies(kafka)).values()) == [1] * len(places)
    found = await decided(kafka, tmp_path)
    assert [event.event_id for event in found] == list(range(1, 2 + len(commands) + 1))


async def test_a_command_that_an_ingestor_parked_twice_comes_back_once(kafka: KafkaSettings, tmp_path: Path) -> None:
    """It died between parking and noting it."""
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    [letter] = await everything(kafka, DEAD_LETTERS, partition)
    async with open_producer(kafka) as producer:
        await producer.send_and_wait(
            DEAD_LETTERS, letter.value, key=letter.key, headers=list(letter.headers), partition=partition
        )
    assert (await replay(kafka, (partition, offset))).now
    assert not (await replay(kafka, (partition, offset + 1))).now
    assert list((await copies(kafka)).values()) == [1]


async def test_what_is_dropped_is_not_put_back(kafka: KafkaSettings, tmp_path: Path) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as run:
        assert (await run.drop(offset)).now
        assert not (await run.drop(offset)).now
        assert (await run.replay(offset)).outcome == "dropped"
    assert not await copies(kafka)
    assert len(await everything(kafka, DEAD_LETTERS, partition)) == 3, "the letter is still there, with two marks"


async def test_dropping_what_a_dead_run_put_back_says_so(kafka: KafkaSettings, tmp_path: Path) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as dies:
        place = await claim_and_put(dies, offset)
        assert (await dies.drop(offset)).outcome == "busy"
    async with a_run(kafka, partition, hours_later=1) as run:
        result = await run.drop(offset)
    assert (result.outcome, result.partition, result.offset) == ("replayed", *place)


async def test_when_commands_since_a_dead_claim_have_expired_nothing_is_guessed(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    [(partition, offset)] = await park(kafka, tmp_path, upsert("run-1"))
    async with a_run(kafka, partition) as dies:
        place = await claim_and_put(dies, offset)
    await delete_commands(kafka, place[0], place[1] + 1)
    with pytest.raises(CopyUnknownError, match="whether it was put back cannot be known"):
        await replay(kafka, (partition, offset), hours_later=1)
    async with a_run(kafka, partition, hours_later=2) as run:
        assert (await run.drop(offset)).outcome == "dropped"


async def test_as_is_puts_back_what_this_version_cannot_read(kafka: KafkaSettings, tmp_path: Path) -> None:
    [place] = await park(kafka, tmp_path, b"{of a newer version}")
    with pytest.raises(LetterRefused):
        await replay(kafka, place)
    result = await replay(kafka, place, as_is=True)
    put = (await everything(kafka, COMMANDS, result.partition or 0))[result.offset or 0]
    assert put.value == b"{of a newer version}"
    await decided(kafka, tmp_path)
    async with open_shelf(kafka, result.partition or 0) as shelf:
        [again] = shelf.letters
        assert (again.source_offset, again.state) == (result.offset, "waiting")


async def claim_and_put(run: Run, offset: int) -> tuple[int, int]:
    """All that a run does but for its last mark: then it dies."""
    letter = run.shelf.letters.at(offset)
    body = body_of(letter, await run.shelf.record(letter))
    assert await run.claim(letter)
    return await run.put_back(body)


async def delete_commands(kafka: KafkaSettings, partition: int, before: int) -> None:
    async with open_admin(kafka) as admin:
        await admin.delete_records({TopicPartition(COMMANDS, partition): RecordsToDelete(before_offset=before)})


def replace_key(command: UpsertEpisode, key: str | None) -> UpsertEpisode:
    return command if key is None else upsert(command.name, idempotency_key=key, command_id=command.command_id)
