"""One writer's time with a partition, without I/O: what it writes, and what must hold before it may answer.

The protocol is the log-fenced single writer of ARCHITECTURE.md. ``tests/model`` checks a model of it with faults.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from ingestor.domain.judgement import Place, judge
from ingestor.domain.state import Changes, Key, Value
from ingestor.state import Checkpoint, StateStore
from shared.codec import encode_record
from shared.commands import Command
from shared.events import CommandsRefused, LoggedEvent, LoggedNote, NotedCommand
from shared.ids import Position
from shared.log import Cursor, check_place
from shared.receipts import Receipt

_NOTE_BYTES = 100
SKEW = timedelta(hours=1)
"""Receipts are swept a little late: the time of one stream may be behind that of another."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Batch:
    """Records that are appended together or not at all, and what follows once they are."""

    number: int
    before: Position
    """Position of the last record before it."""
    records: list[tuple[bytes | None, bytes, datetime]] = field(default_factory=list)
    """Key, value and time of each record."""
    size: int = 0
    changes: Changes = field(default_factory=dict)
    replies: list[tuple[int | None, Receipt]] = field(default_factory=list)
    """Reply partition (None: nobody waits) and receipt."""
    command_offset: int = -1
    noted: list[NotedCommand] = field(default_factory=list)
    """Commands without events, waiting to be written as one note."""
    noted_at: datetime = _EPOCH

    @property
    def after(self) -> Position:
        """Position of its last record."""
        return Position(self.before + len(self.records))


class Tenure:
    """Begins with a fence and the state recovered up to it. Ends, for good, with the first batch out of place."""

    def __init__(self, store: StateStore, recovered: Checkpoint, retention: timedelta) -> None:
        self._store = store
        self._fence = recovered.cursor.fence
        self._nonce = recovered.nonce
        self._position_at_fence = recovered.cursor.position
        self._retention = retention
        self._unsettled: dict[Key, tuple[int, Value | None]] = {}
        """Key → number of the batch that changed it last, and its value: the overlay over the stored state."""
        self._batch = Batch(0, recovered.cursor.position)

    def decide(self, command: Command, *, command_offset: int, at: datetime, reply_to: int | None) -> None:
        """Judge the command and put what comes of it into the open batch."""
        batch = self._batch
        before = Position(batch.after + (1 if batch.noted else 0))  # a pending note goes first
        place = Place(command_offset, at, self._fence, before)
        judgement = judge(self._lookup, command, place, self._retention)
        if judgement.note is None:
            self._write_note(batch)
            self._write_events(batch, judgement.events)
        else:
            self._note(judgement.note, at)
        batch.changes |= judgement.changes
        for key, changed in judgement.changes.items():
            self._unsettled[key] = (batch.number, changed)
        batch.replies.append((reply_to, judgement.receipt))
        batch.command_offset = command_offset

    def note_poison(self, receipt: Receipt, *, command_offset: int, at: datetime, reply_to: int | None) -> None:
        """Note a command that could not be read and went to the dead letters."""
        self._note(NotedCommand(receipt.command_id, "poison"), at)
        self._batch.replies.append((reply_to, receipt))
        self._batch.command_offset = command_offset

    @property
    def open_bytes(self) -> int:
        """What the open batch holds, in bytes; 0 if nothing."""
        return self._batch.size

    def close_batch(self) -> Batch:
        """The open batch, complete; a new one is opened behind it."""
        batch = self._batch
        self._write_note(batch)
        self._batch = Batch(batch.number + 1, batch.after)
        return batch

    def settle(self, batch: Batch, offset: int) -> None:
        """Take the acknowledgement of the oldest batch on its way. Only after this may its commands be answered.

        Raises:
            Fenced: the batch is not at the one offset that it has if nobody else wrote since the fence.
        """
        check_place(offset, batch.before, fence=self._fence, position_at_fence=self._position_at_fence)

    def store(self, batch: Batch) -> None:
        """Move what a settled batch changed from memory into the stored state."""
        cursor = Cursor(self._fence + (batch.after - self._position_at_fence) + 1, self._fence, batch.after)
        self._store.apply(batch.changes, Checkpoint(cursor, self._nonce, batch.command_offset))
        for key in batch.changes:
            if self._unsettled[key][0] == batch.number:
                del self._unsettled[key]
        if batch.records:
            self._store.forget_receipts(batch.records[-1][2] - self._retention - SKEW)

    def _lookup(self, key: Key) -> Value | None:
        unsettled = self._unsettled.get(key)
        return self._store.get(key) if unsettled is None else unsettled[1]

    def _write_events(self, batch: Batch, events: Sequence[LoggedEvent]) -> None:
        for event in events:
            value = encode_record(event)
            batch.records.append((event.stream.encode(), value, event.at))
            batch.size += len(value)

    def _note(self, noted: NotedCommand, at: datetime) -> None:
        self._batch.noted.append(noted)
        self._batch.noted_at = at
        self._batch.size += _NOTE_BYTES + (len(bytes(noted.kept.receipt)) if noted.kept else 0)

    def _write_note(self, batch: Batch) -> None:
        if not batch.noted:
            return
        note = LoggedNote(
            position=Position(batch.after + 1),
            writer=self._fence,
            at=batch.noted_at,
            note=CommandsRefused(batch.command_offset, tuple(batch.noted)),
        )
        batch.records.append((None, encode_record(note), note.at))
        batch.noted = []
