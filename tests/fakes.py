"""Stand-ins for ports, held to the same contracts as the real adapters (tests/contract)."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import bson
import msgspec
from bson.codec_options import CodecOptions
from msgspec import Raw

from ingestor.domain.state import VALUE_TYPES, Changes, Key, StoredReceipt, Value
from ingestor.state import Checkpoint, StateUnusable
from projector.documents import Checkpoint as ProjectorCheckpoint
from projector.documents import DocumentRefused, Overtaken, TooMuch
from projector.fold import Writes
from projector.views import Document, Documents
from shared.log import Cursor


class InMemoryStateStore:
    """The ingestor's state in a dict. ``scratch`` must exist before snapshots are made of it."""

    def __init__(self, scratch: Path = Path("no-scratch")) -> None:
        self.scratch = scratch
        self.values: dict[Key, Value] = {}
        self._checkpoint: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint | None:
        return self._checkpoint

    def get(self, key: Key) -> Value | None:
        return self.values.get(key)

    def apply(self, changes: Changes, checkpoint: Checkpoint) -> None:
        for key, value in changes.items():
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value
        self._checkpoint = checkpoint

    def forget_receipts(self, before: datetime) -> None:
        for key, value in list(self.values.items()):
            if isinstance(value, StoredReceipt) and value.at < before:
                del self.values[key]

    def clear(self) -> None:
        self.values.clear()
        self._checkpoint = None

    def export(self, file: Path) -> Checkpoint:
        assert self._checkpoint is not None
        file.write_bytes(msgspec.json.encode((self._checkpoint, list(self.values.items()))))
        return self._checkpoint

    def load(self, file: Path, checkpoint: Checkpoint) -> None:
        try:
            found, values = msgspec.json.decode(file.read_bytes(), type=tuple[Checkpoint, list[tuple[Key, Raw]]])
        except msgspec.DecodeError as error:
            raise StateUnusable(f"the state cannot be read: {error}") from error
        if found != checkpoint:
            raise StateUnusable(f"the state is that of {found}")
        self.values = {key: msgspec.json.decode(value, type=VALUE_TYPES[key[0]]) for key, value in values}
        self._checkpoint = found


class InMemoryDatabase:
    """Documents and checkpoints of all partitions, for several `InMemoryDocumentStore`s."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str], bytes] = {}
        """(Collection, key) → BSON, so that values come back as MongoDB gives them."""
        self.checkpoints: dict[int, ProjectorCheckpoint] = {}

    def read(self, collection: str) -> dict[str, Document]:
        return {key: _decoded(raw) for (there, key), raw in self.documents.items() if there == collection}


class InMemoryDocumentStore:
    """The documents of one partition of the log, in a dict."""

    def __init__(self, database: InMemoryDatabase, partition: int) -> None:
        self._database = database
        self._partition = partition

    async def checkpoint(self) -> ProjectorCheckpoint:
        return self._database.checkpoints.get(self._partition, ProjectorCheckpoint())

    async def load(self, wanted: Mapping[str, Sequence[str]], *, max_bytes: int | None) -> Documents:
        there = self._database.documents
        raw = {(name, key): there[name, key] for name, keys in wanted.items() for key in keys if (name, key) in there}
        if max_bytes is not None and sum(map(len, raw.values())) > max_bytes:
            raise TooMuch
        loaded: Documents = {name: {} for name in wanted}
        for (name, key), document in raw.items():
            loaded[name][key] = _decoded(document)
        return loaded

    async def apply(self, before: Cursor, after: ProjectorCheckpoint, writes: Writes) -> None:
        if (await self.checkpoint()).cursor != before:
            raise Overtaken
        encoded = {
            (name, key): _encoded(name, key, document)
            for documents in (writes.new, writes.changed)
            for name, there in documents.items()
            for key, document in there.items()
        }
        for name, there in writes.new.items():
            for key in there:
                if (name, key) in self._database.documents:
                    raise DocumentRefused(name, key, "it is there already")
        for name, there in writes.changed.items():
            for key in there:
                if (name, key) not in self._database.documents:
                    raise Overtaken(f"somebody removed {name}/{key}")
        self._database.documents |= encoded
        self._database.checkpoints[self._partition] = after

    async def rest(self, commands: int) -> None:
        pass


def _encoded(collection: str, key: str, document: Document) -> bytes:
    try:
        raw = bson.encode(document)
    except OverflowError as error:
        raise DocumentRefused(collection, key, str(error)) from error
    if len(raw) > 16 * 1024 * 1024:
        raise DocumentRefused(collection, key, "it is too large")
    return raw


def _decoded(raw: bytes) -> Document:
    return bson.decode(raw, CodecOptions(tz_aware=True))
