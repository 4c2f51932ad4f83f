"""given / when / then for the ingestor's rules, over a state in memory."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from ingestor.domain.judgement import Judgement, Place, judge, relearn, relearn_note
from ingestor.domain.state import Changes, Key, Overlay, Value
from shared.commands import Command
from shared.events import Event, LoggedEvent, NotedCommand
from shared.ids import Position
from shared.receipts import CommandRefused

NOON = datetime(2026, 4, 14, 12, tzinfo=UTC)
WEEK = timedelta(days=7)


class Partition:
    """What one partition's rules have come to: ``log`` and ``state`` after the commands so far."""

    def __init__(self) -> None:
        self.state: Changes = {}
        self.log: list[LoggedEvent] = []
        self.notes: list[NotedCommand] = []
        self._offset = -1

    def when(self, command: Command, *, at: datetime = NOON) -> Judgement:
        """Judge one command and keep what comes of it."""
        self._offset += 1
        place = Place(self._offset, at, writer=0, position=Position(len(self.log)))
        judgement = judge(self.lookup, command, place, WEEK)
        apply(self.state, judgement.changes)
        self.log += judgement.events
        self.notes += [judgement.note] if judgement.note else []
        return judgement

    def lookup(self, key: Key) -> Value | None:
        return self.state.get(key)


def given(*commands: Command) -> Partition:
    """A partition in which these commands were accepted."""
    partition = Partition()
    for command in commands:
        judgement = partition.when(command)
        assert judgement.note is None, judgement
    return partition


def apply(state: Changes, changes: Changes) -> None:
    """Change a state in memory."""
    for key, value in changes.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


def happened(judgement: Judgement) -> list[Event]:
    return [logged.event for logged in judgement.events]


def happened_types(judgement: Judgement) -> list[str]:
    return [type(event).__name__ for event in happened(judgement)]


def refusal(judgement: Judgement) -> str:
    """The code by which the command was refused."""
    assert isinstance(judgement.receipt.outcome, CommandRefused), judgement
    assert not judgement.events
    assert not judgement.changes
    return judgement.receipt.outcome.code


def outcome(judgement: Judgement) -> Any:
    """The outcome of an accepted command."""
    assert not isinstance(judgement.receipt.outcome, CommandRefused), judgement
    return judgement.receipt.outcome


def note_code(judgement: Judgement) -> str:
    """The word that the log keeps of a command without events."""
    assert judgement.note is not None, judgement
    return judgement.note.code


def cold_start(log: Sequence[LoggedEvent], notes: Sequence[NotedCommand] = ()) -> Changes:
    """The state that a writer has who knows nothing but the log."""
    state: Changes = {}
    events: list[LoggedEvent] = []
    for logged in log:
        events.append(logged)
        if logged.completes is not None:
            overlay = Overlay(state.get)
            relearn(overlay, events)
            apply(state, overlay)
            events = []
    assert not events
    for note in notes:
        apply(state, relearn_note(note))
    return state
