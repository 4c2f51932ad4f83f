"""Snapshots: the newest good one counts, whatever else lies beside it."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cramjam
import msgspec
import pytest
from structlog.testing import capture_logs

from ingestor import snapshots as module
from ingestor.domain.state import Key, Value, item_key
from ingestor.domain.state import RecordedItem as Item
from ingestor.snapshot_store import FolderSnapshotStore
from ingestor.snapshots import Manifest, Snapshots
from ingestor.state import Checkpoint
from shared.errors import Unavailable
from shared.ids import EventId, Position, StreamId
from shared.log import Cursor
from shared.threads import in_thread
from tests.fakes import InMemoryStateStore

NONCE = "0123456789"
KEY = item_key(StreamId("tenant:acme"), "k")


class Place(FolderSnapshotStore):
    """A folder that can be away."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root
        self.away = False

    async def put(self, name: str, file: Path) -> None:
        if self.away:
            raise Unavailable("the place is away")
        await super().put(name, file)

    async def names(self, folder: str) -> list[str]:
        if self.away:
            raise Unavailable("the place is away")
        return await super().names(folder)

    @property
    def files(self) -> list[Path]:
        return sorted(self.root.glob("partition-0/*"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "shared")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir()), "something was left behind"


def at(offset: int, nonce: str = NONCE) -> Checkpoint:
    """A checkpoint whose position is its offset."""
    return Checkpoint(Cursor(offset, 0, Position(offset)), nonce, offset)


def state_at(offset: int, scratch: Path) -> InMemoryStateStore:
    state = InMemoryStateStore(scratch)
    state.apply({KEY: Item(EventId(offset), "ep")}, at(offset))
    return state


def snapshots(place: Place, *, every: int = 10, ahead: int = 10) -> Snapshots:
    return Snapshots(place, every=every, ahead=ahead)


async def write(place: Place, scratch: Path, *offsets: int) -> None:
    for offset in offsets:
        await snapshots(place).write(state_at(offset, scratch), 0)


async def restored(
    place: Place, scratch: Path, *, local: int | None = None, fence_offset: int = 1_000, nonce: str = NONCE
) -> dict[Key, Value]:
    """What the state is after looking for a snapshot; it was ``local`` before."""
    state = InMemoryStateStore(scratch) if local is None else state_at(local, scratch)

    async def is_of_this_log(checkpoint: Checkpoint) -> bool:
        return checkpoint.nonce == nonce

    found = await snapshots(place).restore(
        state, 0, local=state.checkpoint(), fence_offset=fence_offset, is_of_this_log=is_of_this_log
    )
    assert found is None or found == state.checkpoint()
    return state.values


async def test_the_newest_snapshot_becomes_the_state(place: Place, scratch: Path) -> None:
    await write(place, scratch, 100, 200)
    assert await restored(place, scratch) == {KEY: Item(EventId(200), "ep")}


async def test_where_there_is_none_the_state_stays(place: Place, scratch: Path) -> None:
    assert await restored(place, scratch) == {}
    assert await restored(place, scratch, local=50) == {KEY: Item(EventId(50), "ep")}


@pytest.mark.parametrize(("local", "after"), [(190, 200), (191, 191), (200, 200), (300, 300)])
async def test_a_snapshot_is_used_if_it_is_well_ahead(place: Place, scratch: Path, local: int, after: int) -> None:
    await write(place, scratch, 100, 200)
    assert await restored(place, scratch, local=local) == {KEY: Item(EventId(after), "ep")}


def _flip_a_byte(files: list[Path]) -> None:
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(content)


def _cut_off(files: list[Path]) -> None:
    files[-1].write_bytes(files[-1].read_bytes()[:-7])


def _swap_the_states(files: list[Path]) -> None:
    older = msgspec.json.decode(files[0].read_bytes(), type=Manifest)
    _change_manifest(data=older.data, size=older.size, sha256=older.sha256)(files)


def _change_manifest(**changes: object) -> Callable[[list[Path]], None]:
    def change(files: list[Path]) -> None:
        manifest = msgspec.json.decode(files[-2].read_bytes())
        files[-2].write_bytes(msgspec.json.encode(manifest | changes))

    return change


BAD = {
    "a damaged state": (_flip_a_byte, "it is damaged: its SHA-256 is another one"),
    "a cut-off state": (_cut_off, "its write was cut off"),
    "a state that is not there": (lambda files: files[-1].unlink(), "No such file"),
    "a manifest that is not JSON": (lambda files: files[-2].write_bytes(b"{"), "its manifest cannot be read"),
    "a manifest that is not UTF-8": (
        lambda files: files[-2].write_bytes(b'{"format":"\xff"}'),
        "manifest cannot be read",
    ),
    "a manifest of another kind": (lambda files: files[-2].write_bytes(b'{"format":2}'), "its manifest cannot be read"),
    "another format": (_change_manifest(format="99/x", size="unknown"), "its format is '99/x'"),
    "another partition": (_change_manifest(partition=7), "it is of partition 7"),
    "another log": (_change_manifest(checkpoint=msgspec.to_builtins(at(200, "other"))), "it is of another log"),
    "the future": (_change_manifest(checkpoint=msgspec.to_builtins(at(1_001))), "it is from the future"),
    "the state of another moment": (_swap_the_states, "the state is that of"),
    "a state that is none": (
        lambda files: _change_manifest(size=7, sha256=_SHA256_OF_1234567)([*files[:-1], _written(files[-1])]),
        "it is damaged",
    ),
}
_SHA256_OF_1234567 = "8bb0cf6eb9b17d0f7d22b456f121257dc1254e1f01665370476383ea776df414"


def _written(file: Path) -> Path:
    file.write_bytes(b"1234567")
    return file


@pytest.mark.parametrize("bad", BAD)
async def test_a_bad_snapshot_is_ignored_with_a_warning_and_the_one_before_it_serves(
    place: Place, scratch: Path, bad: str
) -> None:
    await write(place, scratch, 100, 200)
    spoil, why = BAD[bad]
    spoil(place.files)
    with capture_logs() as logs:
        assert await restored(place, scratch) == {KEY: Item(EventId(100), "ep")}
    [warning] = [entry for entry in logs if entry["log_level"] == "warning"]
    assert warning["event"] == "snapshot ignored"
    assert why in warning["reason"]
    for file in place.files[:2]:
        file.unlink()
    assert await restored(place, scratch, local=50) == {KEY: Item(EventId(50), "ep")}


async def test_a_snapshot_up_to_our_fence_is_not_of_the_future(place: Place, scratch: Path) -> None:
    await write(place, scratch, 100)
    assert await restored(place, scratch, fence_offset=100)
    assert not await restored(place, scratch, fence_offset=99)


async def test_a_place_that_is_away_does_not_matter(place: Place, scratch: Path) -> None:
    place.away = True
    with capture_logs() as logs:
        assert await restored(place, scratch, local=50) == {KEY: Item(EventId(50), "ep")}
    assert [entry["event"] for entry in logs] == ["snapshots ignored"]


async def test_two_snapshots_are_kept_and_no_remains_of_others(place: Place, scratch: Path) -> None:
    await write(place, scratch, 100, 200, 900)
    (place.root / "partition-0" / f"{150:020}-01234567.state").write_bytes(b"its manifest was never written")
    (place.root / "partition-0" / f"{150:020}-01234567.state.abc.unfinished").write_bytes(b"killed meanwhile")
    await write(place, scratch, 300, 400)
    there = {int(file.name[:20]) for file in place.files}
    assert there == {300, 400, 900}, "a later one may be another writer's"
    assert len(place.files) == 6


class Watched(InMemoryStateStore):
    """Counts how often it was looked at."""

    looks = 0

    def checkpoint(self) -> Checkpoint | None:
        self.looks += 1
        return super().checkpoint()

    async def is_looked_at(self) -> None:
        seen = self.looks
        await until(lambda: self.looks >= seen + 3)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def test_a_snapshot_is_written_whenever_so_many_more_records_are_stored(
    place: Place, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.001)
    await write(place, scratch, 100)
    state = Watched(scratch)
    state.apply({}, at(109))
    keeping = asyncio.create_task(snapshots(place, every=10).keep(state, 0))
    await state.is_looked_at()
    assert len(place.files) == 2
    place.away = True
    state.apply({}, at(110))
    await state.is_looked_at()
    assert len(place.files) == 2
    place.away = False
    await until(lambda: len(place.files) == 4)
    state.apply({}, at(119))
    await state.is_looked_at()
    assert [int(file.name[:20]) for file in place.files] == [100, 100, 110, 110]
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_snapshot_of_the_future_does_not_keep_us_from_writing_ours(
    place: Place, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.001)
    await write(place, scratch, 900)
    keeping = asyncio.create_task(snapshots(place, every=10).keep(state_at(100, scratch), 0))
    await until(lambda: len(place.files) == 4)
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_full_disk_is_no_bug(place: Place, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="the disk of the state"):
        await write(place, scratch / "is not there", 100)
    await write(place, scratch, 100)
    monkeypatch.setattr(
        module,
        "_pack",
        lambda exported, _: cramjam.zstd.compress_into(cramjam.File(str(exported)), cramjam.File("/dev/full")),
    )
    with pytest.raises(Unavailable, match="No space left on device"):
        await write(place, scratch, 200)
    assert await restored(place, scratch) == {KEY: Item(EventId(100), "ep")}


async def test_the_state_is_not_closed_while_it_is_exported(place: Place, scratch: Path) -> None:
    going_on, may_end = threading.Event(), threading.Event()

    class Slow(InMemoryStateStore):
        def export(self, file: Path) -> Checkpoint:
            going_on.set()
            may_end.wait(30)
            return super().export(file)

    state = Slow(scratch)
    state.apply({}, at(100))
    writing = asyncio.create_task(snapshots(place).write(state, 0))
    await asyncio.to_thread(going_on.wait, 30)
    writing.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not writing.done()
    may_end.set()
    await asyncio.wait([writing])
    assert writing.cancelled()
    assert not place.files


async def test_who_is_cancelled_waits_until_the_thread_is_done_with_the_state() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(10)

    task = asyncio.ensure_future(in_thread(None, work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
