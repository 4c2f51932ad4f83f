"""Pages of the documentation whose commands a test runs as they stand there."""

import argparse
import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from local.process import ROOT
from shared.kafka import open_admin
from shared.settings import KafkaSettings
from tests.read_models import Said

_WITHIN = 120.0


@dataclass(frozen=True)
class Page:
    """What stands below one heading, up to the next one."""

    title: str
    text: str
    """Its prose and tables, each run of white space as one space."""
    blocks: tuple[str, ...]
    """Its blocks of shell commands, in order."""

    def assert_promised(self, words: str, said: Said) -> None:
        """Check that the page says that these words are to be seen, and that they are."""
        assert words in self.text, f"{self.title} does not speak of {words!r}"
        assert words in f"{said.out}{said.err}", said


def read_page(file: Path, title: str) -> Page:
    """Read a page of a Markdown file. One that is not there, or has no shell commands, is a failure."""
    text: list[str] = []
    blocks: list[str] = []
    inside = found = after_heading = False
    for token in MarkdownIt("commonmark").enable("table").parse(file.read_text()):
        if token.type == "heading_open":
            after_heading, inside = True, False
        elif token.type == "inline" and after_heading:
            after_heading, inside = False, token.content == title
            assert not (inside and found), f"{file.name} has two headings {title!r}"
            found = found or inside
        elif inside and token.type == "inline":
            text.append(token.content)
        elif inside and token.type == "fence" and token.info == "sh":
            blocks.append(token.content)
    assert found, f"{file.name} has no heading {title!r}"
    assert blocks, f"{title} in {file.name} has no block of shell commands"
    return Page(title, " ".join(" ".join(text).split()), tuple(blocks))


class Shell:
    """Runs blocks of commands as a person would paste them, the first failure ending the block.

    `bin` is a folder for the commands that a person has and this machine may not: `python`, with what the service
    needs, and `kafka-topics.sh`, which comes with a Kafka and not with its jars. This module plays it.
    """

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        place = folder / "bin"
        place.mkdir(parents=True)
        self._env = {
            **os.environ,
            **env,
            "PATH": f"{place}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        for name, arguments in {"python": [], "kafka-topics.sh": ["-m", "tests.pages"]}.items():
            command = place / name
            command.write_text(f'#!/bin/sh\nexec {" ".join(map(repr, [sys.executable, *arguments]))} "$@"\n')
            command.chmod(0o755)

    def run(self, block: str, replaced: Mapping[str, str] | None = None, **env: str) -> Said:
        """Run a block. `replaced` says what stands in the page as an example → what it is here."""
        for example, here in (replaced or {}).items():
            assert example in block, f"{example!r} is not in the page any more:\n{block}"
            block = block.replace(example, here)
        done = subprocess.run(
            ["sh", "-eu", "-c", block],
            env={**self._env, **env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_WITHIN,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)


async def _delete_topics(bootstrap: str, pattern: str, *, if_exists: bool) -> None:
    async with open_admin(KafkaSettings(bootstrap_servers=bootstrap)) as admin:
        names = [name for name in await admin.list_topics() if re.fullmatch(pattern, name)]
        if not names and not if_exists:
            raise SystemExit(f"Topic '{pattern}' does not exist as expected")
        await admin.delete_topics(names)


def _kafka_topics() -> None:
    """Do what `kafka-topics.sh` does, as far as pages use it; anything else is refused."""
    parser = argparse.ArgumentParser("kafka-topics.sh", allow_abbrev=False)
    parser.add_argument("--bootstrap-server", required=True)
    parser.add_argument("--delete", required=True, action="store_true")
    parser.add_argument("--if-exists", action="store_true")
    parser.add_argument("--topic", required=True)
    said = parser.parse_args()
    asyncio.run(_delete_topics(said.bootstrap_server, said.topic, if_exists=said.if_exists))


if __name__ == "__main__":
    _kafka_topics()
