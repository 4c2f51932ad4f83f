"""The read models: pure functions from events to documents. Which event touches which document is said here.

They work on documents in memory, wherever those come from: the live projector loads what a batch touches, a replay
from the start of the log begins with `no_documents`.
"""

from collections.abc import Mapping
from typing import Any, assert_never

from projector.views import (
    entities,
    folders,
    namespaces,
    project_episodes,
    projects,
    streams,
    tenant_episodes,
)
from projector.views.document import Document, Documents, Index
from shared.events import (
    FolderCreated,
    LoggedEvent,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
    TenantEpisodeRecorded,
)
from shared.read_models import (
    ENTITIES,
    FOLDERS,
    NAMESPACES,
    PROJECT_EPISODES,
    PROJECTS,
    STREAMS,
    TENANT_EPISODES,
)

INDEXES: Mapping[str, tuple[Index, ...]] = {
    NAMESPACES: namespaces.INDEXES,
    PROJECTS: projects.INDEXES,
    FOLDERS: folders.INDEXES,
    PROJECT_EPISODES: project_episodes.INDEXES,
    TENANT_EPISODES: tenant_episodes.INDEXES,
    ENTITIES: entities.INDEXES,
    STREAMS: streams.INDEXES,
}
"""Every collection of the read models, and its indexes beside that on ``_id``."""

Touch = tuple[str, str, bool]
"""Collection, _id, and whether the event brings the document into being, so that there is none to load."""


def touched(logged: LoggedEvent) -> tuple[Touch, ...]:
    """The documents that `project` reads and changes."""
    event = logged.event
    stream = (STREAMS, logged.stream, logged.event_id == 1)
    match event:
        case TenantEpisodeRecorded():
            mentions = [(ENTITIES, key, False) for key in entities.mentioned(logged, event.entities)]
            return (TENANT_EPISODES, event.id, True), *mentions, stream
        case ProjectEpisodeCreated():
            return (PROJECT_EPISODES, event.id, True), (PROJECTS, event.project_id, False), stream
        case ProjectEpisodeDeleted() | ProjectEpisodeRestored():
            return (PROJECT_EPISODES, event.id, False), (PROJECTS, event.project_id, False), stream
        case ProjectEpisodeRevised():
            return (PROJECT_EPISODES, event.id, False), stream
        case FolderCreated():
            return (FOLDERS, event.id, True), stream
        case ProjectCreated():
            return (PROJECTS, event.id, True), stream
        case NamespaceCreated():
            return (NAMESPACES, event.id, True), stream
        case _:
            assert_never(event)


def project(documents: Documents, logged: LoggedEvent) -> None:
    """Bring ``documents`` from just before the event to just after it.

    Raises:
        PoisonRecord: the event does not fit them. They may be half changed then.
    """
    event = logged.event
    match event:
        case TenantEpisodeRecorded():
            episodes = documents[TENANT_EPISODES]
            episodes[event.id] = tenant_episodes.project(episodes.get(event.id), logged, event)
            known = documents[ENTITIES]
            for key, entity in entities.mentioned(logged, event.entities).items():
                known[key] = entities.project(known.get(key), logged, entity)
        case ProjectEpisodeCreated() | ProjectEpisodeDeleted() | ProjectEpisodeRestored():
            episodes, all_projects = documents[PROJECT_EPISODES], documents[PROJECTS]
            episode = project_episodes.project(episodes.get(event.id), logged, event)
            episodes[event.id] = episode
            all_projects[event.project_id] = projects.project(
                all_projects.get(event.project_id), logged, event, ordinal=episode["ordinal"]
            )
        case ProjectEpisodeRevised():
            episodes = documents[PROJECT_EPISODES]
            episodes[event.id] = project_episodes.project(episodes.get(event.id), logged, event)
        case FolderCreated():
            all_folders = documents[FOLDERS]
            all_folders[event.id] = folders.project(all_folders.get(event.id), logged, event)
        case ProjectCreated():
            all_projects = documents[PROJECTS]
            all_projects[event.id] = projects.project(all_projects.get(event.id), logged, event)
        case NamespaceCreated():
            all_namespaces = documents[NAMESPACES]
            all_namespaces[event.id] = namespaces.project(all_namespaces.get(event.id), logged, event)
        case _:
            assert_never(event)
    all_streams = documents[STREAMS]
    all_streams[logged.stream] = streams.project(all_streams.get(logged.stream), logged)


def stream_of(collection: str, document: Mapping[str, Any]) -> str:
    """The stream that the document comes from."""
    match collection:
        case "streams":
            return str(document["_id"])
        case "namespaces":
            return f"namespace:{document.get('slug')}"
        case "tenant_episodes" | "entities":
            return f"tenant:{document.get('tenant_id')}"
        case _:
            return f"namespace:{document.get('namespace')}"


def owner_query(collection: str, stream: str) -> Mapping[str, str]:
    """What finds the stream's documents in a collection: the other way round from `stream_of`."""
    owner = stream.partition(":")[2]
    match collection:
        case "streams":
            return {"_id": stream}
        case "namespaces":
            return {"slug": owner} if stream.startswith("namespace:") else _NOTHING
        case "tenant_episodes" | "entities":
            return {"tenant_id": owner} if stream.startswith("tenant:") else _NOTHING
        case _:
            return {"namespace": owner} if stream.startswith("namespace:") else _NOTHING


_NOTHING = {"_id": ""}


def no_documents() -> Documents:
    """Give what there is before the first event."""
    return {collection: {} for collection in INDEXES}


__all__ = [
    "INDEXES",
    "Document",
    "Documents",
    "Index",
    "no_documents",
    "owner_query",
    "project",
    "stream_of",
    "touched",
]
