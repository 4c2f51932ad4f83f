"""Entities, one document per tenant and entity: in how many episodes it is mentioned, first and last."""

from collections.abc import Sequence

from projector.views.document import Document, Index, owner
from shared.commands import Entity
from shared.events import LoggedEvent

INDEXES: tuple[Index, ...] = ()


def mentioned(logged: LoggedEvent, entities: Sequence[Entity]) -> dict[str, Entity]:
    """Document key → entity, each once, however often the episode names it."""
    if not entities:
        return {}
    tenant_id = owner(logged)
    return {f"{tenant_id}/{entity.id}": entity for entity in reversed(entities)}


def project(document: Document | None, logged: LoggedEvent, entity: Entity) -> Document:
    """The document after an episode that mentions it. The name is the first one that it was called by."""
    if document is None:
        tenant_id = owner(logged)
        return {
            "_id": f"{tenant_id}/{entity.id}",
            "tenant_id": tenant_id,
            "entity_id": entity.id,
            "name": entity.name,
            "type": entity.type,
            "mentions": 1,
            "first_event_id": logged.event_id,
            "last_event_id": logged.event_id,
        }
    return {**document, "mentions": document["mentions"] + 1, "last_event_id": logged.event_id}
