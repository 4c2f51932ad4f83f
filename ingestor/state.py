"""The stored state of one partition: a cache of the log, good for one position."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
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

FORMAT = "1"
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

    def checkpoint(self) -> Checkpoint | None: ...

    def get(self, key: Key) -> Value | None: ...

    def apply(self, changes: Changes, checkpoint: Checkpoint) -> None: ...

    def forget_receipts(self, before: datetime) -> None:
        """Drop some of the receipts that are older than ``before``: called often, it keeps up."""
        ...

    def clear(self) -> None: ...


_ENCODE = msgspec.json.Encoder().encode
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(cls) for kind, cls in VALUE_TYPES.items()}
_CHECKPOINT = b"checkpoint"
_SWEEP = 256
"""Receipts looked at per call of `forget_receipts`."""
_SLOTS = 4
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class LmdbStateStore:
    """Adapter for one LMDB environment. Keys are digests, since LMDB's are at most 511 bytes; values are JSON.

    Commits do not wait for the disk: killing the process loses nothing, and after a crash of the machine the state is
    thrown away (see `open_state`).
    """

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self._values = env.open_db(b"values")
        self._receipts_by_age = env.open_db(b"receipts-by-age")
        self._meta = env.open_db(b"meta")

    def checkpoint(self) -> Checkpoint | None:
        with self._env.begin(db=self._meta) as txn:
            stored = txn.get(_CHECKPOINT)
        return None if stored is None else msgspec.json.decode(stored, type=Checkpoint)

    def get(self, key: Key) -> Value | None:
        with self._env.begin(db=self._values) as txn:
            stored = txn.get(_digest(key))
        return None if stored is None else _DECODERS[key[0]].decode(stored)

    def apply(self, changes: Changes, checkpoint: Checkpoint) -> None:
        with _translated(), self._env.begin(db=self._values, write=True) as txn:
            for key, value in changes.items():
                digest = _digest(key)
                if value is None:
                    txn.delete(digest)
                    continue
                txn.put(digest, _ENCODE(value))
                if isinstance(value, StoredReceipt):
                    txn.put(_age(value.at) + digest, b"", db=self._receipts_by_age)
            txn.put(_CHECKPOINT, _ENCODE(checkpoint), db=self._meta)

    def forget_receipts(self, before: datetime) -> None:
        with _translated(), self._env.begin(write=True) as txn:
            cursor = txn.cursor(db=self._receipts_by_age)
            limit = _age(before)
            for _ in range(_SWEEP):
                if not cursor.first() or cursor.key()[:8] >= limit:
                    return
                age, digest = cursor.key()[:8], cursor.key()[8:]
                cursor.delete()
                stored = txn.get(digest, db=self._values)
                if stored is not None and _age(_DECODERS["receipt"].decode(stored).at) == age:
                    txn.delete(digest, db=self._values)  # else the key was used again since

    def clear(self) -> None:
        with _translated(), self._env.begin(write=True) as txn:
            txn.delete(_CHECKPOINT, db=self._meta)
            txn.drop(self._values, delete=False)
            txn.drop(self._receipts_by_age, delete=False)


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
            env = _open_trusted(place, map_bytes)
            try:
                yield LmdbStateStore(env)
            finally:
                env.close()
            return
    raise Unavailable(f"the state of partition {partition} in {folder} is held by {_SLOTS} other processes")


def _open_trusted(place: Path, map_bytes: int) -> lmdb.Environment:
    # Without fsync, LMDB promises nothing after a crash of the machine: state of another boot is not trusted.
    stamp, expected = place / "stamp", f"{FORMAT} {_boot_id()}"
    if place.exists() and (not stamp.exists() or stamp.read_text() != expected):
        _log.warning("state thrown away: it is of another format or an earlier boot", place=str(place))
        shutil.rmtree(place)
    try:
        env = _open(place, map_bytes)
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, msgspec.DecodeError) as error:
        _log.warning("state thrown away: it is damaged", place=str(place), reason=str(error))
        shutil.rmtree(place)
        env = _open(place, map_bytes)
    stamp.write_text(expected)
    return env


def _open(place: Path, map_bytes: int) -> lmdb.Environment:
    with _translated():
        env = lmdb.open(str(place), map_size=map_bytes, max_dbs=3, sync=False, metasync=False)
        try:
            LmdbStateStore(env).checkpoint()
        except BaseException:
            env.close()
            raise
    return env


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


def _digest(key: Key) -> bytes:
    return blake2b(msgspec.msgpack.encode(key), digest_size=20).digest()


def _age(at: datetime) -> bytes:
    return ((at - _EPOCH) // timedelta(milliseconds=1)).to_bytes(8, "big")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError, OSError) as error:
        raise Unavailable(f"the stored state cannot be written: {error}") from error
