"""The archive on disk, format version 1. No Kafka here.

An archive is a folder: ``manifest.json``, and one ``partition-<n>.ndjson.zst`` per exported partition of the source.

**Lines.** Each file is newline-delimited JSON; each line is one record that happened, the CloudEvent as it stands in
the log, in its order, with one more attribute at its end: ``"chain":"<16 hex digits>"``. Only what a retry may need is
kept of notes: commands with a ``kept`` answer. Fences, records of replaced writers and other notes are left out.

**Chain.** ``chain(0)`` is the SHA-256 of ``episodes-archive/1 <partition>/<partitions> <stream or *>`` and
``chain(n)`` that of ``chain(n-1)`` followed by line *n* without its ``chain`` attribute. A line shows the first 16 hex
digits, the manifest the whole of the last one. So a line that was altered, lost, doubled or moved is the first one that
does not fit, also when a file was swapped for another.

**Compression.** zstd, a frame per MiB or so of whole lines. Before each frame stands a skippable frame that holds the
frame's length in 4 bytes, little-endian, as ``pzstd`` writes them: ``zstd -dc`` and ``pzstd -dc`` read the files.

**Manifest.** See `Manifest`. It is written last: without it, the export did not finish. Its ``sha256`` is that of the
manifest itself with an empty ``sha256``, as compact JSON. All this finds damage and mistakes. It is no signature: who
fears forgery keeps that number elsewhere.
"""

import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import cramjam
import msgspec
from msgspec import Struct
from msgspec.structs import replace

from shared.codec import decode_record
from shared.errors import EpisodesError, PoisonRecord
from shared.events import LoggedEvent, LoggedNote
from shared.ids import Position, StreamId

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

FORMAT = "episodes-archive"
VERSION = 1
MANIFEST = "manifest.json"

_BLOCK_BYTES = 1024 * 1024
_LEVEL = 3
_LENGTH_FRAME = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little")
"""What a skippable frame with 4 bytes begins with."""
_MAX_FRAME_BYTES = 64 * 1024 * 1024
_CHAIN_DIGITS = 16
_CHAIN_KEY = b',"chain":"'
_SUFFIX_BYTES = len(_CHAIN_KEY) + _CHAIN_DIGITS + len(b'"}')


class ArchiveRefused(EpisodesError):
    """The archive is cut, altered, of another format, or not one at all. The message names the file and the line."""


class Mark(Struct, frozen=True):
    """Where a record stood in the source, and its time."""

    offset: int
    position: Position
    at: datetime


class FileEntry(Struct, frozen=True, kw_only=True):
    """What the manifest says of one file."""

    name: str
    partition: int
    until: int
    """Offset in the source up to which it was exported, exclusive."""
    records: int
    """Lines: events and kept notes."""
    events: int
    bytes: int
    """Size of the file, compressed."""
    first: Mark | None
    last: Mark | None
    sha256: str
    """Of the file as it is on the disk."""
    chain: str
    """64 hex digits: that of its last line."""


class Source(Struct, frozen=True, kw_only=True):
    """What was exported."""

    cluster: str | None
    """Kafka's id of the cluster, if it tells."""
    topic: str
    partitions: int
    stream: StreamId | None
    """The one stream in the archive; None: all of them."""


class Manifest(Struct, frozen=True, kw_only=True):
    """The contents of ``manifest.json``."""

    format: str
    version: int
    created_at: datetime
    source: Source
    files: tuple[FileEntry, ...]
    sha256: str = ""

    @property
    def records(self) -> int:
        return sum(entry.records for entry in self.files)

    @property
    def events(self) -> int:
        return sum(entry.events for entry in self.files)


class Archived(Struct, frozen=True, gc=False):
    """The events of one command, or one note, as they stand in an archive."""

    values: tuple[bytes, ...]
    """The CloudEvents, as they stood in the log."""
    records: tuple[LoggedEvent, ...] | LoggedNote


def make_folder(folder: Path) -> None:
    """Make the folder for an archive.

    Raises:
        ArchiveRefused: it is there, and not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ArchiveRefused(f"{folder} is not empty: an archive gets a folder of its own")


class FileWriter:
    """Writes one file of an archive, line by line. It stands under its name only when it is complete."""

    def __init__(self, folder: Path, source: Source, partition: int) -> None:
        self._path = folder / f"partition-{partition}.ndjson.zst"
        self._partition = partition
        self._file: BinaryIO = self._path.open("xb")
        self._hash = sha256()
        self._bytes = self._records = self._events = 0
        self._first: Mark | None = None
        self._last: Mark | None = None
        self._chain = _first_link(source, partition)
        self._block: list[bytes] = []
        self._block_bytes = 0

    def write(self, value: bytes, mark: Mark, *, event: bool) -> None:
        """Add the CloudEvent in ``value``."""
        if b"\n" in value or not value.endswith(b"}"):
            value = msgspec.json.format(value, indent=-1)
        self._chain = sha256(self._chain + value).digest()
        line = value[:-1] + _CHAIN_KEY + self._chain.hex()[:_CHAIN_DIGITS].encode() + b'"}\n'
        self._block.append(line)
        self._block_bytes += len(line)
        self._records += 1
        self._events += event
        self._first, self._last = self._first or mark, mark
        if self._block_bytes >= _BLOCK_BYTES:
            self._flush()

    def close(self, until: int) -> FileEntry:
        """Finish the file, down to the disk."""
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(
            name=self._path.name,
            partition=self._partition,
            until=until,
            records=self._records,
            events=self._events,
            bytes=self._bytes,
            first=self._first,
            last=self._last,
            sha256=self._hash.hexdigest(),
            chain=self._chain.hex(),
        )

    def abandon(self) -> None:
        """Leave the file as it is; without a manifest it is no archive."""
        self._file.close()

    def _flush(self) -> None:
        if not self._block:
            return
        frame = bytes(cramjam.zstd.compress(b"".join(self._block), level=_LEVEL))
        for part in (_LENGTH_FRAME + len(frame).to_bytes(4, "little"), frame):
            self._file.write(part)
            self._hash.update(part)
            self._bytes += len(part)
        self._block.clear()
        self._block_bytes = 0


def write_manifest(folder: Path, source: Source, files: Iterable[FileEntry]) -> Manifest:
    """Make the archive complete: all at once, or not at all."""
    unsealed = Manifest(format=FORMAT, version=VERSION, created_at=datetime.now(UTC), source=source, files=tuple(files))
    manifest = replace(unsealed, sha256=_digest(unsealed))
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    unfinished = folder / f"{MANIFEST}.unfinished"
    with unfinished.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / MANIFEST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the archive in ``folder``.

    Raises:
        ArchiveRefused: there is none, or none that this version can read.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ArchiveRefused(f"{folder} has no {MANIFEST}: it is no archive, or its export did not finish") from error
    try:
        head = msgspec.json.decode(text, type=_Head)
        if (head.format, head.version) != (FORMAT, VERSION):
            raise ArchiveRefused(
                f"{folder / MANIFEST} is of format {head.format!r}, version {head.version}; "
                f"this program reads {FORMAT!r}, version {VERSION}"
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveRefused(f"{folder / MANIFEST} is damaged: {error}") from error
    if manifest.sha256 != _digest(manifest):
        raise ArchiveRefused(f"{folder / MANIFEST} was altered: its sha256 is another")
    expected = manifest.source.partitions if manifest.source.stream is None else 1
    if len({entry.partition for entry in manifest.files}) != expected:
        found = f"it names {len(manifest.files)} files of {expected} partitions"
        raise ArchiveRefused(f"{folder / MANIFEST} is damaged: {found}")
    return manifest


def read_file(folder: Path, source: Source, entry: FileEntry) -> Iterator[Archived]:
    """The commands and notes in one file, each line checked against the chain, the whole against the manifest.

    Raises:
        ArchiveRefused: something is missing, too much, altered or moved. The message names the line.
    """
    values: list[bytes] = []
    events: list[LoggedEvent] = []
    number = found = 0
    for number, value in enumerate(_checked_lines(folder, source, entry), 1):
        try:
            record = decode_record(value)
        except PoisonRecord as error:
            raise ArchiveRefused(f"{_line(entry, number)}: {error}") from error
        if isinstance(record, LoggedEvent):
            found += 1
            if events and events[-1].command_id != record.command_id:
                raise ArchiveRefused(f"{_line(entry, number)}: the events of command {events[-1].command_id} break off")
            values.append(value)
            events.append(record)
            if record.completes is not None:
                yield Archived(tuple(values), tuple(events))
                values, events = [], []
        elif isinstance(record, LoggedNote) and not events:
            yield Archived((value,), record)
        else:
            raise ArchiveRefused(f"{_line(entry, number)}: no such record belongs here")
    if events:
        raise ArchiveRefused(f"{_line(entry, number)}: the events of command {events[-1].command_id} break off")
    if found != entry.events:
        raise ArchiveRefused(f"{_line(entry, number)} is the last, with {found} events; {MANIFEST} says {entry.events}")


class _Head(Struct):
    format: str
    version: int


def _digest(manifest: Manifest) -> str:
    return sha256(msgspec.json.encode(replace(manifest, sha256=""))).hexdigest()


def _checked_lines(folder: Path, source: Source, entry: FileEntry) -> Iterator[bytes]:
    chain, number, hashed = _first_link(source, entry.partition), 0, sha256()
    for line in _lines(folder, entry, hashed):
        number += 1
        if number > entry.records:
            raise ArchiveRefused(f"{_line(entry, number)} is one too many: {MANIFEST} says {entry.records}")
        value = line[:-_SUFFIX_BYTES] + b"}"
        chain = sha256(chain + value).digest()
        if line[-_SUFFIX_BYTES:] != _CHAIN_KEY + chain.hex()[:_CHAIN_DIGITS].encode() + b'"}':
            raise ArchiveRefused(
                f"{_line(entry, number)} is not what was written there: it was altered, "
                "or lines up to it were lost, doubled or moved"
            )
        yield value
    if number < entry.records:
        raise ArchiveRefused(
            f"{_line(entry, number + 1)} is missing: the file ends after line {number} of {entry.records}"
        )
    if chain.hex() != entry.chain:
        raise ArchiveRefused(f"{_line(entry, number)} is the last, and its chain is not the one in {MANIFEST}")
    if hashed.hexdigest() != entry.sha256:
        raise ArchiveRefused(f"{entry.name}: all {number} lines are right, but the file is not the one in {MANIFEST}")


def _lines(folder: Path, entry: FileEntry, hashed: "Hash") -> Iterator[bytes]:
    """The file's lines, block by block. Afterwards, all of the file has gone into ``hashed``."""
    path, number = folder / entry.name, 0
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArchiveRefused(f"{_line(entry, 1)} is missing, with the whole file: {error}") from error
    with file:
        while head := file.read(len(_LENGTH_FRAME) + 4):
            length = int.from_bytes(head[-4:], "little")
            if head[:-4] != _LENGTH_FRAME or length > _MAX_FRAME_BYTES:
                raise ArchiveRefused(f"{_line(entry, number + 1)} is missing: what follows line {number} is no block")
            frame = file.read(length)
            if len(frame) < length:
                raise ArchiveRefused(f"{_line(entry, number + 1)} is missing: the file is cut within its block")
            try:
                block = bytes(cramjam.zstd.decompress(frame))
            except cramjam.DecompressionError as error:
                raise ArchiveRefused(f"{_line(entry, number + 1)} begins a block that is damaged: {error}") from error
            for line in block.removesuffix(b"\n").split(b"\n"):
                number += 1
                yield line
            hashed.update(head + frame)


def _first_link(source: Source, partition: int) -> bytes:
    told = f"{FORMAT}/{VERSION} {partition}/{source.partitions} {source.stream or '*'}"
    return sha256(told.encode()).digest()


def _line(entry: FileEntry, number: int) -> str:
    return f"{entry.name}, line {number}"
