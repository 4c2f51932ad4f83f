"""Spilling a partition into ranges of streams, and folding a range: whatever is interrupted, the same documents."""

import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from projector import replay
from projector.replay import Plan, Spilled, _Spill, fold_range
from projector.views import Document, Documents, no_documents, project
from shared.errors import PoisonRecord, RecordsLost
from shared.events import ProjectCreated
from shared.ids import namespace_stream
from shared.read_models import PROJECT_EPISODES
from tests.event_log import History, PartitionLog

RANGES = 4
ALICE = namespace_stream("alice")


def a_log(prefix: str, steps: int) -> PartitionLog:
    log = PartitionLog()
    history = History(log, random.Random(prefix), prefix=prefix)  # noqa: S311
    for number in range(steps):
        history.step()
        if number % 10 == 5:
            log.note()
        if number % 20 == 10:
            log.take_over()
            log.take_over()
            log.append_fenced(ALICE, ProjectCreated("zombie", "zombie", "zombie"))
    return log


def spill(folder: Path, partition: int, log: PartitionLog, *, until: int | None = None) -> Spilled | None:
    """Spill up to a record and break off there, or all of it. Goes on where it broke off."""
    plan = Plan({partition: log.offset}, RANGES)
    with ExitStack() as files:
        spilling = _Spill(plan, partition, folder, files)
        for offset in range(spilling.next_offset, log.offset if until is None else until):
            spilling.take(offset, log.records[offset][1])
        return spilling.finish() if until is None else None


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".events"}


def folded(folder: Path, *partitions: int) -> list[tuple[str, Document]]:
    plan = Plan(dict.fromkeys(partitions, 0), RANGES)
    return [
        (collection, document)
        for number in range(RANGES)
        for collection, some in fold_range(plan, folder, number, lambda _place, _done: None)
        for document in some
    ]


def replayed(*logs: PartitionLog) -> Documents:
    documents = no_documents()
    for log in logs:
        for logged in log.events:
            project(documents, logged)
    return documents


def test_a_spill_that_breaks_off_anywhere_goes_on_from_its_last_mark(tmp_path: Path) -> None:
    log = a_log("a", 40)
    (tmp_path / "whole").mkdir()
    whole = spill(tmp_path / "whole", 0, log)
    assert whole is not None
    assert (sum(whole.events), whole.dropped, whole.findings) == (len(log.events), 2, ())
    assert whole.cursor == log.cursor
    repeated = 0
    for cut in range(log.offset):
        folder = tmp_path / str(cut)
        folder.mkdir()
        spill(folder, 0, log, until=cut)
        with ExitStack() as files:
            repeated = max(repeated, cut - _Spill(Plan({0: log.offset}, RANGES), 0, folder, files).next_offset)
        assert spill(folder, 0, log) == whole
        assert files_in(folder) == files_in(tmp_path / "whole")
    longest = max(len(commit.events) for commit in log.commits)
    assert repeated <= log.offset // 40 + longest + 1, "little is done twice"
    assert spill(tmp_path / "whole", 0, log) == whole, "nothing is left to do"


def test_ranges_fold_to_the_documents_of_the_whole_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_HAND_ON", 5)
    logs = [a_log("a", 60), a_log("b", 60)]
    for partition, log in enumerate(logs):
        spill(tmp_path, partition, log)
    assert_all(folded(tmp_path, 0, 1), replayed(*logs))


def test_a_range_that_is_too_large_is_folded_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = a_log("a", 200)
    spill(tmp_path, 0, log)
    largest = max(len(file) for file in files_in(tmp_path).values())
    monkeypatch.setattr(replay, "_PASS_BYTES", largest // 8)
    plan, done, most = Plan({0: 0}, RANGES), 0, 0
    for number in range(RANGES):
        told: dict[int, int] = {}
        portions = [collection for collection, _ in fold_range(plan, tmp_path, number, told.__setitem__)]
        most = max(most, portions.count(PROJECT_EPISODES))
        done += told[0]
    assert most >= 2, "no more than a part of the documents is held at once"
    assert done == len(log.events)
    assert_all(folded(tmp_path, 0), replayed(log))


def assert_all(found: list[tuple[str, Document]], expected: Documents) -> None:
    assert len(found) == sum(map(len, expected.values())), "each document once"
    assert {(collection, document["_id"]): document for collection, document in found} == {
        (collection, key): document for collection, there in expected.items() for key, document in there.items()
    }


def test_a_stream_stays_in_one_range() -> None:
    plan = Plan({0: 9}, 40)
    numbers = [plan.range_of(namespace_stream(f"team-{number}")) for number in range(2_000)]
    assert numbers == [plan.range_of(namespace_stream(f"team-{number}")) for number in range(2_000)]
    assert set(numbers) == set(range(40))


def test_an_event_that_does_not_fit_is_named(tmp_path: Path) -> None:
    log = PartitionLog()
    log.append(ALICE, ProjectCreated("p1", "one", "one"))
    log.append(ALICE, ProjectCreated("p1", "two", "two"))
    spill(tmp_path, 3, log)
    with pytest.raises(
        PoisonRecord, match=r"episodes\.events/3, position 2, event 2 of namespace:alice: p1 exists already"
    ):
        folded(tmp_path, 3)


def test_what_cannot_be_read_or_is_gone_is_named(tmp_path: Path) -> None:
    log = a_log("a", 3)
    before = log.offset
    log.append_foreign(b"not ours")
    with pytest.raises(PoisonRecord, match=rf"episodes\.events/0, offset {before}: not a record of this log"):
        spill(tmp_path, 0, log)
    with ExitStack() as files, pytest.raises(RecordsLost):
        _Spill(Plan({1: 9}, RANGES), 1, tmp_path, files).take(5, log.records[5][1])
