"""Where snapshots of the ingestors' states are kept: a place that all of them reach."""

import asyncio
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from shared.errors import Unavailable

_CHUNK_BYTES = 8 * 1024 * 1024


class SnapshotStore(Protocol):
    """Port: files by name, ``<folder>/<name>``. A file is there whole, or not at all.

    All of it may raise `Unavailable`: the place cannot be reached or is full, or the file is not there.
    """

    async def names(self, folder: str) -> list[str]:
        """What is in the folder, without its name: files, and perhaps the remains of writes that were cut off."""
        ...

    async def put(self, name: str, file: Path) -> None:
        """Keep a copy of ``file``, in place of what had the name."""
        ...

    async def get(self, name: str, file: Path) -> None:
        """Copy it into ``file``."""
        ...

    async def delete(self, name: str) -> None:
        """Forget it, if it is there."""
        ...


def open_snapshot_store(url: str) -> SnapshotStore:
    """The place behind ``file:///folder`` or ``s3://bucket/prefix``. It is not asked for anything yet."""
    parts = urlsplit(url)
    return FolderSnapshotStore(Path(unquote(parts.path))) if parts.scheme == "file" else S3SnapshotStore(url)


class FolderSnapshotStore:
    """Adapter for a folder, such as a network file system that all ingestors mount."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def names(self, folder: str) -> list[str]:
        with _translated(f"listing {folder}"):
            return await asyncio.to_thread(lambda: [file.name for file in (self._root / folder).glob("*")])

    async def put(self, name: str, file: Path) -> None:
        with _translated(f"writing {name}"):
            await asyncio.to_thread(self._put, self._root / name, file)

    async def get(self, name: str, file: Path) -> None:
        with _translated(f"reading {name}"):
            await asyncio.to_thread(shutil.copyfile, self._root / name, file)

    async def delete(self, name: str) -> None:
        with _translated(f"deleting {name}"):
            await asyncio.to_thread((self._root / name).unlink, missing_ok=True)

    @staticmethod
    def _put(place: Path, file: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(f"{place.name}.{uuid.uuid4().hex}.unfinished")
        try:
            shutil.copyfile(file, unfinished)
            _sync(unfinished)
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync(place.parent)


class S3SnapshotStore:
    """Adapter for S3 and what speaks its language. Endpoint, region and credentials come from ``AWS_…`` variables."""

    def __init__(self, url: str) -> None:
        self._store = S3Store.from_url(
            url,
            client_options={"connect_timeout": "5s", "read_timeout": "30s", "timeout": "1h", "allow_http": True},
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
        )

    async def names(self, folder: str) -> list[str]:
        with _translated(f"listing {folder}"):
            found = await obstore.list_with_delimiter_async(self._store, folder)
        return [one["path"].rpartition("/")[2] for one in found["objects"]]

    async def put(self, name: str, file: Path) -> None:
        with _translated(f"writing {name}"):
            await obstore.put_async(self._store, name, file)

    async def get(self, name: str, file: Path) -> None:
        with _translated(f"reading {name}"):
            found = await obstore.get_async(self._store, name)
            with await asyncio.to_thread(file.open, "wb") as target:
                async for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                    await asyncio.to_thread(target.write, chunk)

    async def delete(self, name: str) -> None:
        with _translated(f"deleting {name}"):
            await obstore.delete_async(self._store, name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise Unavailable(f"{what}: {str(error).partition('Debug source')[0].strip()}") from error
