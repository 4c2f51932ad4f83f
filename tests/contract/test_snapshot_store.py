"""One suite for every `SnapshotStore`: a folder, and S3 as moto's server speaks it."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingestor.snapshot_store import SnapshotStore, open_snapshot_store
from local.servers import free_port
from shared.errors import Unavailable
from tests.cluster import wait_until

BIG = os.urandom(11 * 1024 * 1024)
"""More than one part of an upload, and more than one chunk of a download."""


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 with an empty bucket."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: _answers(url), 60)
            urllib.request.urlopen(urllib.request.Request(f"{url}/snapshots", method="PUT")).close()
            yield url
        finally:
            server.terminate()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SnapshotStore:
    if request.param == "folder":
        return open_snapshot_store(f"file://{tmp_path}/a%20place/within")
    for name, value in _s3_settings(request.getfixturevalue("s3_url")).items():
        monkeypatch.setenv(name, value)
    return open_snapshot_store(f"s3://snapshots/{request.node.name.partition('[')[0]}")


def _s3_settings(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


async def test_a_new_place_is_empty(store: SnapshotStore) -> None:
    assert await store.names("partition-0") == []


@pytest.mark.parametrize("content", [b"", b"state", BIG], ids=["empty", "small", "big"])
async def test_a_file_comes_back_as_it_was(store: SnapshotStore, file: Path, content: bytes) -> None:
    file.write_bytes(content)
    await store.put("partition-0/one.state", file)
    back = file.with_name("back")
    await store.get("partition-0/one.state", back)
    assert back.read_bytes() == content


async def test_a_folder_lists_what_is_in_it_and_no_other(store: SnapshotStore, file: Path) -> None:
    file.write_bytes(b"x")
    for name in ("partition-1/b.json", "partition-1/a.state", "partition-10/c.json"):
        await store.put(name, file)
    assert sorted(await store.names("partition-1")) == ["a.state", "b.json"]


async def test_a_later_write_replaces(store: SnapshotStore, file: Path) -> None:
    for content in (b"long before", b"after"):
        file.write_bytes(content)
        await store.put("partition-0/one", file)
    await store.get("partition-0/one", file)
    assert file.read_bytes() == b"after"
    assert await store.names("partition-0") == ["one"]


async def test_what_is_deleted_is_gone_and_may_be_deleted_again(store: SnapshotStore, file: Path) -> None:
    file.write_bytes(b"x")
    await store.put("partition-0/one", file)
    await store.delete("partition-0/one")
    await store.delete("partition-0/one")
    assert await store.names("partition-0") == []
    with pytest.raises(Unavailable):
        await store.get("partition-0/one", file)


async def test_a_write_that_is_cut_off_leaves_the_file_as_it_was(store: SnapshotStore, file: Path) -> None:
    file.write_bytes(b"before")
    await store.put("partition-0/one", file)
    with pytest.raises(Unavailable):
        await store.put("partition-0/one", file.with_name("there is no such file"))
    await store.get("partition-0/one", file)
    assert file.read_bytes() == b"before"
    assert await store.names("partition-0") == ["one"]


@pytest.mark.parametrize("kind", ["file", "s3"])
async def test_a_place_that_cannot_be_reached_is_unavailable(
    kind: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(b"x")
    for name, value in _s3_settings("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    away = open_snapshot_store(f"file://{file}" if kind == "file" else "s3://snapshots/away")
    with pytest.raises(Unavailable, match="writing partition-0/one"):
        await away.put("partition-0/one", file)
    with pytest.raises(Unavailable, match="reading partition-0/one"):
        await away.get("partition-0/one", file)
