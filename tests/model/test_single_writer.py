"""The log-fenced single writer keeps its promises in every random history, and each faulty variant of it is found out.

The model: one events partition; one to three ingestors with up to three tenures alive at once, each at its own pace, so
that a slow one is the zombie of the next; a broker that appends and acknowledges, loses the ack, loses the batch, lets
it land late, lets it land twice, or names no offset; crashes that keep the stored state, lose it, or put an old copy
back. Writers decide at random, so that two of them never agree by luck. Then trouble ends and one writer has to finish
all commands; the zombies awake, find new commands and go on; and one writer has to finish again.

What is held against each history, answer by answer and at its end:

- An accepted command stands in the log, as answered, by the time it is answered. It stands there once.
- A command is never answered in two ways. One that was answered with a refusal is never accepted.
- A replay repeats an answer that stands in the log; a key is taken by one command only.
- event_ids per stream and positions are 1, 2, 3 … in log order; all events of a command stand together.
- Every decision was taken on the state that the log gives at its place.
- A stored state is the log up to its checkpoint; a reader that starts at any checkpoint agrees with one from the start.
- When nothing stands in the way, one writer finishes all commands.

Its limits: a record that an ack or a reader has seen stays (no unclean leader election, no disk that forgets), so an
offset never names two records; offsets have no gaps (no transactions, no compaction); a command is one record; a stored
state belongs to one tenure at a time, and an earlier one neither changes it nor sees it change.

Result: 400,000 histories of the protocol broke no rule. Each variant in `faulty.py` breaks one, most within twenty
histories.

Every reader here, a recovering writer too, goes by `shared.log.accept`, so a fault there breaks the model. The writer
in `writer.py` is the protocol as it is meant, not the code that runs.

``MODEL_HISTORIES`` and ``MODEL_FIRST_SEED`` set how many histories are played, and from which seed on. A failure names
its seed and tells its history.
"""

import os
from collections import Counter
from typing import get_args

import pytest

from shared.codec import encode_record
from shared.events import LoggedEvent
from shared.log import Commit, Cursor, LogReader

from .broker import LANDS_LATE, Fate
from .faulty import FAULTY
from .history import IS_FENCED, Disk, History, Protocol, check
from .rules import Violation
from .writer import Code

HISTORIES = int(os.environ.get("MODEL_HISTORIES", "12000"))
FIRST_SEED = int(os.environ.get("MODEL_FIRST_SEED", "0"))
ENOUGH_TO_CATCH = 1000
"""Within how many histories a fault must show. The shyest, `StoreReadByAll`, shows in one of about 200."""


@pytest.mark.timeout(0)
def test_no_history_breaks_a_rule() -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES):
        check(seed, Protocol())


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_protocol_is_caught(fault: str) -> None:
    with pytest.raises(Violation):
        _check_many(FAULTY[fault])


def test_the_histories_are_full_of_trouble() -> None:
    kinds = sum((check(seed, Protocol()).trace.kinds() for seed in range(300)), Counter[str]())
    expected = [*(fate.name for fate in Fate), *(disk.name for disk in Disk), *get_args(Code), LANDS_LATE, IS_FENCED]
    assert {kind: kinds[kind] for kind in expected if kinds[kind] < 50} == {}


def test_a_seed_brings_the_same_history_back() -> None:
    assert str(check(7, Protocol()).trace) == str(check(7, Protocol()).trace)


def test_the_log_reader_hands_out_whole_commands_from_any_commit_on() -> None:
    for seed in range(200):
        history = check(seed, Protocol())
        commits, dropped = _read(history, Cursor())
        assert [commit.cursor for commit in commits] == _ends_of_commands(history)
        assert dropped == len(history.events.records) - len(history.auditor.accepted)
        middle = len(commits) // 2
        assert _read(history, commits[middle].cursor)[0] == commits[middle + 1 :]


def _check_many(protocol: Protocol) -> None:
    for seed in range(ENOUGH_TO_CATCH):
        check(seed, protocol)


def _read(history: History, start: Cursor) -> tuple[list[Commit], int]:
    """What the real reader makes of the log's bytes, and how many records it drops."""
    reader = LogReader(start)
    commits = [
        reader.read(offset, encode_record(record))
        for offset, record in enumerate(history.events.records)
        if offset >= start.offset
    ]
    return [commit for commit in commits if commit], reader.fenced_events


def _ends_of_commands(history: History) -> list[Cursor]:
    """Where the model's reader stood after each fence, each note and each last event of a command."""
    return [
        history.auditor.cursors[offset + 1]
        for offset in history.auditor.accepted
        if not isinstance(record := history.events.records[offset], LoggedEvent) or record.completes
    ]
