"""Whatever bytes a decoder is given: a value, or the one error that it documents. Never another one, never a hang."""

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import cramjam
import lmdb
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.entities import WordListExtractor
from gateway.exchange import _parsed
from gateway.problems import Problem
from gateway.requests import as_object, patch_episode, record_episodes, upsert_episode
from ingestor.domain.state import (
    VALUE_TYPES,
    Episode,
    Folder,
    Namespace,
    Project,
    RecordedItem,
    StoredReceipt,
    StreamHead,
    Value,
    episode_key,
)
from ingestor.snapshot_store import FolderSnapshotStore
from ingestor.snapshots import Snapshots
from ingestor.state import Checkpoint, StateUnusable, open_state
from shared.archive.files import ArchiveRefused, FileWriter, Mark, Source, read_file, read_manifest, write_manifest
from shared.codec import (
    decode_command,
    decode_receipt,
    decode_record,
    encode_command,
    encode_receipt,
    encode_record,
)
from shared.errors import PoisonRecord, Unavailable
from shared.events import LoggedEvent
from shared.ids import CommandId, EventId, Position, StreamId
from shared.log import Cursor, LogReader
from shared.receipts import CommandRefused, Receipt
from tests.builders import batch, delete, item, patch, restore, upsert
from tests.event_log import History, PartitionLog
from tests.fakes import InMemoryStateStore
from tests.spec import NOON

SAMPLES = [path.read_bytes().strip() for path in sorted((Path(__file__).parents[1] / "samples").glob("*.json"))]
COMMANDS = [encode_command(command) for command in (upsert(), patch(), delete(), restore(), batch(item(), item()))]
STREAM = StreamId("namespace:alice")
RECEIPTS = [
    encode_receipt(
        Receipt(
            command_id=CommandId("c"), stream=STREAM, event_id=EventId(1), outcome=CommandRefused("gone", "It is gone.")
        )
    )
]
MAP_BYTES = 16 * 1024 * 1024
CHECKPOINT = Checkpoint(Cursor(9, 0, Position(8)), "nonce", 6)

ODD = [
    b"",
    b"\x00",
    b"null",
    b"[]",
    b"{}",
    b'"\xff"',
    b'{"type":null}',
    b"[" * 5_000,
    b'{"data":' * 5_000,
    b'{"a":1' + b"0" * 5_000 + b"}",
    b'{"a":1e400}',
    b'{"a":"\\ud800"}',
]
WORDS = [*ODD, b'"', b"\\", b",", b"}", b"-", b"1e999", b"\\u0000", b"\xed\xa0\x80", b"9" * 400, b"[" * 2_000]

quickly = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
with_files = settings(quickly, max_examples=60)


@st.composite
def mutated(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """Draw what was valid, and is changed in some places: bits flipped, cut, repeated, other words put in."""
    value = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(value)))
        match draw(st.sampled_from(["flip", "cut", "cut out", "repeat", "splice", "put in"])):
            case "flip" if at < len(value):
                value[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del value[at:]
            case "cut out":
                del value[at : at + draw(st.integers(1, 40))]
            case "repeat":
                value[at:at] = value[at : at + draw(st.integers(1, 40))]
            case "splice":
                other = draw(st.sampled_from(valid))
                value[at:] = other[draw(st.integers(0, len(other))) :]
            case _:
                value[at:at] = draw(st.sampled_from(WORDS))
    return bytes(value)


def any_of(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=200), st.sampled_from(ODD), mutated(valid))


# --- what stands in Kafka


def decoded_or_poison(decode: Callable[[bytes], Any], value: bytes) -> Any:
    try:
        return decode(value)
    except PoisonRecord:
        return None


@quickly
@given(any_of(SAMPLES))
def test_any_bytes_are_a_record_of_the_log_or_poison(value: bytes) -> None:
    record = decoded_or_poison(decode_record, value)
    if record is not None:
        assert decode_record(encode_record(record, at=NOON)) == record


@quickly
@given(any_of(COMMANDS))
def test_any_bytes_are_a_command_or_poison(value: bytes) -> None:
    command = decoded_or_poison(decode_command, value)
    if command is not None:
        assert decode_command(encode_command(command)) == command


@quickly
@given(any_of(RECEIPTS))
def test_any_bytes_are_a_receipt_or_poison(value: bytes) -> None:
    receipt = decoded_or_poison(decode_receipt, value)
    if receipt is not None:
        assert decode_receipt(encode_receipt(receipt)) == receipt


@quickly
@given(st.lists(any_of(SAMPLES), max_size=8))
def test_a_reader_of_any_log_goes_on_or_stops_at_poison(values: list[bytes]) -> None:
    reader = LogReader(Cursor())
    for offset, value in enumerate(values):
        try:
            reader.read(offset, value)
        except PoisonRecord:
            return


# --- what stands in a request


UPSERT = {
    "name": "run",
    "description": "d",
    "tags": ["a"],
    "folder": "/a/b",
    "writeProtected": False,
    "status": "failed",
    "metadata": {"a": [1]},
}
ITEM = {
    "type": "message",
    "content": "At https://a.b/c Ada Lovelace met @bob.",
    "source": "s",
    "author": "a",
    "channel": "c",
    "timestamp": "2026-03-15T09:00:00+05:30",
    "metadata": {"a": {"b": []}},
    "entities": [{"name": "Kafka", "type": "technology"}],
    "idempotency_key": "k",
}
BATCH = {"tenant_id": "acme", "namespace": "n", "episodes": [ITEM]}
BODIES = [msgspec.json.encode(UPSERT), msgspec.json.encode(BATCH)]


@quickly
@given(any_of(BODIES))
@example(b'{"name":"a","metadata":' + b'{"a":' * 499 + b"1" + b"}" * 499 + b"}")
def test_any_body_is_a_command_or_a_problem(value: bytes) -> None:
    for read in (upsert_episode, patch_episode, lambda body: record_episodes(body, WordListExtractor())):
        with contextlib.suppress(Problem):
            read(as_object(_parsed(value)))


# --- what stands on the ingestor's disk


def an_episode() -> Episode:
    return Episode(
        id="a" * 24,
        project_id="b" * 24,
        name="run",
        description=None,
        tags=(),
        status="running",
        write_protected=False,
        folder=None,
        metadata=msgspec.Raw(b"{}"),
        created_at=NOON,
        updated_at=NOON,
    )


KEY = episode_key(STREAM, "robotics", "run")


@pytest.fixture(scope="module")
def exported() -> bytes:
    """An LMDB file with one episode and a checkpoint."""
    with tempfile.TemporaryDirectory() as folder, open_state(Path(folder), 0, map_bytes=MAP_BYTES) as state:
        state.apply({KEY: an_episode()}, CHECKPOINT)
        state.export(Path(folder) / "exported")
        return (Path(folder) / "exported").read_bytes()


@with_files
@given(value=any_of([msgspec.json.encode(CHECKPOINT)]))
@example(b"[" * 5_000)
@example(b'{"nonce":"\xff"}')
def test_a_checkpoint_of_any_bytes_is_thrown_away_with_the_state(value: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_state(folder, 0, map_bytes=MAP_BYTES) as state:
            state.apply({KEY: an_episode()}, CHECKPOINT)
        with lmdb.open(str(folder / "partition-0"), map_size=MAP_BYTES, max_dbs=3) as env:
            meta = env.open_db(b"meta")
            with env.begin(write=True, db=meta) as txn:
                txn.put(b"checkpoint", value)
        with capture_logs(), open_state(folder, 0, map_bytes=MAP_BYTES) as state:
            found = state.checkpoint()
            assert found is None or state.get(KEY) == an_episode()
            state.apply({KEY: an_episode()}, CHECKPOINT)
            assert (state.checkpoint(), state.get(KEY)) == (CHECKPOINT, an_episode())


VALUES: dict[str, Value] = {
    "head": StreamHead(EventId(9), NOON),
    "namespace": Namespace("a" * 24, "alice"),
    "project": Project("b" * 24, "robotics", 2),
    "folder": Folder("c" * 24),
    "episode": an_episode(),
    "item": RecordedItem(EventId(9), "ep_1"),
    "receipt": StoredReceipt("hash", NOON, decode_receipt(RECEIPTS[0])),
}


@pytest.mark.parametrize("kind", VALUE_TYPES)
@with_files
@given(data=st.data())
def test_a_stored_value_of_any_bytes_is_a_value_or_the_state_is_thrown_away(kind: str, data: st.DataObject) -> None:
    key, other = (kind, STREAM, "x"), (kind, STREAM, "y")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_state(folder, 0, map_bytes=MAP_BYTES) as state:
            state.apply({key: VALUES[kind], other: VALUES[kind]}, CHECKPOINT)
        with lmdb.open(str(folder / "partition-0"), map_size=MAP_BYTES, max_dbs=3) as env:
            values = env.open_db(b"values")
            with env.begin(write=True, db=values) as txn:
                [(stored_key, stored), *_] = txn.cursor().iternext()
                txn.put(stored_key, data.draw(any_of([bytes(stored)])))
        with capture_logs(), open_state(folder, 0, map_bytes=MAP_BYTES) as state:
            assert state.get(other) == VALUES[kind]
            try:
                found = state.get(key)
                state.forget_receipts(NOON + timedelta(days=1))
            except Unavailable as error:
                assert "is damaged" in str(error)  # noqa: PT017 - either is right
                kept = None
            else:
                assert isinstance(found, VALUE_TYPES[kind])
                kept = CHECKPOINT
        with capture_logs(), open_state(folder, 0, map_bytes=MAP_BYTES) as state:
            assert state.checkpoint() == kept
            if kept is None:
                assert state.get(other) is None


# --- snapshots, in a place that others can write to


@st.composite
def damaged(draw: st.DrawFn, size: int) -> Callable[[bytes], bytes]:
    """Draw a way to damage a file."""
    at, length = draw(st.integers(0, size - 1)), draw(st.integers(1, 64))
    what = draw(st.sampled_from(["flip", "cut", "cut out", "other", "zeros"]))
    other = draw(st.binary(max_size=64))

    def damage(value: bytes) -> bytes:
        match what:
            case "flip":
                return value[:at] + bytes([value[at] ^ 0x40]) + value[at + 1 :]
            case "cut":
                return value[:at]
            case "cut out":
                return value[:at] + value[at + length :]
            case "zeros":
                return value[:at] + bytes(length) + value[at + length :]
            case _:
                return other

    return damage


def restored(place: Path, state: InMemoryStateStore | Any) -> Checkpoint | None:
    async def restore() -> Checkpoint | None:
        async def is_of_this_log(_: Checkpoint) -> bool:
            return True

        snapshots = Snapshots(FolderSnapshotStore(place), every=1, ahead=1)
        return await snapshots.restore(state, 0, local=None, fence_offset=100, is_of_this_log=is_of_this_log)

    with capture_logs():
        return asyncio.run(restore())


def snapshot_in(place: Path, scratch: Path) -> tuple[Path, Path]:
    """Write a snapshot; give its manifest and its data."""
    scratch.mkdir()
    state = InMemoryStateStore(scratch)
    state.apply({KEY: an_episode()}, CHECKPOINT)
    asyncio.run(Snapshots(FolderSnapshotStore(place), every=1, ahead=1).write(state, 0))
    (manifest,) = (place / "partition-0").glob("*.json")
    (data,) = (place / "partition-0").glob("*.state")
    return manifest, data


MANIFEST = b'{"format":"2/lmdb/zstd","partition":0,"checkpoint":{"cursor":{"offset":9,"fence":0,"position":8}}}'


@with_files
@given(any_of([MANIFEST]))
@example(b'{"data":' * 5_000)
@example(b'{"format":"\xff"}')
def test_a_manifest_of_any_bytes_is_ignored_or_right(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        place, scratch = Path(name) / "place", Path(name) / "scratch"
        manifest, _ = snapshot_in(place, scratch)
        manifest.write_bytes(text)
        state = InMemoryStateStore(scratch)
        found = restored(place, state)
        assert state.values == ({} if found is None else {KEY: an_episode()})


@with_files
@given(st.data())
def test_a_damaged_snapshot_is_ignored(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        place, scratch = Path(name) / "place", Path(name) / "scratch"
        _, packed = snapshot_in(place, scratch)
        before = packed.read_bytes()
        packed.write_bytes(data.draw(damaged(len(before)))(before))
        state = InMemoryStateStore(scratch)
        found = restored(place, state)
        assert (found is not None) == (packed.read_bytes() == before)
        assert state.values == ({} if found is None else {KEY: an_episode()})


@with_files
@given(data=st.data())
def test_an_exported_state_of_any_bytes_is_unusable_or_right(data: st.DataObject, exported: bytes) -> None:
    with tempfile.TemporaryDirectory() as name, open_state(Path(name), 0, map_bytes=MAP_BYTES) as state:
        file = Path(name) / "file"
        # LMDB checks its head and trusts its pages: those are what the SHA-256 in the manifest is for.
        size = data.draw(st.integers(0, 4096))
        file.write_bytes(data.draw(st.one_of(st.just(exported[:size]), st.binary(max_size=8192))))
        with pytest.raises(StateUnusable):
            state.load(file, CHECKPOINT)
        assert state.checkpoint() is None


def test_a_snapshot_that_unpacks_to_very_much_ends_at_its_announced_size(tmp_path: Path) -> None:
    manifest, packed = snapshot_in(tmp_path / "place", tmp_path / "scratch")
    packed.write_bytes(bytes(cramjam.zstd.compress(bytes(256 * 1024 * 1024))))
    assert restored(tmp_path / "place", InMemoryStateStore(tmp_path / "scratch")) is None
    assert manifest.exists()


# --- archives


@pytest.fixture(scope="module")
def archive() -> Iterator[Path]:
    log = PartitionLog()
    history = History(log, Random(1), prefix="p-")  # noqa: S311 - examples, no secrets
    for _ in range(20):
        history.step()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Source(cluster="a", topic="episodes.events", partitions=1, stream=None)
        writer = FileWriter(folder, source, 0)
        for number, record in enumerate(log.events, 1):
            mark = Mark(number, Position(number), NOON)
            writer.write(encode_record(record), mark, event=isinstance(record, LoggedEvent))
        write_manifest(folder, source, [writer.close(until=100)])
        yield folder


def read_all(folder: Path) -> int | None:
    """Read an archive; give how many commands are in it, or None if it is refused."""
    try:
        manifest = read_manifest(folder)
        return sum(1 for entry in manifest.files for _ in read_file(folder, manifest.source, entry))
    except ArchiveRefused:
        return None


@with_files
@given(data=st.data(), what=st.sampled_from(["manifest.json", "partition-0.ndjson.zst"]))
def test_an_archive_with_a_damaged_file_is_refused(data: st.DataObject, what: str, archive: Path) -> None:
    before = read_all(archive)
    assert before is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in archive.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        whole = (folder / what).read_bytes()
        changed = data.draw(st.one_of(any_of([whole]), damaged(len(whole)).map(lambda damage: damage(whole))))
        (folder / what).write_bytes(changed)
        after = read_all(folder)
        # A manifest may be written in another way, with blanks for example, and still say the same.
        assert after is None or (after == before and (what == "manifest.json" or changed == whole))


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:12]))
def test_a_manifest_of_an_archive_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ArchiveRefused):
        read_manifest(tmp_path)
