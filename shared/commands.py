"""Commands: validated wishes, one per HTTP write and one record each in ``episodes.commands``.

A key that the caller did not send is ``UNSET``; ``None`` is an explicit ``null``.
"""

from datetime import datetime
from typing import Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from shared.ids import CommandId, StreamId, namespace_stream, tenant_stream

CORRELATION_ID = "correlation-id"
REPLY_PARTITION = "reply-partition"
TRACEPARENT = "traceparent"
DEAD_LETTER = "dead-letter"
"""Headers of a command's record: the command_id again (for commands that cannot be read), and in decimal digits the
partition of ``episodes.replies`` that the gateway listens to; optionally the caller's W3C trace context. On a command
that was put back from the dead letters also which one it was (``shared.deadletters``)."""

NO_METADATA = Raw(b"null")
EpisodeStatus = Literal["running", "completed", "failed", "archived"]


class EpisodeFields(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a caller says about a project episode: only the keys that stand in the request.

    ``folder`` is the normalised path (``/experiments/batch-1``), ``None`` for the root. ``metadata`` is JSON text,
    ``null`` for none.
    """

    description: str | UnsetType | None = UNSET
    tags: tuple[str, ...] | UnsetType = UNSET
    folder: str | UnsetType | None = UNSET
    write_protected: bool | UnsetType = UNSET
    status: EpisodeStatus | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class _Command(Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    command_id: CommandId
    actor: str
    request_hash: str
    """Digest of method, path and parsed body: what makes two requests under one Idempotency-Key the same."""
    idempotency_key: str | None = None


class _ProjectCommand(_Command, frozen=True, kw_only=True, omit_defaults=True):
    namespace: str
    project: str
    name: str
    owner: bool = False
    """Whether the namespace is the caller's own: then it comes into being with this write."""

    @property
    def stream(self) -> StreamId:
        return namespace_stream(self.namespace)


class UpsertEpisode(_ProjectCommand, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    fields: EpisodeFields


class PatchEpisode(_ProjectCommand, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    fields: EpisodeFields
    new_name: str | UnsetType = UNSET


class DeleteEpisode(_ProjectCommand, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    pass


class RestoreEpisode(_ProjectCommand, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    pass


class Entity(Struct, frozen=True):
    """A thing that an episode speaks of. ``id`` is ``ent_…``, see ``shared.ids.entity_id``."""

    id: str
    name: str
    type: str


class EpisodeItem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One valid item of a batch. ``timestamp`` is UNSET when the caller gave none: it is then the time of recording."""

    content: str
    type: str = "message"
    source: str | None = None
    author: str | None = None
    channel: str | None = None
    timestamp: datetime | UnsetType = UNSET
    metadata: Raw = Raw(b"{}")
    entities: tuple[Entity, ...] = ()
    idempotency_key: str | None = None


class ItemError(Struct, frozen=True):
    """Why the item at ``index`` (0-based, in the request) was not recorded. The HTTP answer's shape."""

    index: int
    code: Literal["validation_error", "payload_too_large"]
    message: str


class RecordEpisodes(_Command, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    tenant_id: str
    namespace: str | None = None
    items: tuple[EpisodeItem, ...]
    errors: tuple[ItemError, ...] = ()
    """What the gateway found wrong with the other items. They belong to the answer, so also to what a retry gets."""

    @property
    def stream(self) -> StreamId:
        return tenant_stream(self.tenant_id)


ProjectCommand = UpsertEpisode | PatchEpisode | DeleteEpisode | RestoreEpisode
Command = ProjectCommand | RecordEpisodes
