"""The reader's rule."""

import pytest

from shared.codec import encode_record
from shared.errors import PoisonRecord, RecordsLost
from shared.events import (
    CommandsRefused,
    CommandType,
    LoggedEvent,
    LoggedFence,
    LoggedNote,
    LogRecord,
    NotedCommand,
    TenantEpisodeRecorded,
    WriterFenced,
)
from shared.ids import CommandId, EventId, Position, StreamId
from shared.log import Commit, Cursor, LogReader
from tests.spec import NOON


def fence(nonce: str = "n") -> LoggedFence:
    return LoggedFence(WriterFenced("ingestor-1", nonce))


def event(
    position: int, *, writer: int = 0, command: str = "c", completes: CommandType | None = "RecordEpisodes"
) -> LoggedEvent:
    return LoggedEvent(
        stream=StreamId("tenant:acme"),
        event_id=EventId(position),
        position=Position(position),
        writer=writer,
        command_id=CommandId(command),
        command_offset=position + 100,
        actor="key-1",
        at=NOON,
        event=TenantEpisodeRecorded(id=f"ep_{position}", type="message", content="x", timestamp=NOON),
        completes=completes,
    )


def note(position: int, *, writer: int = 0) -> LoggedNote:
    refused = (NotedCommand(CommandId("c"), "gone"),)
    return LoggedNote(
        position=Position(position), writer=writer, at=NOON, note=CommandsRefused(position + 100, refused)
    )


def read(*records: LogRecord, cursor: Cursor | None = None) -> tuple[list[Commit], LogReader]:
    """What a reader makes of the records, given at the offsets 0, 1, 2 …, from ``cursor`` on."""
    cursor = cursor or Cursor()
    reader = LogReader(cursor)
    commits = [
        commit
        for offset, record in enumerate(records)
        if offset >= cursor.offset and (commit := reader.read(offset, encode_record(record))) is not None
    ]
    return commits, reader


def positions(commits: list[Commit]) -> list[int]:
    return [logged.position for commit in commits for logged in commit.events]


def test_a_command_is_one_commit_with_its_last_event() -> None:
    commits, reader = read(fence(), event(1, completes=None), event(2, completes=None), event(3), note(4))
    assert [len(commit.events) for commit in commits] == [0, 3, 0]
    assert [commit.command_offset for commit in commits] == [None, 103, 104]
    assert [commit.cursor for commit in commits] == [
        Cursor(1, 0, Position(0)),
        Cursor(4, 0, Position(3)),
        Cursor(5, 0, Position(4)),
    ]
    assert reader.fenced_events == 0


def test_what_a_replaced_writer_appends_later_did_not_happen() -> None:
    commits, reader = read(fence(), event(1), fence("m"), event(2, writer=0), event(2, writer=2), event(3, writer=0))
    assert positions(commits) == [1, 2]
    assert commits[-1].cursor == Cursor(5, 2, Position(2))
    assert reader.fenced_events == 2


def test_a_second_copy_of_a_batch_did_not_happen() -> None:
    commits, reader = read(fence(), event(1), event(1), event(2))
    assert positions(commits) == [1, 2]
    assert reader.fenced_events == 1


def test_what_comes_after_a_lost_batch_did_not_happen() -> None:
    commits, reader = read(fence(), event(2), event(3))
    assert positions(commits) == []
    assert reader.fenced_events == 2


def test_a_note_of_a_replaced_writer_did_not_happen() -> None:
    commits, reader = read(fence(), fence("m"), note(1, writer=0))
    assert [commit.note for commit in commits] == [None, None]
    assert reader.fenced_events == 1


def test_reading_may_stop_after_any_commit_and_go_on_later() -> None:
    records: list[LogRecord] = [
        fence(),
        event(1),
        event(2, completes=None),
        event(3),
        fence("m"),
        event(4, writer=0),
        event(4, writer=4),
        note(5, writer=4),
        event(6, writer=4),
    ]
    whole, _ = read(*records)
    for index, commit in enumerate(whole):
        rest, _ = read(*records, cursor=commit.cursor)
        assert whole[: index + 1] + rest == whole


def test_a_log_that_lost_records_is_not_read_on() -> None:
    reader = LogReader(Cursor())
    reader.read(0, encode_record(fence()))
    with pytest.raises(RecordsLost, match="offset 2 came after 0"):
        reader.read(2, encode_record(event(1)))


@pytest.mark.parametrize("intruder", [event(2, command="other"), note(2), fence("m")])
def test_a_command_whose_events_do_not_stand_together_is_poison(intruder: LogRecord) -> None:
    with pytest.raises(PoisonRecord, match="break off before offset 2"):
        read(fence(), event(1, completes=None), intruder)
