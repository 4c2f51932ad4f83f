"""Finds where a log has lost records, which the reader's rule alone would pass over as records that did not happen.

What a replaced writer appended, and what came after a lost batch of its own, did not happen; the next writer goes on
from the last position that did. So a loss shows in one of two ways: from some record under the latest fence on, nothing
is accepted any more; or a writer number is no fence's offset, because the log has moved.
"""

from msgspec import Struct, field

from shared.events import LoggedEvent, LoggedFence, LoggedNote, LogRecord
from shared.log import Cursor

_MOST = 100


class GapFinder(Struct):
    """Looks at every record, together with the cursor before it and whether it happened."""

    fences: set[int] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)
    unexplained: str | None = None
    """The first record under the latest fence that did not happen, until a later one does."""

    def look(self, before: Cursor, offset: int, record: LogRecord, *, happened: bool) -> None:
        """Take the next record."""
        if isinstance(record, LoggedFence):
            self.fences.add(offset)
        elif happened:
            self.unexplained = None
        elif record.writer not in self.fences:
            if len(self.findings) < _MOST:
                self.findings.append(
                    f"offset {offset}: {_named(record)} names writer {record.writer}, which is no fence's offset: "
                    "records before it are missing"
                )
        elif record.writer == before.fence and self.unexplained is None:
            self.unexplained = (
                f"offset {offset}: {_named(record)} does not follow position {before.position}, and nothing after it "
                "does: records before it are missing"
            )

    def at_the_end(self) -> tuple[str, ...]:
        """What was found, given that the log ends here."""
        return (*self.findings, *([] if self.unexplained is None else [self.unexplained]))


def _named(record: LoggedEvent | LoggedNote) -> str:
    if isinstance(record, LoggedEvent):
        return f"event {record.event_id} of {record.stream} (position {record.position})"
    return f"the note at position {record.position}"
