"""The archive on disk: it reads back as it was written, and whatever is done to it is found, with its line."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random

import cramjam
import msgspec
import pytest
from msgspec.structs import replace

from shared.archive.files import (
    MANIFEST,
    Archived,
    ArchiveRefused,
    FileWriter,
    Manifest,
    Mark,
    Source,
    make_folder,
    read_file,
    read_manifest,
    write_manifest,
)
from shared.archive.restore import check_archive
from shared.codec import encode_record
from shared.events import CommandsRefused, LoggedEvent, LoggedFence, LoggedNote, LogRecord, WriterFenced
from shared.ids import CommandId, Position
from tests.event_log import History, PartitionLog
from tests.spec import NOON

Lines = list[bytes]
NAMES = ("partition-0.ndjson.zst", "partition-1.ndjson.zst")
LENGTH_FRAME = bytes.fromhex("502a4d1804000000")
"""How pzstd begins the skippable frame before each frame."""
SOURCE = Source(cluster="a-cluster", topic="episodes.events", partitions=2, stream=None)


def a_log(seed: int, commands: int = 150) -> PartitionLog:
    log = PartitionLog()
    history = History(log, Random(seed), prefix=f"p{seed}-")  # noqa: S311
    for number in range(commands):
        if number % 40 == 20:
            log.take_over()
        history.step()
    return log


def write(folder: Path, *partitions: Sequence[LogRecord | bytes], source: Source = SOURCE) -> Manifest:
    """Write an archive of these records."""
    make_folder(folder)
    files = []
    for partition, records in enumerate(partitions):
        writer = FileWriter(folder, source, partition)
        for number, record in enumerate(records, 1):
            value = record if isinstance(record, bytes) else encode_record(record)
            writer.write(value, Mark(number, Position(number), NOON), event=isinstance(record, LoggedEvent))
        files.append(writer.close(until=len(records)))
    return write_manifest(folder, source, files)


def archive(folder: Path, source: Source = SOURCE) -> Manifest:
    return write(folder, a_log(0).events, a_log(1).events, source=source)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    archive(tmp_path / "archive")
    return tmp_path / "archive"


def quiet(what: str, done: int, total: int) -> None:
    pass


def contents(folder: Path) -> list[Archived]:
    manifest = read_manifest(folder)
    return [archived for entry in manifest.files for archived in read_file(folder, manifest.source, entry)]


def lines_of(path: Path) -> Lines:
    return bytes(cramjam.zstd.decompress(path.read_bytes())).splitlines(keepends=True)


def write_lines(path: Path, lines: Lines) -> None:
    """Write a file as the format has it, in blocks of 50 lines, whatever the lines are."""
    with path.open("wb") as file:
        for first in range(0, len(lines), 50):
            frame = bytes(cramjam.zstd.compress(b"".join(lines[first : first + 50])))
            file.write(LENGTH_FRAME + len(frame).to_bytes(4, "little") + frame)


def change(folder: Path, name: str, changed: Callable[[Lines], Lines]) -> None:
    write_lines(folder / name, changed(lines_of(folder / name)))


def change_manifest(folder: Path, changed: Callable[[Manifest], Manifest]) -> None:
    """Alter the manifest, and make its own digest right again."""
    manifest = replace(changed(read_manifest(folder)), sha256="")
    digest = sha256(msgspec.json.encode(manifest)).hexdigest()
    (folder / MANIFEST).write_bytes(msgspec.json.encode(replace(manifest, sha256=digest)))


def refusal(folder: Path) -> str:
    with pytest.raises(ArchiveRefused) as refused:
        check_archive(folder, quiet)
    return str(refused.value)


def test_what_was_written_is_read_in_order_and_whole_commands_at_a_time(folder: Path) -> None:
    read = contents(folder)
    commits = [commit.events for partition in (0, 1) for commit in a_log(partition).commits if commit.events]
    assert [archived.records for archived in read] == commits
    assert [archived.values for archived in read] == [tuple(map(encode_record, events)) for events in commits]


def test_the_manifest_says_what_is_in_the_files(folder: Path) -> None:
    manifest = check_archive(folder, quiet)
    logs = a_log(0), a_log(1)
    assert [entry.events for entry in manifest.files] == [len(log.events) for log in logs]
    assert manifest.events == manifest.records == sum(len(log.events) for log in logs)
    for entry, log in zip(manifest.files, logs, strict=True):
        on_disk = (folder / entry.name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(on_disk), sha256(on_disk).hexdigest())
        assert entry.first is not None
        assert entry.last is not None
        assert (entry.first.position, entry.last.position) == (1, len(log.events))


def test_each_line_is_a_cloud_event_and_the_chain_is_as_documented(folder: Path) -> None:
    manifest = read_manifest(folder)
    chain = sha256(b"episodes-archive/1 1/2 *").digest()
    for line in lines_of(folder / NAMES[1]):
        event = msgspec.json.decode(line)
        assert event["specversion"] == "1.0"
        shown = event.pop("chain")
        chain = sha256(chain + line.replace(f',"chain":"{shown}"'.encode(), b"").rstrip(b"\n")).digest()
        assert shown == chain.hex()[:16]
    assert manifest.files[1].chain == chain.hex()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="there is no zstd here")
def test_the_zstd_program_reads_the_files(folder: Path) -> None:
    said = subprocess.run(["zstd", "-dc", folder / NAMES[0]], capture_output=True, check=True)
    assert said.stdout == b"".join(lines_of(folder / NAMES[0]))


def test_files_of_more_than_one_block_read_back(tmp_path: Path) -> None:
    log = PartitionLog()
    history = History(log, Random(1), content_bytes=50_000)  # noqa: S311
    for _ in range(10):
        history.record(10)
    write(tmp_path / "archive", log.events, [])
    assert (tmp_path / "archive" / NAMES[0]).read_bytes().count(LENGTH_FRAME) >= 4
    assert [archived.records for archived in contents(tmp_path / "archive")] == [
        commit.events for commit in log.commits if commit.events
    ]


def test_an_event_with_line_breaks_between_its_values_is_one_line(tmp_path: Path) -> None:
    event = replace(a_log(0).events[0], completes="UpsertEpisode")
    write(tmp_path / "archive", [msgspec.json.format(encode_record(event), indent=2) + b"\n"], [])
    change_manifest(
        tmp_path / "archive",
        lambda manifest: replace(manifest, files=(replace(manifest.files[0], events=1), manifest.files[1])),
    )
    assert [archived.records for archived in contents(tmp_path / "archive")] == [(event,)]


def test_files_without_lines_are_right(tmp_path: Path) -> None:
    write(tmp_path / "archive", [], [])
    assert contents(tmp_path / "archive") == []


def test_what_the_exporter_would_never_write_is_refused_with_the_line(tmp_path: Path) -> None:
    events = a_log(0).events
    whole = replace(events[0], completes="UpsertEpisode")
    part = replace(events[1], command_id=CommandId("torn"), completes=None)
    note = LoggedNote(Position(3), 0, NOON, CommandsRefused(3, ()))
    cases: list[tuple[list[LogRecord | bytes], str]] = [
        ([whole, part], "line 2: the events of command torn break off"),
        ([whole, part, whole], "line 3: the events of command torn break off"),
        ([whole, part, note], "line 3: no such record belongs here"),
        ([whole, LoggedFence(WriterFenced("o", "n"))], "line 2: no such record belongs here"),
        ([encode_record(whole).replace(b".v1", b".v9")], "line 1: unknown event type"),
    ]
    for number, (records, said) in enumerate(cases):
        write(tmp_path / str(number), records, [])
        assert refusal(tmp_path / str(number)).startswith(f"{NAMES[0]}, {said}")


def altered(line: bytes) -> bytes:
    """Change one character of what the event says."""
    at = line.index(b'"time":"2026') + len(b'"time":"202')
    return line[:at] + b"7" + line[at + 1 :]


LAST = len(a_log(0).events)
TAMPERING: dict[str, tuple[Callable[[Lines], Lines], int]] = {
    "altered": (lambda lines: [*lines[:76], altered(lines[76]), *lines[77:]], 77),
    "altered, the first": (lambda lines: [altered(lines[0]), *lines[1:]], 1),
    "altered, the last": (lambda lines: [*lines[:-1], altered(lines[-1])], LAST),
    "altered, its chain": (lambda lines: [*lines[:9], lines[9][:-5] + b'zz"}\n', *lines[10:]], 10),
    "missing": (lambda lines: [*lines[:76], *lines[77:]], 77),
    "missing, the first": (lambda lines: lines[1:], 1),
    "missing, the last": (lambda lines: lines[:-1], LAST),
    "cut": (lambda lines: lines[:100], 101),
    "cut within a line": (lambda lines: [*lines[:100], lines[100][:50]], 101),
    "emptied": (lambda _: [], 1),
    "swapped": (lambda lines: [*lines[:20], lines[21], lines[20], *lines[22:]], 21),
    "doubled": (lambda lines: [*lines[:21], lines[20], *lines[21:]], 22),
    "doubled, the last": (lambda lines: [*lines, lines[-1]], LAST + 1),
    "not JSON": (lambda lines: [*lines[:20], b"rubbish\n", *lines[21:]], 21),
    "an empty line": (lambda lines: [*lines[:20], b"\n", *lines[20:]], 21),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_a_line_that_is_not_what_was_written_is_named(folder: Path, how: str) -> None:
    changed, line = TAMPERING[how]
    change(folder, NAMES[0], changed)
    assert refusal(folder).startswith(f"{NAMES[0]}, line {line} ")


def test_files_that_changed_places_are_found_at_the_first_line(folder: Path) -> None:
    one, two = (folder / name for name in NAMES)
    one.rename(folder / "other")
    two.rename(one)
    (folder / "other").rename(two)
    assert refusal(folder).startswith(f"{NAMES[0]}, line 1 ")


def test_a_file_of_another_export_is_found_at_the_first_line(folder: Path, tmp_path: Path) -> None:
    archive(tmp_path / "other", replace(SOURCE, partitions=3))
    shutil.copy(tmp_path / "other" / NAMES[1], folder / NAMES[1])
    assert refusal(folder).startswith(f"{NAMES[1]}, line 1 ")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / NAMES[1]).unlink()
    assert refusal(folder).startswith(f"{NAMES[1]}, line 1 is missing, with the whole file")


@pytest.mark.parametrize("keep", [1, 11, 12, 500, -1])
def test_a_file_that_is_cut_as_a_file_is_refused_with_the_line(folder: Path, keep: int) -> None:
    change(folder, NAMES[0], lambda lines: lines)  # in blocks of 50 lines
    path = folder / NAMES[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    line = 1 if keep > 0 else 1 + 50 * ((LAST - 1) // 50)
    assert refusal(folder).startswith(f"{NAMES[0]}, line {line} is missing")


def test_every_byte_of_a_file_counts(folder: Path) -> None:
    """Whichever byte is flipped, the file is refused and a line of it is named, or that all lines are right."""
    path = folder / NAMES[0]
    whole = path.read_bytes()
    for at in Random(1).sample(range(len(whole)), 300):  # noqa: S311
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert refusal(folder).startswith((f"{NAMES[0]}, line ", f"{NAMES[0]}: all {LAST} lines are right"))


def test_bytes_behind_the_last_line_are_refused(folder: Path) -> None:
    with (folder / NAMES[0]).open("ab") as file:
        file.write(b"more")
    assert refusal(folder).startswith(f"{NAMES[0]}, line {LAST + 1} is missing: what follows line {LAST} is no block")


def test_another_compression_of_the_same_lines_is_refused(folder: Path) -> None:
    change(folder, NAMES[0], lambda lines: lines)
    assert refusal(folder) == f"{NAMES[0]}: all {LAST} lines are right, but the file is not the one in {MANIFEST}"


@pytest.mark.parametrize("key", ["records", "events", "bytes", "partitions", "stream", "created_at", "offset", "chain"])
def test_a_manifest_that_was_altered_is_refused(folder: Path, key: str) -> None:
    path = folder / MANIFEST
    text = path.read_text()
    at = text.index(f'"{key}": ') + len(key) + 4
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    assert MANIFEST in refusal(folder)


def test_a_manifest_that_is_wrong_of_itself_is_refused_with_the_line(folder: Path) -> None:
    def with_first(**changes: object) -> Callable[[Manifest], Manifest]:
        return lambda manifest: replace(manifest, files=(replace(manifest.files[0], **changes), *manifest.files[1:]))

    for changed, said in {
        with_first(records=LAST + 1): f"line {LAST + 1} is missing: the file ends after line {LAST} of {LAST + 1}",
        with_first(records=LAST - 1): f"line {LAST} is one too many: {MANIFEST} says {LAST - 1}",
        with_first(events=LAST - 1): f"line {LAST} is the last, with {LAST} events; {MANIFEST} says {LAST - 1}",
        with_first(chain="0" * 64): f"line {LAST} is the last, and its chain is not the one in {MANIFEST}",
        with_first(partition=9): "line 1 is not what was written there",
    }.items():
        before = (folder / MANIFEST).read_bytes()
        change_manifest(folder, changed)
        assert refusal(folder).startswith(f"{NAMES[0]}, {said}")
        (folder / MANIFEST).write_bytes(before)
    check_archive(folder, quiet)


def test_a_manifest_without_one_of_the_files_is_refused(folder: Path) -> None:
    change_manifest(folder, lambda manifest: replace(manifest, files=manifest.files[:1]))
    assert refusal(folder) == f"{folder / MANIFEST} is damaged: it names 1 files of 2 partitions"


def test_an_export_that_did_not_finish_is_no_archive(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert "its export did not finish" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is damaged"),
        (b"\xff", "is damaged"),
        (b'{"format": "episodes-archive", "version": 1}', "is damaged"),
        (
            b'{"format": "episodes-archive", "version": 2}',
            "version 2; this program reads 'episodes-archive', version 1",
        ),
        (b'{"format": "tar", "version": 1}', "is of format 'tar'"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(folder: Path, text: bytes, said: str) -> None:
    (folder / MANIFEST).write_bytes(text)
    assert said in refusal(folder)


def test_a_folder_with_something_in_it_is_not_written_to(folder: Path) -> None:
    with pytest.raises(ArchiveRefused, match="is not empty"):
        make_folder(folder)
