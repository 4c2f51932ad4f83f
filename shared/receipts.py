"""Receipts: what a command came to. The reply carries one, and a retry under the same key gets it again."""

from datetime import datetime

from msgspec import Raw, Struct

from shared.commands import EpisodeStatus, ItemError
from shared.errors import RefusalCode
from shared.events import FolderRef
from shared.ids import CommandId, EventId, StreamId


class EpisodeSnapshot(Struct, frozen=True):
    """A project episode as it was right after the command."""

    id: str
    project_id: str
    name: str
    description: str | None
    tags: tuple[str, ...]
    status: EpisodeStatus
    write_protected: bool
    folder: FolderRef | None
    metadata: Raw
    created_at: datetime
    updated_at: datetime


class Ref(Struct, frozen=True):
    id: str
    slug: str


class EpisodeUpserted(Struct, frozen=True, tag=True):
    created: bool
    episode: EpisodeSnapshot
    project: Ref
    namespace: Ref


class EpisodePatched(Struct, frozen=True, tag=True):
    episode: EpisodeSnapshot


class EpisodeDeleted(Struct, frozen=True, tag=True):
    id: str
    deleted_at: datetime


class EpisodeRestored(Struct, frozen=True, tag=True):
    """``episode`` lives: it was restored now, or was never gone."""

    episode: EpisodeSnapshot


class EpisodesRecorded(Struct, frozen=True, tag=True):
    """``event_ids`` and ``episode_ids`` are aligned, in the order of the valid items."""

    event_ids: tuple[EventId, ...]
    episode_ids: tuple[str, ...]
    errors: tuple[ItemError, ...]


class CommandRefused(Struct, frozen=True, tag=True):
    """``code`` is a ``RefusalCode``, or ``validation_error`` when the command could not be read at all."""

    code: RefusalCode | str
    detail: str


Outcome = EpisodeUpserted | EpisodePatched | EpisodeDeleted | EpisodeRestored | EpisodesRecorded
"""What an accepted command came to."""


class Receipt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    command_id: CommandId
    stream: StreamId
    event_id: EventId
    """The last event_id that the command made; if it made none, the stream's last one at that moment (0: none yet)."""
    outcome: Outcome | CommandRefused
    replayed: bool = False
    """Whether this repeats the receipt of an earlier command under the same Idempotency-Key."""
