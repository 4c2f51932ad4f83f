"""What a tenure writes, and what must hold before it may answer."""

from datetime import timedelta

import pytest

from ingestor.state import Checkpoint
from ingestor.tenure import Batch, Tenure
from shared.codec import decode_record
from shared.commands import Command
from shared.errors import Fenced
from shared.events import CommandsRefused, LoggedEvent, LoggedNote, NotedCommand
from shared.ids import CommandId, EventId, Position, StreamId
from shared.log import Cursor
from shared.receipts import CommandRefused, EpisodesRecorded, EpisodeUpserted, Receipt
from tests.builders import batch, patch, upsert
from tests.fakes import InMemoryStateStore
from tests.spec import NOON

FENCE = 40
POSITION = Position(17)


def new_tenure(store: InMemoryStateStore | None = None) -> Tenure:
    recovered = Checkpoint(Cursor(FENCE + 1, FENCE, POSITION), "nonce", command_offset=9)
    return Tenure(store or InMemoryStateStore(), recovered, timedelta(days=7))


def decide(tenure: Tenure, *commands: Command, first_offset: int = 10) -> Batch:
    for offset, command in enumerate(commands, start=first_offset):
        tenure.decide(command, command_offset=offset, at=NOON, reply_to=3)
    return tenure.close_batch()


def landed(tenure: Tenure, closed: Batch, offset: int) -> None:
    tenure.settle(closed, offset)
    tenure.store(closed)


def test_records_go_on_from_the_position_at_the_fence() -> None:
    tenure = new_tenure()
    first = decide(tenure, upsert("run-1"), upsert("run-2"))
    second = decide(tenure, upsert("run-3"), first_offset=12)
    records = [decode_record(value) for _, value, _ in [*first.records, *second.records]]
    assert [record.position for record in records if isinstance(record, LoggedEvent)] == [18, 19, 20, 21, 22]
    assert {record.writer for record in records if isinstance(record, LoggedEvent)} == {FENCE}
    assert {key for key, _, _ in first.records} == {b"namespace:alice"}


def test_a_command_sees_those_before_it_that_are_still_on_their_way() -> None:
    tenure = new_tenure()
    decide(tenure, upsert("run-1"))
    second = decide(tenure, upsert("run-1"), first_offset=11)
    [(_, receipt)] = second.replies
    assert isinstance(receipt.outcome, EpisodeUpserted)
    assert not receipt.outcome.created


@pytest.mark.parametrize("offset", [FENCE, FENCE + 2, FENCE + 4, -1])
def test_a_batch_that_is_not_at_its_one_offset_ends_the_tenure(offset: int) -> None:
    tenure = new_tenure()
    closed = decide(tenure, upsert("run-1"))
    with pytest.raises(Fenced):
        tenure.settle(closed, offset)


def test_batches_settle_at_consecutive_offsets() -> None:
    tenure = new_tenure()
    first = decide(tenure, upsert("run-1"))
    second = decide(tenure, upsert("run-2"), first_offset=11)
    landed(tenure, first, FENCE + 1)
    landed(tenure, second, FENCE + 4)


def test_stored_state_never_runs_ahead_of_the_acknowledgements() -> None:
    store = InMemoryStateStore()
    tenure = new_tenure(store)
    first = decide(tenure, upsert("run-1"))
    second = decide(tenure, upsert("run-1"), first_offset=11)
    assert store.values == {}
    landed(tenure, first, FENCE + 1)
    assert store.checkpoint() == Checkpoint(Cursor(FENCE + 4, FENCE, Position(20)), "nonce", 10)
    third = decide(tenure, upsert("run-1"), first_offset=12)
    [(_, receipt)] = third.replies
    assert receipt.event_id == 5
    landed(tenure, second, FENCE + 4)
    assert store.checkpoint() == Checkpoint(Cursor(FENCE + 5, FENCE, Position(21)), "nonce", 11)


def test_commands_without_events_leave_one_note_in_their_place_between_the_events() -> None:
    tenure = new_tenure()
    refused = [patch("missing-1"), patch("missing-2")]
    closed = decide(tenure, upsert("run-1"), *refused, upsert("run-2"), patch("missing-3"))
    records = [decode_record(value) for _, value, _ in closed.records]
    assert [type(record).__name__ for record in records] == [
        *["LoggedEvent"] * 3,
        "LoggedNote",
        "LoggedEvent",
        "LoggedNote",
    ]
    note = records[3]
    assert isinstance(note, LoggedNote)
    assert note.note == CommandsRefused(12, tuple(NotedCommand(command.command_id, "not_found") for command in refused))
    assert [record.position for record in records if not isinstance(record, str)] == [18, 19, 20, 21, 22, 23]  # type: ignore[union-attr]
    assert closed.command_offset == 14
    assert len(closed.replies) == 5


def test_a_refusal_burns_no_event_id() -> None:
    tenure = new_tenure()
    closed = decide(tenure, upsert("run-1"), patch("missing"), batch(), upsert("run-2"))
    by_command = [receipt for _, receipt in closed.replies]
    assert [receipt.event_id for receipt in by_command] == [3, 3, 1, 4]
    assert isinstance(by_command[1].outcome, CommandRefused)
    assert isinstance(by_command[2].outcome, EpisodesRecorded)


def test_a_command_that_cannot_be_read_is_noted_too() -> None:
    tenure = new_tenure()
    receipt = Receipt(
        command_id=CommandId("c"),
        stream=StreamId("s"),
        event_id=EventId(0),
        outcome=CommandRefused("validation_error", "The command could not be read and was put aside."),
    )
    tenure.note_poison(receipt, command_offset=10, at=NOON, reply_to=None)
    closed = tenure.close_batch()
    [(key, value, at)] = closed.records
    note = decode_record(value)
    assert isinstance(note, LoggedNote)
    assert note.note == CommandsRefused(10, (NotedCommand(CommandId("c"), "poison"),))
    assert (key, at) == (None, NOON)
