"""Namespaces, one document each."""

from projector.views.document import Document, Index, absent
from shared.events import LoggedEvent, NamespaceCreated

INDEXES: tuple[Index, ...] = (("slug",),)


def project(document: Document | None, logged: LoggedEvent, event: NamespaceCreated) -> Document:
    """The document after the event."""
    absent(document)
    return {"_id": event.id, "slug": event.slug, "created_at": logged.at}
