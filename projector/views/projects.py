"""Projects, one document each, with the counters that lists need: living episodes, in all and per block of ordinals."""

from typing import assert_never

from projector.views.document import Document, Index, absent, existing, owner
from shared.errors import PoisonRecord
from shared.events import (
    LoggedEvent,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
)
from shared.read_models import BLOCK

INDEXES: tuple[Index, ...] = (("namespace", "slug"),)

Event = ProjectCreated | ProjectEpisodeCreated | ProjectEpisodeDeleted | ProjectEpisodeRestored


def project(document: Document | None, logged: LoggedEvent, event: Event, *, ordinal: int = 0) -> Document:
    """The document after the event. ``ordinal`` is that of the episode, where there is one."""
    match event:
        case ProjectCreated():
            absent(document)
            return {
                "_id": event.id,
                "namespace": owner(logged),
                "slug": event.slug,
                "name": event.name,
                "created_at": logged.at,
                "total": 0,
                "blocks": [],
            }
        case ProjectEpisodeCreated() | ProjectEpisodeRestored():
            return _counted(existing(document, event.project_id), ordinal, 1)
        case ProjectEpisodeDeleted():
            return _counted(existing(document, event.project_id), ordinal, -1)
        case _:
            assert_never(event)


def _counted(document: Document, ordinal: int, change: int) -> Document:
    block = (ordinal - 1) // BLOCK
    blocks = list(document["blocks"])
    if block == len(blocks):
        blocks.append(0)
    if not 0 <= block < len(blocks):
        raise PoisonRecord(f"ordinal {ordinal} does not follow the {len(blocks)} blocks of project {document['_id']}")
    blocks[block] += change
    return {**document, "total": document["total"] + change, "blocks": blocks}
