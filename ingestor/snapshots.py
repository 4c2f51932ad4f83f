"""Snapshots of the stored state, so that a partition with a long history moves to another machine in seconds.

A snapshot is two files in the partition's folder: the state, compressed, and after it a manifest. Whatever does not fit
together, or not to this log, is left alone with a warning: the log makes the state again, it only takes longer.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import cramjam
import msgspec
import structlog
from msgspec import Struct

from ingestor.snapshot_store import SnapshotStore
from ingestor.state import FORMAT as STATE_FORMAT
from ingestor.state import Checkpoint, StateStore, StateUnusable
from shared.errors import Unavailable
from shared.threads import in_thread

FORMAT = f"{STATE_FORMAT}/lmdb/zstd"
KEPT = 2
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 60.0
_MANIFEST = ".json"

_log = structlog.get_logger(__name__)


class Manifest(Struct, frozen=True):
    """What a snapshot is. Written last: without it there is no snapshot."""

    format: str
    partition: int
    checkpoint: Checkpoint
    data: str
    """Name of the file with the state."""
    size: int
    """Of that file, in bytes."""
    sha256: str


class _Head(Struct):
    format: str


class Snapshots:
    """The snapshots of all partitions."""

    def __init__(self, store: SnapshotStore, *, every: int, ahead: int) -> None:
        """Write one after every ``every`` records; use one that is ``ahead`` records before the local state."""
        self._store = store
        self._every = every
        self._ahead = ahead

    async def keep(self, state: StateStore, partition: int) -> None:
        """Write a snapshot whenever it is due, until cancelled. That it cannot be written stops nothing."""
        last = await self._newest_position(state, partition)
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            checkpoint = state.checkpoint()
            if checkpoint is None or checkpoint.cursor.position - last < self._every:
                continue
            try:
                last = (await self.write(state, partition)).checkpoint.cursor.position
            except (StateUnusable, Unavailable) as error:
                _log.warning("snapshot not written", partition=partition, reason=str(error))
                await asyncio.sleep(_AGAIN_SECONDS)

    async def write(self, state: StateStore, partition: int) -> Manifest:
        """Write a snapshot of the state as it is now, and delete those that it makes superfluous.

        Raises:
            StateUnusable: what was exported cannot be read.
            Unavailable: the disk or the shared place is full or away.
        """
        async with _scratch(state.scratch) as folder:
            exported, packed, listed = folder / "state", folder / "packed", folder / "manifest"
            checkpoint = await in_thread(None, state.export, exported)
            size, sha256 = await asyncio.to_thread(_pack, exported, packed)
            name = _name(checkpoint)
            manifest = Manifest(FORMAT, partition, checkpoint, f"{name}.state", size, sha256)
            await asyncio.to_thread(listed.write_bytes, msgspec.json.encode(manifest))
            await self._store.put(f"{_folder(partition)}/{manifest.data}", packed)
            await self._store.put(f"{_folder(partition)}/{name}{_MANIFEST}", listed)
        _log.info("snapshot written", partition=partition, position=int(checkpoint.cursor.position), bytes=size)
        await self._prune(partition, name)
        return manifest

    async def restore(
        self,
        state: StateStore,
        partition: int,
        *,
        local: Checkpoint | None,
        fence_offset: int,
        is_of_this_log: Callable[[Checkpoint], Awaitable[bool]],
    ) -> Checkpoint | None:
        """Let the newest good snapshot take the place of the state, if it is well ahead of it.

        Args:
            state: is replaced.
            partition: whose snapshot.
            local: how far the state is; None if it is not good for anything.
            fence_offset: nothing behind it has happened.
            is_of_this_log: whether the fence that a checkpoint names is in the log.

        Returns:
            The checkpoint of the new state; None if the old one stays.
        """
        try:
            names = sorted(await self._store.names(_folder(partition)), reverse=True)
        except Unavailable as error:
            _log.warning("snapshots ignored", partition=partition, reason=str(error))
            return None
        for name in names:
            if not name.endswith(_MANIFEST):
                continue
            try:
                async with _scratch(state.scratch) as folder:
                    manifest = await self._manifest(partition, name, folder)
                    await _check(manifest, partition, fence_offset, is_of_this_log)
                    position = manifest.checkpoint.cursor.position
                    if local is not None and position < local.cursor.position + self._ahead:
                        return None  # and so are those that follow
                    await self._load(state, manifest, folder)
            except (StateUnusable, Unavailable) as error:
                _log.warning("snapshot ignored", partition=partition, snapshot=name, reason=str(error))
            else:
                _log.info("state restored from a snapshot", partition=partition, snapshot=name, bytes=manifest.size)
                return manifest.checkpoint
        return None

    async def _manifest(self, partition: int, name: str, folder: Path) -> Manifest:
        listed = folder / "manifest"
        await self._store.get(f"{_folder(partition)}/{name}", listed)
        text = await asyncio.to_thread(listed.read_bytes)
        try:
            if (found := msgspec.json.decode(text, type=_Head).format) != FORMAT:
                raise StateUnusable(f"its format is {found!r}, that of this version {FORMAT!r}")
            return msgspec.json.decode(text, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StateUnusable(f"its manifest cannot be read: {error}") from error

    async def _load(self, state: StateStore, manifest: Manifest, folder: Path) -> None:
        packed, unpacked = folder / "packed", folder / "state"
        await self._store.get(f"{_folder(manifest.partition)}/{manifest.data}", packed)
        await asyncio.to_thread(_unpack, packed, unpacked, manifest)
        state.load(unpacked, manifest.checkpoint)

    async def _newest_position(self, state: StateStore, partition: int) -> int:
        """Of the newest snapshot that is not ahead of the state; 0 if there is none that this version can read."""
        checkpoint = state.checkpoint()
        try:
            names = [name for name in await self._store.names(_folder(partition)) if name.endswith(_MANIFEST)]
            past = [name for name in names if checkpoint and name <= _name(checkpoint) + _MANIFEST]
            async with _scratch(state.scratch) as folder:
                return (await self._manifest(partition, max(past), folder)).checkpoint.cursor.position if past else 0
        except (StateUnusable, Unavailable):
            return 0

    async def _prune(self, partition: int, newest: str) -> None:
        """Delete what is older than the newest `KEPT`. What is newer may be another writer's."""
        try:
            names = [name for name in await self._store.names(_folder(partition)) if name <= newest + _MANIFEST]
            kept = sorted(name for name in names if name.endswith(_MANIFEST))[-KEPT:]
            for name in sorted(names):
                if name < kept[0].removesuffix(_MANIFEST):
                    await self._store.delete(f"{_folder(partition)}/{name}")
        except Unavailable as error:
            _log.warning("old snapshots not deleted", partition=partition, reason=str(error))


async def _check(
    manifest: Manifest,
    partition: int,
    fence_offset: int,
    is_of_this_log: Callable[[Checkpoint], Awaitable[bool]],
) -> None:
    if manifest.partition != partition:
        raise StateUnusable(f"it is of partition {manifest.partition}")
    if manifest.checkpoint.cursor.offset > fence_offset:
        raise StateUnusable("it is from the future: the log is shorter")
    if not await is_of_this_log(manifest.checkpoint):
        raise StateUnusable("it is of another log: the fence that it names is not there")


def _folder(partition: int) -> str:
    return f"partition-{partition}"


def _name(checkpoint: Checkpoint) -> str:
    """Sorted by age; writers that fence each other have different ones."""
    return f"{checkpoint.cursor.offset:020}-{checkpoint.nonce[:8]}"


@asynccontextmanager
async def _scratch(place: Path) -> AsyncIterator[Path]:
    """A folder for a while.

    Raises:
        Unavailable: the disk is full or broken.
    """
    try:
        with TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as name:
            yield Path(name)
    except (OSError, cramjam.CompressionError) as error:
        raise Unavailable(f"the disk of the state: {error}") from error


def _pack(exported: Path, packed: Path) -> tuple[int, str]:
    cramjam.zstd.compress_into(cramjam.File(str(exported)), cramjam.File(str(packed)))
    return packed.stat().st_size, _sha256(packed)


def _unpack(packed: Path, unpacked: Path, manifest: Manifest) -> None:
    if (size := packed.stat().st_size) != manifest.size:
        raise StateUnusable(f"it has {size} bytes of {manifest.size}: its write was cut off")
    if _sha256(packed) != manifest.sha256:
        raise StateUnusable("it is damaged: its SHA-256 is another one")
    try:
        cramjam.zstd.decompress_into(cramjam.File(str(packed)), cramjam.File(str(unpacked)))
    except cramjam.DecompressionError as error:
        raise StateUnusable(f"it is damaged: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
