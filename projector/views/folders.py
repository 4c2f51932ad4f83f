"""Folders, one document each. They never change."""

from projector.views.document import Document, Index, absent, owner
from shared.events import FolderCreated, LoggedEvent

INDEXES: tuple[Index, ...] = ()


def project(document: Document | None, logged: LoggedEvent, event: FolderCreated) -> Document:
    """The document after the event."""
    absent(document)
    return {
        "_id": event.id,
        "namespace": owner(logged),
        "project": event.project,
        "project_id": event.project_id,
        "parent_id": event.parent_id,
        "name": event.path.rpartition("/")[2],
        "path": event.path,
        "created_at": logged.at,
    }
