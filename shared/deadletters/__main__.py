"""Commands that could not be read and were put aside: look at them, put them back, or mark them as dealt with."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.deadletters.letters import Letter, Record, original_headers, printable
from shared.deadletters.replay import DeadLetterSettings, Result, open_run, open_shelf
from shared.errors import EpisodesError
from shared.kafka import describe_topic
from shared.settings import COMMANDS, DEAD_LETTERS, KafkaSettings

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Id = tuple[int, int]
"""Partition and offset in the dead letters."""
T = TypeVar("T")


def _id(text: str) -> Id:
    partition, _, offset = text.partition("/")
    if not (partition.isascii() and partition.isdigit() and offset.isascii() and offset.isdigit()):
        raise typer.BadParameter(f"{text!r} is not PARTITION/OFFSET, such as 0/17; `list` shows them")
    return int(partition), int(offset)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
AnId = Annotated[Any, typer.Argument(metavar="ID", parser=_id, help="Partition and offset, as in `list`: 0/17")]
Ids = Annotated[list[Any], typer.Argument(metavar="ID…", parser=_id, help="Partition and offset, as in `list`: 0/17")]


class _Listed(Struct, frozen=True):
    letters: tuple[Letter, ...]
    foreign: tuple[str, ...]
    """Records of the topic that are neither parked commands nor marks."""


@app.command("list")
def list_command(*, as_json: AsJson = False) -> None:
    """List all dead letters that there still are, those that were replayed or dropped too."""
    listed = _run("list", _list())
    if as_json:
        typer.echo(msgspec.json.encode(listed).decode())
        return
    table = Table(title=f"{len(listed.letters)} dead letters")
    for heading in ("id", "parked at (UTC)", f"{COMMANDS}", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for letter in listed.letters:
        source = f"{letter.source_partition}/{letter.source_offset}"
        size, parked_at = f"{letter.size:,}", f"{letter.parked_at:%Y-%m-%d %H:%M:%S}"
        table.add_row(letter.id, parked_at, source, size, letter.state, Text(printable(letter.reason.encode())))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for place in listed.foreign:
        typer.echo(f"{DEAD_LETTERS} {place} is neither a parked command nor a mark: who wrote it?", err=True)


@app.command()
def show(
    letter_id: AnId,
    *,
    value: Annotated[
        bool, typer.Option("--value", help="Print the bare value and nothing else, for --file of `replay`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter, with its headers and its value."""
    letter, record = _run("show", _show(letter_id))
    if value:
        sys.stdout.buffer.write(record.value or b"")
    elif as_json:
        content = {
            **msgspec.to_builtins(letter),
            "key": _text(record.key),
            "headers": [[name, _text(text)] for name, text in original_headers(record)],
            "value": _text(record.value),
        }
        typer.echo(msgspec.json.encode(content).decode())
    else:
        typer.echo(f"id       {letter.id}{f', parked {letter.copies} times' if letter.copies > 1 else ''}")
        typer.echo(f"parked   {letter.parked_at:%Y-%m-%d %H:%M:%S} UTC")
        typer.echo(f"from     {COMMANDS} {letter.source_partition}/{letter.source_offset}")
        typer.echo(f"reason   {printable(letter.reason.encode())}")
        typer.echo(f"state    {letter.state}")
        typer.echo(f"key      {printable(record.key)}")
        for name, text in original_headers(record):
            typer.echo(f"header   {printable(name.encode())}: {printable(text)}")
        typer.echo(f"value    {letter.size:,} bytes")
        typer.echo(_pretty(record.value))


@app.command()
def replay(
    letter_ids: Ids,
    *,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Do not ask whether this version can read the command.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option(help="Put in what is in this file instead of the one letter's value.", exists=True)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put commands back into the topic, each exactly once, however often this is run."""
    if file is not None and len(letter_ids) != 1:
        raise typer.BadParameter("a file is for one letter", param_hint="--file")
    corrected = None if file is None else file.read_bytes()
    _settle("replay", _replay(letter_ids, as_is=as_is, corrected=corrected), "replayed", as_json=as_json)


@app.command()
def drop(letter_ids: Ids, *, as_json: AsJson = False) -> None:
    """Mark dead letters as dealt with. Nothing is deleted."""
    _settle("drop", _drop(letter_ids), "dropped", as_json=as_json)


async def _list() -> _Listed:
    kafka = KafkaSettings()
    _, partitions = await describe_topic(kafka, DEAD_LETTERS)
    letters: list[Letter] = []
    foreign: list[str] = []
    for partition in range(partitions):
        async with open_shelf(kafka, partition) as shelf:
            letters += shelf.letters
            foreign += (f"{partition}/{offset}" for offset in shelf.letters.foreign)
    return _Listed(tuple(sorted(letters, key=lambda letter: letter.parked_at)), tuple(foreign))


async def _show(letter_id: Id) -> tuple[Letter, Record]:
    partition, offset = letter_id
    async with open_shelf(KafkaSettings(), partition) as shelf:
        letter = shelf.letters.at(offset)
        return letter, await shelf.record(letter)


async def _replay(letter_ids: Sequence[Id], *, as_is: bool, corrected: bytes | None) -> AsyncIterator[Result]:
    for partition, offset in letter_ids:
        async with open_run(KafkaSettings(), DeadLetterSettings(), partition) as run:
            yield await run.replay(offset, as_is=as_is, corrected=corrected)


async def _drop(letter_ids: Sequence[Id]) -> AsyncIterator[Result]:
    for partition, offset in letter_ids:
        async with open_run(KafkaSettings(), DeadLetterSettings(), partition) as run:
            yield await run.drop(offset)


def _settle(command: str, results: AsyncIterator[Result], wanted: str, *, as_json: bool) -> None:
    """Tell of each result as it comes; exit with 1 unless all letters are what was wanted."""
    came: list[Result] = []

    async def settle() -> None:
        async for result in results:
            came.append(result)
            if not as_json:
                typer.echo(f"{result.id}: {result.detail}")

    try:
        _run(command, settle())
    finally:
        if as_json:
            typer.echo(msgspec.json.encode({"letters": came}).decode())
    if any(result.outcome != wanted for result in came):
        raise typer.Exit(1)


def _run(command: str, work: Coroutine[Any, Any, T]) -> T:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # what it says is in the error
    try:
        return asyncio.run(work)
    except EpisodesError as error:
        typer.echo(f"python -m shared.deadletters {command}: {error}", err=True)
        raise typer.Exit(1) from None


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="backslashreplace")


def _pretty(value: bytes | None) -> str:
    try:
        return printable(msgspec.json.format(value or b"", indent=2))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return printable(value)


if __name__ == "__main__":
    app()
