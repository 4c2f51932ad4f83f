"""What the rules know of a stream. Everything here is folded from the log and can be thrown away."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

from msgspec import Raw, Struct

from shared.commands import EpisodeStatus
from shared.events import FolderRef
from shared.ids import EventId, StreamId
from shared.receipts import Receipt


class StreamHead(Struct, frozen=True):
    """The last event of a stream."""

    event_id: EventId
    at: datetime


class Namespace(Struct, frozen=True):
    id: str
    slug: str


class Project(Struct, frozen=True):
    id: str
    slug: str
    next_ordinal: int


class Folder(Struct, frozen=True):
    id: str


class Episode(Struct, frozen=True):
    """A project episode, living or deleted."""

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
    deleted_at: datetime | None = None


class RecordedItem(Struct, frozen=True):
    """What an item's own idempotency_key led to."""

    event_id: EventId
    episode_id: str


class StoredReceipt(Struct, frozen=True):
    """What a request under an Idempotency-Key came to, and which request that was."""

    request_hash: str
    at: datetime
    receipt: Receipt


Value = StreamHead | Namespace | Project | Folder | Episode | RecordedItem | StoredReceipt
Key = tuple[str, ...]
"""(kind, stream, and what names the value within the stream)."""
Changes = dict[Key, Value | None]
"""Key → its new value, None where it is gone."""
Lookup = Callable[[Key], Value | None]

VALUE_TYPES: dict[str, type[Value]] = {
    "head": StreamHead,
    "namespace": Namespace,
    "project": Project,
    "folder": Folder,
    "episode": Episode,
    "item": RecordedItem,
    "receipt": StoredReceipt,
}

_BEFORE_ALL = StreamHead(EventId(0), datetime(1970, 1, 1, tzinfo=UTC))
_V = TypeVar("_V")


def head_key(stream: StreamId) -> Key:
    return ("head", stream)


def namespace_key(stream: StreamId) -> Key:
    return ("namespace", stream)


def project_key(stream: StreamId, slug: str) -> Key:
    return ("project", stream, slug)


def folder_key(stream: StreamId, project: str, path: str) -> Key:
    return ("folder", stream, project, path)


def episode_key(stream: StreamId, project: str, name: str) -> Key:
    return ("episode", stream, project, name)


def item_key(stream: StreamId, idempotency_key: str) -> Key:
    return ("item", stream, idempotency_key)


def receipt_key(stream: StreamId, idempotency_key: str) -> Key:
    return ("receipt", stream, idempotency_key)


class State:
    """Read access to one stream."""

    def __init__(self, stream: StreamId, lookup: Lookup) -> None:
        self.stream = stream
        self._lookup = lookup

    def head(self) -> StreamHead:
        return self._find(head_key(self.stream), StreamHead) or _BEFORE_ALL

    def namespace(self) -> Namespace | None:
        return self._find(namespace_key(self.stream), Namespace)

    def project(self, slug: str) -> Project | None:
        return self._find(project_key(self.stream, slug), Project)

    def folder(self, project: str, path: str) -> Folder | None:
        return self._find(folder_key(self.stream, project, path), Folder)

    def episode(self, project: str, name: str) -> Episode | None:
        return self._find(episode_key(self.stream, project, name), Episode)

    def item(self, idempotency_key: str) -> RecordedItem | None:
        return self._find(item_key(self.stream, idempotency_key), RecordedItem)

    def receipt(self, idempotency_key: str) -> StoredReceipt | None:
        return self._find(receipt_key(self.stream, idempotency_key), StoredReceipt)

    def _find(self, key: Key, kind: type[_V]) -> _V | None:
        value = self._lookup(key)
        assert value is None or isinstance(value, kind)  # noqa: S101 - the key's first word says the type
        return value


class Overlay(Changes):
    """Changes over what is ``under`` them. ``overlay[key]`` is the value after the changes, None if there is none."""

    def __init__(self, under: Lookup) -> None:
        super().__init__()
        self._under = under

    def __missing__(self, key: Key) -> Value | None:
        return self._under(key)
