"""How far each stream is projected: what a reader who just wrote waits for, and the guard against holes in the log."""

from projector.views.document import Document, Index
from shared.errors import PoisonRecord
from shared.events import LoggedEvent

INDEXES: tuple[Index, ...] = ()


def project(document: Document | None, logged: LoggedEvent) -> Document:
    """The document after the event, whichever it is.

    Raises:
        PoisonRecord: it is not the stream's next event.
    """
    last = 0 if document is None else document["event_id"]
    if logged.event_id != last + 1:
        raise PoisonRecord(f"event {logged.event_id} cannot follow event {last} of {logged.stream}")
    return {"_id": logged.stream, "event_id": logged.event_id, "at": logged.at}
