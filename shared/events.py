"""Events: accepted facts, past tense, immutable. docs/events.md shows each as it stands in the log."""

from datetime import datetime
from typing import Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from shared.commands import Entity, EpisodeStatus
from shared.ids import CommandId, EventId, Position, StreamId


class FolderRef(Struct, frozen=True):
    """Where an episode lies: ``path`` is ``/experiments/batch-1``; its last segment is the folder's name."""

    id: str
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class NamespaceCreated(Struct, frozen=True):
    id: str
    slug: str


class ProjectCreated(Struct, frozen=True):
    id: str
    slug: str
    name: str


class FolderCreated(Struct, frozen=True):
    """``path`` is ``/experiments/batch-1``, ``name`` its last segment."""

    id: str
    project_id: str
    project: str
    parent_id: str | None
    path: str
    name: str


class ProjectEpisodeCreated(Struct, frozen=True):
    """``ordinal`` is 1, 2, 3 … within the project: the order of lists. ``metadata`` is JSON text, ``null`` for none."""

    id: str
    project_id: str
    project: str
    ordinal: int
    name: str
    description: str | None
    tags: tuple[str, ...]
    folder: FolderRef | None
    write_protected: bool
    status: EpisodeStatus
    metadata: Raw


class EpisodeChanges(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly the keys that changed, with their new values."""

    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    folder: FolderRef | UnsetType | None = UNSET
    write_protected: bool | UnsetType = UNSET
    status: EpisodeStatus | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class ProjectEpisodeRevised(Struct, frozen=True):
    """``name`` is the one before the change. ``changes`` may be empty: the write still moves ``updatedAt``."""

    id: str
    project_id: str
    project: str
    name: str
    changes: EpisodeChanges


class ProjectEpisodeDeleted(Struct, frozen=True):
    id: str
    project_id: str
    project: str
    name: str


class ProjectEpisodeRestored(Struct, frozen=True):
    id: str
    project_id: str
    project: str
    name: str


class TenantEpisodeRecorded(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``timestamp`` is when it happened; the event's own time is when it was recorded."""

    id: str
    namespace: str | None = None
    type: str
    content: str
    source: str | None = None
    author: str | None = None
    channel: str | None = None
    timestamp: datetime
    metadata: Raw = Raw(b"{}")
    entities: tuple[Entity, ...] = ()
    idempotency_key: str | None = None


class WriterFenced(Struct, frozen=True):
    """The record by which an ingestor takes an events partition over. Its Kafka offset names the tenure."""

    owner: str
    nonce: str


class KeptAnswer(Struct, frozen=True):
    """What a command without events came to, for retries under its Idempotency-Key. ``receipt`` is a Receipt's JSON."""

    idempotency_key: str
    request_hash: str
    at: datetime
    receipt: Raw


class NotedCommand(Struct, frozen=True, omit_defaults=True):
    command_id: CommandId
    code: str
    """A refusal's code; ``unchanged`` or ``replayed`` for an answer without an event; ``poison`` for a dead letter."""
    kept: KeptAnswer | None = None
    """On an ``unchanged`` command with an Idempotency-Key."""


BEFORE_ALL_COMMANDS = -1
"""``command_offset`` of what an archive brought into the log: its commands stand in no topic that there still is."""
IMPORT_UNFINISHED = -2
"""``command_offset`` of the notes that an import leaves until all of it is in: no ingestor starts behind one."""


class CommandsRefused(Struct, frozen=True):
    """Commands that were answered and made no event, up to and with ``command_offset``."""

    command_offset: int
    refusals: tuple[NotedCommand, ...]


ProjectEvent = (
    NamespaceCreated
    | ProjectCreated
    | FolderCreated
    | ProjectEpisodeCreated
    | ProjectEpisodeRevised
    | ProjectEpisodeDeleted
    | ProjectEpisodeRestored
)
Event = ProjectEvent | TenantEpisodeRecorded

CommandType = Literal["UpsertEpisode", "PatchEpisode", "DeleteEpisode", "RestoreEpisode", "RecordEpisodes"]


class LoggedEvent(Struct, frozen=True, kw_only=True, gc=False):
    """An event with its place in the log."""

    stream: StreamId
    event_id: EventId
    position: Position
    writer: int
    """Kafka offset of the fence under which it was written."""
    command_id: CommandId
    command_offset: int
    actor: str
    at: datetime
    event: Event
    completes: CommandType | None = None
    """On the last event of a command: the command's type."""
    idempotency_key: str | None = None
    request_hash: str | None = None
    answer: str | None = None
    """On the last event of a batch: what its answer holds beyond the events (errors, repeats), as JSON text."""


class LoggedFence(Struct, frozen=True):
    fence: WriterFenced


class LoggedNote(Struct, frozen=True):
    position: Position
    writer: int
    at: datetime
    note: CommandsRefused

    @property
    def command_offset(self) -> int:
        return self.note.command_offset


LogRecord = LoggedEvent | LoggedFence | LoggedNote
