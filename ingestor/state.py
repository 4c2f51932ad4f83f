"""The stored state of one partition: a cache of the log, good for one position."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import lmdb
import msgspec
import structlog
from msgspec import Struct

from ingestor.domain.state import VALUE_TYPES, Changes, Key, StoredReceipt, Value
from shared.errors import Unavailable
from shared.log import Cursor

FORMAT = "2"
"""Changes whenever the stored values do; state of another format is thrown away."""

_log = structlog.get_logger(__name__)


class Checkpoint(Struct, frozen=True):
    """How far in the log the stored state is."""

    cursor: Cursor
    nonce: str
    """Of the fence at ``cursor.fence``: proof that this is state of this very log."""
    command_offset: int
    """Of the last command that is done; -1 if none is."""


class StateStore(Protocol):
    """Port: values by key, changed together with the checkpoint that they belong to."""

    @property
    def scratch(self) -> Path:
        """A folder of ours for what goes into snapshots and comes out of them."""
        ...

    def checkpoint(self) -> Checkpoint | None: ...

    def get(self, key: Key) -> Value | None: ...

    def apply(self, changes: Changes, checkpoint: Checkpoint) -> None: ...

    def forget_receipts(self, before: datetime) -> None:
        """Drop some of the receipts that are older than ``before``: called often, it keeps up."""
        ...

    def clear(self) -> None: ...

    def export(self, file: Path) -> Checkpoint:
        """Write all of it into a new file, as it is with the checkpoint. May run in a thread beside everything else."""
        ...

    def load(self, file: Path, checkpoint: Checkpoint) -> None:
        """Let what was exported with the checkpoint into ``file``, which is used up, take the place of what is here.

        Raises:
            StateUnusable: it is not what such an export wrote. Nothing has changed.
        """
        ...


class StateUnusable(Exception):
    """What should be a stored state is none, or another one."""


_NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
    *_NOT_DECODED,
)
_ENCODE = msgspec.json.Encoder().encode
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(cls) for kind, cls in VALUE_TYPES.items()}
_ENCODE_KEY = msgspec.msgpack.Encoder().encode
_LONGEST_KEY = 500
_CHECKPOINT = b"checkpoint"
_STAMP = "stamp"
"""The file that says for which format and boot the state is good; without it the state is thrown away."""
_SWEEP = 256
"""Receipts looked at per call of `forget_receipts`."""
_SLOTS = 4


class LmdbStateStore:
    """Adapter for one LMDB environment. Keys are sorted by kind and stream, values are JSON.

    Commits do not wait for the disk: killing the process loses nothing, and after a crash of the machine the state is
    thrown away (see `open_state`). So is one of which something cannot be read: whoever comes upon that is told
    `Unavailable`, and finds an empty state when it is opened again.
    """

    def __init__(self, place: Path, map_bytes: int) -> None:
        self.scratch = place / "scratch"
        """A folder for what goes into snapshots and comes out of them. Emptied when the state is opened."""
        self._place = place
        self._map_bytes = map_bytes
        self._open()

    def _open(self) -> None:
        with _translated():
            self._env = lmdb.open(str(self._place), map_size=self._map_bytes, max_dbs=3, sync=False, metasync=False)
        self._reading: lmdb.Transaction[bytes] | None = None
        """Good until the next change; to begin one for each `get` would cost more than the reading."""
        try:
            self._check_whole()
            self._values = self._env.open_db(b"values")
            self._receipts_by_age = self._env.open_db(b"receipts-by-age")
            self._meta = self._env.open_db(b"meta")
            self._make_whole()
            self.checkpoint()
        except BaseException:
            self._env.close()
            raise

    def _check_whole(self) -> None:
        # LMDB maps the file and does not look at its length: the first touch of a page that was cut off is a SIGBUS.
        size, whole = self._sizes()
        if size < whole:
            raise lmdb.CorruptedError(f"{self._place}: {size} of {whole} bytes are there")

    def _make_whole(self) -> None:
        # Pages at the end that a transaction took and gave back are not written: stretch the file, to know a cut one.
        size, whole = self._sizes()
        if size < whole:
            os.truncate(self._place / "data.mdb", whole)

    def _sizes(self) -> tuple[int, int]:
        """The bytes that the file has, and those that it should have."""
        pages = self._env.info()["last_pgno"] + 1
        return (self._place / "data.mdb").stat().st_size, pages * self._env.stat()["psize"]

    def close(self) -> None:
        self._env.close()

    def checkpoint(self) -> Checkpoint | None:
        with self._env.begin(db=self._meta) as txn:
            stored = txn.get(_CHECKPOINT)
        return None if stored is None else msgspec.json.decode(stored, type=Checkpoint)

    def get(self, key: Key) -> Value | None:
        try:
            if self._reading is None:
                self._reading = self._env.begin(db=self._values)
            stored = self._reading.get(_encoded(key))
            return None if stored is None else _DECODERS[key[0]].decode(stored)
        except _DAMAGED as error:
            raise self._distrust(error) from error

    def apply(self, changes: Changes, checkpoint: Checkpoint) -> None:
        puts: list[tuple[bytes, bytes]] = []
        ages: list[tuple[bytes, bytes]] = []
        with self._changing() as txn:
            for key, value in changes.items():
                encoded = _encoded(key)
                if value is None:
                    txn.delete(encoded, db=self._values)
                    continue
                puts.append((encoded, _ENCODE(value)))
                if isinstance(value, StoredReceipt):
                    ages.append((_age(value.at) + encoded, b""))
            with txn.cursor(self._values) as cursor:
                cursor.putmulti(sorted(puts))
            with txn.cursor(self._receipts_by_age) as cursor:
                cursor.putmulti(sorted(ages))
            txn.put(_CHECKPOINT, _ENCODE(checkpoint), db=self._meta)

    def forget_receipts(self, before: datetime) -> None:
        with self._changing() as txn:
            cursor = txn.cursor(db=self._receipts_by_age)
            limit = _age(before)
            for _ in range(_SWEEP):
                if not cursor.first() or cursor.key()[:8] >= limit:
                    return
                age, key = cursor.key()[:8], cursor.key()[8:]
                cursor.delete()
                stored = txn.get(key, db=self._values)
                if stored is not None and _age(_DECODERS["receipt"].decode(stored).at) == age:
                    txn.delete(key, db=self._values)  # else the key was used again since

    def clear(self) -> None:
        with self._changing() as txn:
            txn.delete(_CHECKPOINT, db=self._meta)
            txn.drop(self._values, delete=False)
            txn.drop(self._receipts_by_age, delete=False)

    def export(self, file: Path) -> Checkpoint:
        try:
            with _translated(), file.open("xb") as target:
                self._env.copyfd(target.fileno(), compact=True)
        except _DAMAGED as error:
            raise self._distrust(error) from error
        return _checkpoint_in(file)

    def load(self, file: Path, checkpoint: Checkpoint) -> None:
        if (found := _checkpoint_in(file)) != checkpoint:
            raise StateUnusable(f"the state is that of {found}")
        self._env.close()
        try:
            with _translated():
                file.replace(self._place / "data.mdb")
        finally:
            self._open()

    @contextmanager
    def _changing(self) -> "Iterator[lmdb.Transaction[bytes]]":
        if self._reading is not None:
            self._reading.abort()
            self._reading = None
        try:
            with _translated():
                with self._env.begin(write=True) as txn:
                    yield txn
                self._make_whole()
        except _DAMAGED as error:
            raise self._distrust(error) from error

    def _distrust(self, error: Exception) -> Unavailable:
        (self._place / _STAMP).unlink(missing_ok=True)
        return Unavailable(f"the stored state is damaged ({error}) and will be made again from the log")


@contextmanager
def open_state(folder: Path, partition: int, *, map_bytes: int) -> Iterator[LmdbStateStore]:
    """The state of one partition below ``folder``. What cannot be trusted is thrown away; the log makes it again.

    Two processes never share an environment: whoever finds it locked, by a writer that was replaced but still lives,
    takes the next free name and starts cold.

    Raises:
        Unavailable: the disk is full, or ever so many processes hold the state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(_SLOTS):
        place = folder / f"partition-{partition}{f'.{number}' if number else ''}"
        with place.with_suffix(f"{place.suffix}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            store = _open_trusted(place, map_bytes)
            try:
                shutil.rmtree(store.scratch, ignore_errors=True)
                store.scratch.mkdir()
                yield store
            finally:
                store.close()
            return
    raise Unavailable(f"the state of partition {partition} in {folder} is held by {_SLOTS} other processes")


def _open_trusted(place: Path, map_bytes: int) -> LmdbStateStore:
    # Without fsync, LMDB promises nothing after a crash of the machine: state of another boot is not trusted.
    stamp, expected = place / _STAMP, f"{FORMAT} {_boot_id()}"
    if place.exists() and (not stamp.exists() or stamp.read_text() != expected):
        _log.warning("state thrown away: it is damaged, of another format or of an earlier boot", place=str(place))
        shutil.rmtree(place)
    try:
        store = LmdbStateStore(place, map_bytes)
    except _DAMAGED as error:
        _log.warning("state thrown away: it is damaged", place=str(place), reason=str(error))
        shutil.rmtree(place)
        store = LmdbStateStore(place, map_bytes)
    stamp.write_text(expected)
    return store


def _checkpoint_in(file: Path) -> Checkpoint:
    try:
        with lmdb.open(str(file), subdir=False, readonly=True, lock=False, max_dbs=3) as exported:
            meta = exported.open_db(b"meta", create=False)
            with exported.begin(db=meta) as txn:
                return msgspec.json.decode(txn.get(_CHECKPOINT) or b"", type=Checkpoint)
    except (lmdb.Error, *_NOT_DECODED) as error:
        raise StateUnusable(f"the state cannot be read: {error}") from error


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def _encoded(key: Key) -> bytes:
    # LMDB's keys end at 511 bytes, and one of them has the age before it. No MessagePack array begins with 0.
    encoded = _ENCODE_KEY(key)
    return encoded if len(encoded) <= _LONGEST_KEY else b"\0" + blake2b(encoded, digest_size=20).digest()


def _age(at: datetime) -> bytes:
    return int(at.timestamp() * 1000).to_bytes(8, "big")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (lmdb.Error, OSError) as error:
        passing = isinstance(error, lmdb.MapFullError | lmdb.DiskError | OSError) or type(error) is lmdb.Error
        if not passing:  # of type Error itself is what LMDB has no name for: EIO, when half a page fits on the disk
            raise
        raise Unavailable(f"the stored state cannot be written: {error}") from error
