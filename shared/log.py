"""The reader's rule: which records of an events partition happened. Everybody who reads the log uses this one.

A record under the latest fence with the next position happened. Anything else was written by a writer that another
one had already replaced, was never acknowledged to anybody, and is dropped.
"""

from msgspec import Struct

from shared.codec import decode_record
from shared.errors import Fenced, PoisonRecord, RecordsLost
from shared.events import LoggedEvent, LoggedFence, LoggedNote, LogRecord, WriterFenced
from shared.ids import Position


class Cursor(Struct, frozen=True):
    """How far a reader is in one events partition."""

    offset: int = 0
    """Kafka offset of the next record to read."""
    fence: int = -1
    """Offset of the latest fence seen; -1 before the first."""
    position: Position = Position(0)
    """Position of the last accepted record."""


class Commit(Struct, frozen=True, gc=False):
    """What one command left in the log, or one note, or one fence: what readers apply as a whole."""

    cursor: Cursor
    """Where to go on after it."""
    events: tuple[LoggedEvent, ...] = ()
    note: LoggedNote | None = None
    fence: WriterFenced | None = None

    @property
    def command_offset(self) -> int | None:
        """Offset of the last command that is done with this commit; None for a fence."""
        if self.events:
            return self.events[-1].command_offset
        return self.note.command_offset if self.note else None


def accept(cursor: Cursor, offset: int, record: LogRecord) -> tuple[Cursor, bool]:
    """The cursor after the record at ``offset``, and whether the record happened."""
    if isinstance(record, LoggedFence):
        return Cursor(offset + 1, offset, cursor.position), True
    if record.writer == cursor.fence and record.position == cursor.position + 1:
        return Cursor(offset + 1, cursor.fence, record.position), True
    return Cursor(offset + 1, cursor.fence, cursor.position), False


def check_place(offset: int, before: Position, *, fence: int, position_at_fence: Position) -> None:
    """The writer's rule: whether the batch acknowledged at ``offset``, which follows position ``before``, happened.

    Raises:
        Fenced: the batch is not at the one offset that it has if nobody else wrote since the writer's fence.
    """
    expected = fence + (before + 1 - position_at_fence)
    if offset != expected:
        raise Fenced(f"a batch landed at offset {offset} and not at {expected}: another writer may own the partition")


class LogReader:
    """Turns the records of one events partition, given in order, into commits."""

    def __init__(self, cursor: Cursor) -> None:
        self.fenced_events = 0
        """How many records were dropped."""
        self._cursor = cursor
        self._events: list[LoggedEvent] = []

    @property
    def cursor(self) -> Cursor:
        """Where the next record is. Reading may go on from here only right after a commit."""
        return self._cursor

    def read(self, offset: int, value: bytes | None) -> Commit | None:
        """Take the record at ``offset``; the commit that it completes, if any.

        Raises:
            PoisonRecord: the record is none of ours, or a command's events do not stand together.
            RecordsLost: it is not the record after the last one.
        """
        return self.take(offset, decode_record(value))

    def take(self, offset: int, record: LogRecord) -> Commit | None:
        """As `read`, of a decoded record."""
        if offset != self._cursor.offset:
            raise RecordsLost(f"offset {offset} came after {self._cursor.offset - 1}: the log has lost records")
        self._cursor, happened = accept(self._cursor, offset, record)
        if not happened:
            self.fenced_events += 1
            return None
        if isinstance(record, LoggedEvent):
            if self._events and self._events[-1].command_id != record.command_id:
                raise self._torn(offset)
            self._events.append(record)
            if record.completes is None:
                return None
            events, self._events = tuple(self._events), []
            return Commit(self._cursor, events)
        if self._events:
            raise self._torn(offset)
        if isinstance(record, LoggedNote):
            return Commit(self._cursor, note=record)
        return Commit(self._cursor, fence=record.fence)

    def _torn(self, offset: int) -> PoisonRecord:
        first = self._events[0]
        return PoisonRecord(
            f"the events of command {first.command_id} from position {first.position} on "
            f"break off before offset {offset}"
        )
