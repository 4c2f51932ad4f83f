"""Episodes of tenants, one document each."""

from projector.views.document import Document, Index, absent, owner
from shared.events import LoggedEvent, TenantEpisodeRecorded

INDEXES: tuple[Index, ...] = ()


def project(document: Document | None, logged: LoggedEvent, event: TenantEpisodeRecorded) -> Document:
    """The document after the event."""
    absent(document)
    return {
        "_id": event.id,
        "tenant_id": owner(logged),
        "namespace": event.namespace,
        "event_id": logged.event_id,
        "type": event.type,
        "content": event.content,
        "source": event.source,
        "author": event.author,
        "channel": event.channel,
        "timestamp": event.timestamp,
        "metadata": str(event.metadata, "utf-8"),
        "entities": [{"id": entity.id, "name": entity.name, "type": entity.type} for entity in event.entities],
        "status": "active",
        "created_at": logged.at,
    }
