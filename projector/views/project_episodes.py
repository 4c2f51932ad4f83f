"""Episodes of projects, one document each. A deleted one keeps its document: it may be restored."""

from typing import Any, assert_never

from msgspec import UNSET, Raw

from projector.views.document import Document, Index, absent, existing, owner
from shared.errors import PoisonRecord
from shared.events import (
    EpisodeChanges,
    FolderRef,
    LoggedEvent,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
)

INDEXES: tuple[Index, ...] = (("namespace", "project", "name"), ("project_id", "deleted", "ordinal"))
"""By name, and for lists. Not unique: two that swap names in one batch are written in any order."""

Event = ProjectEpisodeCreated | ProjectEpisodeRevised | ProjectEpisodeDeleted | ProjectEpisodeRestored


def project(document: Document | None, logged: LoggedEvent, event: Event) -> Document:
    """The document after the event."""
    match event:
        case ProjectEpisodeCreated():
            absent(document)
            return {
                "_id": event.id,
                "namespace": owner(logged),
                "project": event.project,
                "project_id": event.project_id,
                "ordinal": event.ordinal,
                "name": event.name,
                "description": event.description,
                "tags": list(event.tags),
                "status": event.status,
                "write_protected": event.write_protected,
                "folder": _folder(event.folder),
                "metadata": _text(event.metadata),
                "created_at": logged.at,
                "updated_at": logged.at,
                "deleted": False,
                "deleted_at": None,
                "event_id": logged.event_id,
            }
        case ProjectEpisodeRevised():
            before, changes = _living(document, event.id), _fields(event.changes)
        case ProjectEpisodeDeleted():
            before, changes = _living(document, event.id), {"deleted": True, "deleted_at": logged.at}
        case ProjectEpisodeRestored():
            before, changes = _deleted(document, event.id), {"deleted": False, "deleted_at": None}
        case _:
            assert_never(event)
    return {**before, **changes, "updated_at": logged.at, "event_id": logged.event_id}


def _living(document: Document | None, key: str) -> Document:
    episode = existing(document, key)
    if episode["deleted"]:
        raise PoisonRecord(f"episode {key} is deleted")
    return episode


def _deleted(document: Document | None, key: str) -> Document:
    episode = existing(document, key)
    if not episode["deleted"]:
        raise PoisonRecord(f"episode {key} is not deleted")
    return episode


def _fields(changes: EpisodeChanges) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if changes.name is not UNSET:
        fields["name"] = changes.name
    if changes.description is not UNSET:
        fields["description"] = changes.description
    if changes.tags is not UNSET:
        fields["tags"] = list(changes.tags)
    if changes.folder is not UNSET:
        fields["folder"] = _folder(changes.folder)
    if changes.write_protected is not UNSET:
        fields["write_protected"] = changes.write_protected
    if changes.status is not UNSET:
        fields["status"] = changes.status
    if changes.metadata is not UNSET:
        fields["metadata"] = _text(changes.metadata)
    return fields


def _folder(folder: FolderRef | None) -> Document | None:
    return None if folder is None else {"id": folder.id, "path": folder.path}


def _text(json: Raw) -> str:
    return str(json, "utf-8")
