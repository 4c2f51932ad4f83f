"""The projects API: namespaces, projects, folders and the episodes in them. One stream per namespace."""

from collections.abc import Sequence
from typing import assert_never

from msgspec import UNSET
from msgspec.structs import asdict, replace

from ingestor.domain.state import (
    Changes,
    Episode,
    Folder,
    Namespace,
    Project,
    State,
    episode_key,
    folder_key,
    namespace_key,
    project_key,
)
from shared.commands import (
    NO_METADATA,
    DeleteEpisode,
    EpisodeFields,
    PatchEpisode,
    ProjectCommand,
    RestoreEpisode,
    UpsertEpisode,
)
from shared.errors import Refused
from shared.events import (
    CommandType,
    EpisodeChanges,
    FolderCreated,
    FolderRef,
    LoggedEvent,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
    ProjectEvent,
)
from shared.ids import derived_id
from shared.receipts import (
    EpisodeDeleted,
    EpisodePatched,
    EpisodeRestored,
    EpisodeSnapshot,
    EpisodeUpserted,
    Outcome,
    Ref,
)

MAX_EPISODE_BYTES = 12 * 1024 * 1024
"""What description, tags and metadata of one episode may take together: a MongoDB document holds 16 MiB."""
_TAG_OVERHEAD = 16
"""Bytes that BSON adds to each tag, rounded up."""


def decide(state: State, command: ProjectCommand) -> Sequence[ProjectEvent]:
    """Say what happens, nothing if all is as wished already, or raise `Refused`."""
    match command:
        case UpsertEpisode():
            return _upsert(state, command)
        case PatchEpisode():
            return _patch(state, command)
        case DeleteEpisode():
            episode = _changeable(state, command)
            return [ProjectEpisodeDeleted(episode.id, episode.project_id, command.project, command.name)]
        case RestoreEpisode():
            episode = _known(state, command)
            if episode.deleted_at is None:
                return []
            return [ProjectEpisodeRestored(episode.id, episode.project_id, command.project, command.name)]
        case _:
            assert_never(command)


def evolve(state: State, logged: LoggedEvent, event: ProjectEvent) -> Changes:
    """What the event changes."""
    stream = logged.stream
    match event:
        case NamespaceCreated():
            return {namespace_key(stream): Namespace(event.id, event.slug)}
        case ProjectCreated():
            return {project_key(stream, event.slug): Project(event.id, event.slug, next_ordinal=1)}
        case FolderCreated():
            return {folder_key(stream, event.project, event.path): Folder(event.id)}
        case ProjectEpisodeCreated():
            return {
                project_key(stream, event.project): Project(event.project_id, event.project, event.ordinal + 1),
                episode_key(stream, event.project, event.name): Episode(
                    id=event.id,
                    project_id=event.project_id,
                    name=event.name,
                    description=event.description,
                    tags=event.tags,
                    status=event.status,
                    write_protected=event.write_protected,
                    folder=event.folder,
                    metadata=event.metadata,
                    created_at=logged.at,
                    updated_at=logged.at,
                ),
            }
        case ProjectEpisodeRevised():
            old = _episode(state, event.project, event.name)
            changed = {key: value for key, value in asdict(event.changes).items() if value is not UNSET}
            new = replace(old, **changed, updated_at=logged.at)
            gone: Changes = {} if new.name == old.name else {episode_key(stream, event.project, old.name): None}
            return gone | {episode_key(stream, event.project, new.name): new}
        case ProjectEpisodeDeleted():
            old = _episode(state, event.project, event.name)
            deleted = replace(old, deleted_at=logged.at, updated_at=logged.at)
            return {episode_key(stream, event.project, event.name): deleted}
        case ProjectEpisodeRestored():
            old = _episode(state, event.project, event.name)
            restored = replace(old, deleted_at=None, updated_at=logged.at)
            return {episode_key(stream, event.project, event.name): restored}
        case _:
            assert_never(event)


def outcome(state: State, completes: CommandType, events: Sequence[LoggedEvent]) -> Outcome:
    """What a command came to: from its events and the state right after them alone, so a cold start knows it too."""
    match events[-1].event:
        case ProjectEpisodeCreated() as event:
            return _upserted(state, event.project, event.name, created=True)
        case ProjectEpisodeRevised() as event if completes == "UpsertEpisode":
            return _upserted(state, event.project, event.name, created=False)
        case ProjectEpisodeRevised() as event:
            name = event.name if event.changes.name is UNSET else event.changes.name
            return EpisodePatched(_snapshot(_episode(state, event.project, name)))
        case ProjectEpisodeDeleted() as event:
            return EpisodeDeleted(event.id, events[-1].at)
        case ProjectEpisodeRestored() as event:
            return EpisodeRestored(_snapshot(_episode(state, event.project, event.name)))
        case event:
            raise AssertionError(f"{type(event).__name__} completes no command")


def unchanged(state: State, command: ProjectCommand) -> Outcome:
    """The answer to a command that is accepted and makes no event: restoring what lives."""
    return EpisodeRestored(_snapshot(_episode(state, command.project, command.name)))


def _upsert(state: State, command: UpsertEpisode) -> list[ProjectEvent]:
    events: list[ProjectEvent] = []
    if state.namespace() is None:
        if not command.owner:
            raise _no_namespace(command)
        events.append(NamespaceCreated(derived_id(command.command_id, 0), command.namespace))
    project = state.project(command.project)
    if project is None:
        project = Project(derived_id(command.command_id, len(events)), command.project, next_ordinal=1)
        events.append(ProjectCreated(project.id, command.project, name=command.project))
    episode = state.episode(command.project, command.name)
    if episode is not None:
        _refuse_unless_changeable(episode)
        changes = _changes(state, command, episode, project, events)
        events.append(ProjectEpisodeRevised(episode.id, project.id, command.project, command.name, changes))
        return events
    fields = command.fields
    folder = _folder(state, command, project, None if fields.folder is UNSET else fields.folder, events)
    created = ProjectEpisodeCreated(
        id=derived_id(command.command_id, len(events)),
        project_id=project.id,
        project=command.project,
        ordinal=project.next_ordinal,
        name=command.name,
        description=None if fields.description is UNSET else fields.description,
        tags=() if fields.tags is UNSET else fields.tags,
        folder=folder,
        write_protected=False if fields.write_protected is UNSET else fields.write_protected,
        status="running" if fields.status is UNSET else fields.status,
        metadata=NO_METADATA if fields.metadata is UNSET else fields.metadata,
    )
    _refuse_if_too_large(created)
    events.append(created)
    return events


def _patch(state: State, command: PatchEpisode) -> list[ProjectEvent]:
    episode = _changeable(state, command)
    project = state.project(command.project)
    assert project is not None  # noqa: S101 - it has an episode
    new_name = command.name if command.new_name is UNSET else command.new_name
    if new_name != command.name and state.episode(command.project, new_name) is not None:
        raise Refused("conflict", f"An episode named {new_name!r} exists already, or did before it was deleted.")
    events: list[ProjectEvent] = []
    changes = _changes(state, command, episode, project, events)
    if new_name != command.name:
        changes = replace(changes, name=new_name)
    events.append(ProjectEpisodeRevised(episode.id, project.id, command.project, command.name, changes))
    return events


def _changes(
    state: State,
    command: UpsertEpisode | PatchEpisode,
    episode: Episode,
    project: Project,
    events: list[ProjectEvent],
) -> EpisodeChanges:
    """The keys whose value will be another one. Missing folders are created in ``events``."""
    fields: EpisodeFields = command.fields
    wished = {key: value for key, value in asdict(fields).items() if value is not UNSET}
    if "folder" in wished:
        wished["folder"] = _folder(state, command, project, wished["folder"], events)
    changed = {key: value for key, value in wished.items() if getattr(episode, key) != value}
    _refuse_if_too_large(replace(episode, **changed))
    return EpisodeChanges(**changed)


def _folder(
    state: State, command: UpsertEpisode | PatchEpisode, project: Project, path: str | None, events: list[ProjectEvent]
) -> FolderRef | None:
    """The folder at ``path``, with a `FolderCreated` in ``events`` for each segment that is new."""
    if path is None:
        return None
    at, parent_id = "", None
    for segment in path.split("/")[1:]:
        at = f"{at}/{segment}"
        folder = state.folder(command.project, at)
        if folder is None:
            folder = Folder(derived_id(command.command_id, len(events)))
            events.append(FolderCreated(folder.id, project.id, command.project, parent_id, at, segment))
        parent_id = folder.id
    assert parent_id is not None  # noqa: S101 - a path has at least one segment
    return FolderRef(parent_id, path)


def _known(state: State, command: ProjectCommand) -> Episode:
    """The episode that the command names, living or deleted."""
    if state.namespace() is None:
        raise _no_namespace(command)
    if state.project(command.project) is None:
        raise Refused("not_found", f"There is no project {command.project!r} in namespace {command.namespace!r}.")
    episode = state.episode(command.project, command.name)
    if episode is None:
        raise _no_episode(command)
    return episode


def _changeable(state: State, command: ProjectCommand) -> Episode:
    episode = _known(state, command)
    if episode.deleted_at is not None:
        raise _no_episode(command)
    _refuse_unless_changeable(episode)
    return episode


def _refuse_unless_changeable(episode: Episode) -> None:
    if episode.deleted_at is not None:
        raise Refused("gone", f"The episode {episode.name!r} was deleted. Restore it, or choose another name.")
    if episode.write_protected:
        raise Refused("write_protected", f"The episode {episode.name!r} is write-protected and stays as it is.")


def _refuse_if_too_large(episode: Episode | ProjectEpisodeCreated) -> None:
    size = len(bytes(episode.metadata)) + sum(len(tag.encode()) + _TAG_OVERHEAD for tag in episode.tags)
    size += len((episode.description or "").encode())
    if size > MAX_EPISODE_BYTES:
        raise Refused(
            "payload_too_large",
            f"Description, tags and metadata of the episode would take {size} bytes; {MAX_EPISODE_BYTES} are the most.",
        )


def _no_namespace(command: ProjectCommand) -> Refused:
    return Refused("not_found", f"There is no namespace {command.namespace!r}.")


def _no_episode(command: ProjectCommand) -> Refused:
    return Refused("not_found", f"There is no episode {command.name!r} in project {command.project!r}.")


def _episode(state: State, project: str, name: str) -> Episode:
    episode = state.episode(project, name)
    assert episode is not None  # noqa: S101 - the log's events follow from one another
    return episode


def _upserted(state: State, project_slug: str, name: str, *, created: bool) -> EpisodeUpserted:
    namespace, project = state.namespace(), state.project(project_slug)
    assert namespace is not None  # noqa: S101
    assert project is not None  # noqa: S101
    return EpisodeUpserted(
        created=created,
        episode=_snapshot(_episode(state, project_slug, name)),
        project=Ref(project.id, project.slug),
        namespace=Ref(namespace.id, namespace.slug),
    )


def _snapshot(episode: Episode) -> EpisodeSnapshot:
    return EpisodeSnapshot(
        id=episode.id,
        project_id=episode.project_id,
        name=episode.name,
        description=episode.description,
        tags=episode.tags,
        status=episode.status,
        write_protected=episode.write_protected,
        folder=episode.folder,
        metadata=episode.metadata,
        created_at=episode.created_at,
        updated_at=episode.updated_at,
    )
