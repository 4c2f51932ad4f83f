"""One suite for every `StateStore`."""

import multiprocessing
import os
import resource
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec import Raw

from ingestor.domain.state import Changes, Episode, RecordedItem, StoredReceipt, episode_key, item_key, receipt_key
from ingestor.state import Checkpoint, StateStore, StateUnusable, open_state
from shared.errors import Unavailable
from shared.events import FolderRef
from shared.ids import CommandId, EventId, Position, StreamId
from shared.log import Cursor
from shared.receipts import CommandRefused, Receipt
from tests.fakes import InMemoryStateStore
from tests.spec import NOON

STREAM = StreamId("namespace:alice")
FIRST = Checkpoint(Cursor(5, 0, Position(4)), "nonce", 3)
SECOND = Checkpoint(Cursor(9, 0, Position(8)), "nonce", 6)
MAP_BYTES = 1024**3


@pytest.fixture(params=["memory", "lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateStore]:
    if request.param == "memory":
        yield InMemoryStateStore()
    else:
        with open_state(tmp_path, 0, map_bytes=MAP_BYTES) as lmdb_store:
            yield lmdb_store


def an_episode(name: str) -> Episode:
    return Episode(
        id="a" * 24,
        project_id="b" * 24,
        name=name,
        description=None,
        tags=("x", "y"),
        status="running",
        write_protected=False,
        folder=FolderRef("c" * 24, "/a/b"),
        metadata=Raw(b'{"n":18446744073709551616}'),
        created_at=NOON,
        updated_at=NOON,
    )


def a_receipt(*, hours: int) -> StoredReceipt:
    receipt = Receipt(
        command_id=CommandId("c"), stream=STREAM, event_id=EventId(1), outcome=CommandRefused("gone", "It is gone.")
    )
    return StoredReceipt("hash", NOON + timedelta(hours=hours), receipt)


def test_new_state_knows_nothing(store: StateStore) -> None:
    assert store.checkpoint() is None
    assert store.get(episode_key(STREAM, "robotics", "run-1")) is None


def test_values_come_back_as_they_were(store: StateStore) -> None:
    long_name = "\N{PILE OF POO}" * 255
    changes: Changes = {
        episode_key(STREAM, "robotics", long_name): an_episode(long_name),
        item_key(STREAM, "k"): RecordedItem(EventId(7), "ep_1"),
        receipt_key(STREAM, "k"): a_receipt(hours=0),
    }
    store.apply(changes, FIRST)
    assert {key: store.get(key) for key in changes} == changes
    assert store.checkpoint() == FIRST


def test_a_later_change_replaces_and_removes(store: StateStore) -> None:
    old, new = episode_key(STREAM, "robotics", "old"), episode_key(STREAM, "robotics", "new")
    store.apply({old: an_episode("old")}, FIRST)
    store.apply({old: None, new: an_episode("new")}, SECOND)
    assert store.get(old) is None
    assert store.get(new) == an_episode("new")
    assert store.checkpoint() == SECOND


def test_keys_that_look_alike_are_different(store: StateStore) -> None:
    store.apply({episode_key(STREAM, "a", "b/c"): an_episode("b/c")}, FIRST)
    assert store.get(episode_key(STREAM, "a/b", "c")) is None


def test_old_receipts_are_forgotten_and_newer_ones_kept(store: StateStore) -> None:
    old, new, again = (receipt_key(STREAM, name) for name in ("old", "new", "again"))
    store.apply({old: a_receipt(hours=0), new: a_receipt(hours=2), again: a_receipt(hours=0)}, FIRST)
    store.apply({again: a_receipt(hours=3)}, SECOND)
    store.forget_receipts(NOON + timedelta(hours=1))
    assert store.get(old) is None
    assert store.get(new) == a_receipt(hours=2)
    assert store.get(again) == a_receipt(hours=3)


def test_a_cleared_store_is_as_new(store: StateStore) -> None:
    store.apply({item_key(STREAM, "k"): RecordedItem(EventId(7), "ep_1")}, FIRST)
    store.clear()
    assert store.checkpoint() is None
    assert store.get(item_key(STREAM, "k")) is None


def test_exported_state_takes_the_place_of_another(store: StateStore, tmp_path: Path) -> None:
    kept, later = item_key(STREAM, "kept"), item_key(STREAM, "later")
    store.apply({kept: RecordedItem(EventId(7), "ep_1"), receipt_key(STREAM, "r"): a_receipt(hours=0)}, FIRST)
    assert store.export(tmp_path / "exported") == FIRST
    store.apply({kept: None, later: RecordedItem(EventId(8), "ep_2")}, SECOND)
    assert store.get(later) is not None

    store.load(tmp_path / "exported", FIRST)
    assert store.checkpoint() == FIRST
    assert store.get(kept) == RecordedItem(EventId(7), "ep_1")
    assert store.get(later) is None
    store.forget_receipts(NOON + timedelta(hours=1))
    assert store.get(receipt_key(STREAM, "r")) is None
    store.apply({later: RecordedItem(EventId(8), "ep_2")}, SECOND)
    assert store.get(later) == RecordedItem(EventId(8), "ep_2")


@pytest.mark.parametrize("what", ["nothing", "junk", "another checkpoint"])
def test_what_is_no_such_export_changes_nothing(store: StateStore, tmp_path: Path, what: str) -> None:
    store.apply({item_key(STREAM, "k"): RecordedItem(EventId(7), "ep_1")}, FIRST)
    file = tmp_path / "exported"
    if what == "another checkpoint":
        store.export(file)
    else:
        file.write_bytes(b"" if what == "nothing" else b"\xff" * 8192)
    with pytest.raises(StateUnusable):
        store.load(file, SECOND)
    assert store.checkpoint() == FIRST
    assert store.get(item_key(STREAM, "k")) == RecordedItem(EventId(7), "ep_1")


def test_long_keys_and_short_ones_are_swept_alike(store: StateStore) -> None:
    keys = [receipt_key(STREAM, "k" * length) for length in (1, 200, 470, 480, 490, 510, 600, 5_000)]
    store.apply({key: a_receipt(hours=0) for key in keys}, FIRST)
    assert [store.get(key) for key in keys] == [a_receipt(hours=0)] * len(keys)
    store.forget_receipts(NOON + timedelta(hours=1))
    assert [store.get(key) for key in keys] == [None] * len(keys)


def test_an_lmdb_export_is_of_one_moment_while_changes_go_on(tmp_path: Path) -> None:
    with open_state(tmp_path / "from", 0, map_bytes=MAP_BYTES) as store:
        keys = [item_key(STREAM, str(number)) for number in range(2_000)]
        going_on = threading.Event()
        exported: list[Checkpoint] = []

        def export() -> None:
            going_on.wait()
            exported.append(store.export(tmp_path / "exported"))

        exporting = threading.Thread(target=export)
        exporting.start()
        for moment in range(1, 400):
            value = RecordedItem(EventId(moment), "ep")
            store.apply(dict.fromkeys(keys[:: 1 if moment < 2 else 7], value), Checkpoint(Cursor(moment), "n", moment))
            going_on.set()
        exporting.join()
    with open_state(tmp_path / "to", 0, map_bytes=MAP_BYTES) as store:
        store.load(tmp_path / "exported", exported[0])
        assert {store.get(key) for key in keys[::7]} == {RecordedItem(EventId(exported[0].command_offset), "ep")}


def keep_one_value(folder: Path) -> None:
    with open_state(folder, 0, map_bytes=MAP_BYTES) as store:
        store.apply({item_key(STREAM, "k"): RecordedItem(EventId(7), "ep_1")}, FIRST)


def found_checkpoint(folder: Path) -> Checkpoint | None:
    with open_state(folder, 0, map_bytes=MAP_BYTES) as store:
        return store.checkpoint()


def test_lmdb_state_outlives_its_process(tmp_path: Path) -> None:
    keep_one_value(tmp_path)
    assert found_checkpoint(tmp_path) == FIRST


def test_lmdb_state_of_another_boot_or_format_is_thrown_away(tmp_path: Path) -> None:
    keep_one_value(tmp_path)
    (tmp_path / "partition-0" / "stamp").write_text("1 another-boot")
    assert found_checkpoint(tmp_path) is None


def test_a_damaged_lmdb_file_is_thrown_away(tmp_path: Path) -> None:
    keep_one_value(tmp_path)
    (tmp_path / "partition-0" / "data.mdb").write_bytes(b"\xff" * 8192)
    assert found_checkpoint(tmp_path) is None
    keep_one_value(tmp_path)
    assert found_checkpoint(tmp_path) == FIRST


def keep_many_values(folder: Path) -> None:
    with open_state(folder, 0, map_bytes=MAP_BYTES) as store:
        store.apply({item_key(STREAM, f"k{each}"): RecordedItem(EventId(7), "ep_1" * 50) for each in range(999)}, FIRST)


def in_another_process(work: Callable[[Path], object], folder: Path) -> int | None:
    """The exit status: a fault in a mapped file ends the process that touches it."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(folder,))
    process.start()
    process.join()
    return process.exitcode


def see_nothing_and_begin_anew(folder: Path) -> None:
    assert found_checkpoint(folder) is None
    keep_many_values(folder)
    assert found_checkpoint(folder) == FIRST


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.95])
def test_an_lmdb_file_that_was_cut_off_is_thrown_away(tmp_path: Path, left: float) -> None:
    keep_many_values(tmp_path)
    file = tmp_path / "partition-0" / "data.mdb"
    os.truncate(file, int(left * file.stat().st_size))
    assert in_another_process(see_nothing_and_begin_anew, tmp_path) == 0


def test_an_lmdb_file_whose_last_pages_were_given_back_is_kept(tmp_path: Path) -> None:
    keys = [b"%d" % each for each in range(300)]
    for moment in range(1, 20):
        with open_state(tmp_path, 0, map_bytes=MAP_BYTES) as store:
            assert store.checkpoint() == (Checkpoint(Cursor(moment - 1), "n", 0) if moment > 1 else None)
            store.apply({item_key(STREAM, f"k{moment}"): RecordedItem(EventId(1), "ep")}, FIRST)
            with store._changing() as txn:  # what a transaction takes and gives back, LMDB counts and does not write
                for key in keys:
                    txn.put(key, bytes(2_500), db=store._values)
                for key in keys:
                    txn.delete(key, db=store._values)
            store.apply({}, Checkpoint(Cursor(moment), "n", 0))


def fill_the_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    with pytest.raises(Unavailable, match="the stored state cannot be written"):
        keep_many_values(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    keep_many_values(folder)


def test_a_full_disk_is_a_reason_to_wait(tmp_path: Path) -> None:
    assert in_another_process(fill_the_disk, tmp_path) == 0


def test_two_processes_never_share_an_lmdb_environment(tmp_path: Path) -> None:
    with open_state(tmp_path, 0, map_bytes=MAP_BYTES) as first, open_state(tmp_path, 0, map_bytes=MAP_BYTES) as second:
        first.apply({item_key(STREAM, "k"): RecordedItem(EventId(7), "ep_1")}, FIRST)
        assert second.checkpoint() is None
