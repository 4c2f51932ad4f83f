"""What all views share: documents as plain data, and the words for an event that does not fit its document."""

from typing import Any

from shared.errors import PoisonRecord
from shared.events import LoggedEvent

Document = dict[str, Any]
Documents = dict[str, dict[str, Document]]
"""Collection → _id → document."""

Index = tuple[str, ...]
"""Fields, ascending."""


def owner(logged: LoggedEvent) -> str:
    """The namespace's slug or the tenant's id: whose stream it is."""
    return logged.stream.partition(":")[2]


def absent(document: Document | None) -> None:
    """Insist that the event brings its document into being.

    Raises:
        PoisonRecord: there is one already.
    """
    if document is not None:
        raise PoisonRecord(f"{document['_id']} exists already")


def existing(document: Document | None, key: str) -> Document:
    """Give the document that the event changes.

    Raises:
        PoisonRecord: there is none.
    """
    if document is None:
        raise PoisonRecord(f"{key} does not exist")
    return document
