"""A recovery: what it keeps, and what it says of itself."""

from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from ingestor.domain.state import StoredReceipt
from ingestor.recovery import Recovery, _Progress
from ingestor.state import Checkpoint
from shared.log import Cursor, LogReader
from tests.builders import upsert
from tests.fakes import InMemoryStateStore
from tests.spec import NOON
from tests.written_log import WrittenLog, written_log

NOTHING = Checkpoint(Cursor(), "", -1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1_000])
def test_in_chunks_of_any_size_it_comes_to_what_the_writers_knew(chunk: int) -> None:
    written = written_log()
    store = InMemoryStateStore()
    recovery = Recovery(store, NOTHING)
    events = take_all(recovery, written.values, chunk)
    assert store.values == written.store.values
    assert store.checkpoint() == written.store.checkpoint()
    assert recovery.events == events


def take_all(recovery: Recovery, values: list[bytes], chunk: int = 1_000) -> int:
    """Fold a whole log; how many events it has."""
    reader, events = LogReader(Cursor()), 0
    for offset, value in enumerate(values):
        if (commit := reader.read(offset, value)) is not None:
            recovery.take(commit)
            events += len(commit.events)
        if offset % chunk == 0:
            recovery.flush()
            assert not recovery._overlay, "what is stored need not be in memory"
    recovery.flush()
    return events


def test_receipts_that_nobody_can_ask_for_are_not_made_again_and_all_else_is() -> None:
    written = written_log()
    store = InMemoryStateStore()
    end = NOON + timedelta(seconds=10)
    take_all(Recovery(store, NOTHING, askable_since=end), written.values)
    missing = written.store.values.keys() - store.values.keys()
    assert missing
    assert {key[0] for key in missing} == {"receipt"}
    dropped = [written.store.values[key] for key in missing]
    assert all(isinstance(receipt, StoredReceipt) and receipt.at < end for receipt in dropped)
    kept = [value for value in store.values.values() if isinstance(value, StoredReceipt)]
    assert any(receipt.at >= end for receipt in kept)
    assert all(written.store.values[key] == value for key, value in store.values.items())


def test_only_what_was_decided_just_now_may_be_unanswered() -> None:
    recovery = Recovery(InMemoryStateStore(), NOTHING)
    take_all(recovery, written_log().values)
    assert not recovery.unanswered
    just_now = datetime.now(UTC)
    log = WrittenLog(just_now)
    log.write(upsert("run-1"), upsert("run-2", idempotency_key="k"))
    take_all(recovery := Recovery(InMemoryStateStore(), NOTHING), log.values)
    assert [receipt.event_id for receipt in recovery.unanswered.values()] == [3, 4]


def test_it_says_how_far_it_is_how_fast_and_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ingestor.recovery.time.monotonic", lambda: now)
    said: list[str] = []
    progress = _Progress(3, 1_000, 5_000, said.append)
    with capture_logs() as logs:
        now = 102.0
        progress.at(2_000, 900)
        now = 106.0
        progress.at(3_000, 1_800)
        now = 107.0
        progress.at(4_000, 2_700)
        now = 110.0
        progress.end(5_000, 3_600)
    assert said == [
        "recovering: offset 2000 of 5000, began at 1000; 900 events, 450 events/s, 6 s to go",
        "recovering: offset 3000 of 5000, began at 1000; 1800 events, 300 events/s, 6 s to go",
        "recovering: offset 4000 of 5000, began at 1000; 2700 events, 386 events/s, 2 s to go",
    ]
    assert [(entry["event"], entry["events"], entry["events_per_second"]) for entry in logs] == [
        ("recovering", 1_800, 300),
        ("recovered", 3_600, 360),
    ]
    assert logs[0]["eta_seconds"] == 6
