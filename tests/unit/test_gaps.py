"""Telling a log that lost records from one whose writers replaced each other."""

import random
from collections.abc import Iterable

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from projector.gaps import GapFinder
from shared.codec import decode_record, encode_record
from shared.errors import PoisonRecord
from shared.events import LoggedEvent, LoggedFence, LoggedNote, ProjectCreated
from shared.ids import namespace_stream
from shared.log import Cursor, LogReader
from tests.event_log import History, PartitionLog

ALICE = namespace_stream("alice")


class Log(PartitionLog):
    """A partition whose writers meet with everything that is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.fences: list[int] = []

    def take_over(self) -> None:
        """Write a fence."""
        self.fences.append(self.offset)
        super().take_over()

    def write_as_replaced(self, fence: int, position: int) -> None:
        """Write what a writer still sends that another one has replaced."""
        [event] = self.logged(ALICE, [project(self.offset)])
        late = msgspec.structs.replace(event, writer=fence, position=position)
        self._put(ALICE.encode(), encode_record(late))

    def lose_a_batch(self, *, events: int = 1, after: int = 1) -> None:
        """Lose a batch of events on its way into the log, and write those after it."""
        for number in range(after):
            [event] = self.logged(ALICE, [project(self.offset)])
            position = self.position + events + 1 + number
            self._put(ALICE.encode(), encode_record(msgspec.structs.replace(event, position=position)))


def project(number: int) -> ProjectCreated:
    return ProjectCreated(f"p{number}", f"p{number}", "p")


def values_of(log: PartitionLog) -> list[bytes]:
    return [value for _, value in log.records]


def findings(values: Iterable[bytes]) -> tuple[str, ...]:
    """What is found in a log of these records, one after the other."""
    finder, reader = GapFinder(), LogReader(Cursor())
    try:
        for offset, value in enumerate(values):
            before, dropped, record = reader.cursor, reader.fenced_events, decode_record(value)
            reader.take(offset, record)
            finder.look(before, offset, record, happened=reader.fenced_events == dropped)
    except PoisonRecord as error:
        return (str(error),)
    return finder.at_the_end()


def test_a_log_of_one_writer_has_no_gap() -> None:
    log = Log()
    log.append(ALICE, project(1), project(2))
    log.note()
    log.append(ALICE, project(3))
    assert findings(values_of(log)) == ()
    assert findings([]) == ()


def test_what_a_replaced_writer_still_sends_is_no_gap() -> None:
    log = Log()
    log.append(ALICE, project(1))
    log.take_over()
    log.write_as_replaced(log.fences[0], 2)
    log.append(ALICE, project(2))
    log.write_as_replaced(log.fences[0], 3)
    assert findings(values_of(log)) == ()


def test_a_lost_batch_is_no_gap_once_the_next_writer_goes_on() -> None:
    log = Log()
    log.append(ALICE, project(1))
    log.lose_a_batch(after=2)
    [transient] = findings(values_of(log))
    assert transient.startswith("offset 2: event 2 of namespace:alice (position 3) does not follow position 1, and ")
    log.take_over()
    assert findings(values_of(log)) == (transient,), "nobody knows yet: the lost commands are decided again at once"
    log.append(ALICE, project(2))
    assert findings(values_of(log)) == ()


def test_a_missing_record_under_the_latest_fence_is_a_gap() -> None:
    log = Log()
    for number in range(4):
        log.append(ALICE, project(number))
    log.note()
    values = values_of(log)
    assert findings(values[:2] + values[3:]) == (
        (
            "offset 2: event 3 of namespace:alice (position 3) does not follow position 1, and nothing after it does: "
            "records before it are missing"
        ),
    )


def test_a_missing_record_before_a_fence_shows_by_the_writers_number() -> None:
    log = Log()
    log.append(ALICE, project(1))
    log.append(ALICE, project(2))
    log.take_over()
    log.note()
    values = values_of(log)
    assert findings(values[:2] + values[3:]) == (
        "offset 3: the note at position 3 names writer 3, which is no fence's offset: records before it are missing",
    )


def test_the_end_of_a_log_may_be_anywhere() -> None:
    log = Log()
    for number in range(3):
        log.append(ALICE, project(number))
    log.take_over()
    log.write_as_replaced(log.fences[0], 4)
    values = values_of(log)
    for end in range(len(values)):
        assert findings(values[:end]) == ()
    assert leaves_no_trace(log, 3), "the last that happened"
    assert findings(values[:3] + values[4:]) == ()
    assert not leaves_no_trace(log, 2)
    assert findings(values[:2] + values[3:])


def test_findings_are_bounded() -> None:
    log = Log()
    log.take_over()
    for number in range(300):
        log.append(ALICE, project(number))
    assert len(findings(values_of(log)[1:])) == 100


def test_it_goes_on_from_what_was_stored_of_it() -> None:
    log = Log()
    log.append(ALICE, project(1))
    log.lose_a_batch()
    finder, reader = GapFinder(), LogReader(Cursor())
    for offset, value in enumerate(values_of(log)):
        before, dropped, record = reader.cursor, reader.fenced_events, decode_record(value)
        reader.take(offset, record)
        finder.look(before, offset, record, happened=reader.fenced_events == dropped)
        finder = msgspec.json.decode(msgspec.json.encode(finder), type=GapFinder)
    assert finder.at_the_end() == findings(values_of(log)) != ()


def a_history(seed: int, steps: int) -> Log:
    """Writers that replace each other, late ones among them, and batches that get lost on the way."""
    log, chance = Log(), random.Random(seed)  # noqa: S311
    history = History(log, chance)
    history.step()
    for _ in range(steps):
        match chance.randrange(9):
            case 0:
                log.take_over()
            case 1 if len(log.fences) > 1:
                log.write_as_replaced(chance.choice(log.fences[:-1]), log.position + chance.randrange(3))
            case 2:
                log.lose_a_batch(events=chance.randint(1, 3), after=chance.randint(1, 3))
                log.take_over()
                history.step()
            case 3:
                log.note()
            case _:
                history.step()
    return log


def leaves_no_trace(log: Log, hole: int) -> bool:
    """Whether the log without this record is one that writers may have left.

    The offsets behind it move, so a writer that took over later and wrote anything gives it away; without one:

    - a record that did not happen, written by a replaced writer or after a lost batch, is missed by nobody;
    - what is after the last record that happened, that record itself too, might as well never have been written.
    """
    happened = [*range(len(log.records))]
    cursor = LogReader(Cursor())
    did = []
    for offset in happened:
        dropped = cursor.fenced_events
        cursor.read(offset, log.records[offset][1])
        did.append(cursor.fenced_events == dropped)
    records = [decode_record(value) for value in values_of(log)]
    later = [number for number in range(hole + 1, len(records)) if did[number] and not _is_fence(records[number])]
    if not later:
        return True
    changed_hands = any(_is_fence(record) for record in records[hole + 1 : later[-1]])
    return not did[hole] and not changed_hands


def _is_fence(record: LoggedEvent | LoggedNote | LoggedFence) -> bool:
    return isinstance(record, LoggedFence)


@given(st.integers(0, 10_000), st.integers(0, 60))
def test_writers_that_replace_each_other_leave_no_gap(seed: int, steps: int) -> None:
    assert findings(values_of(a_history(seed, steps))) == ()


@given(st.integers(0, 10_000), st.integers(0, 40))
@example(0, 40)
def test_every_record_that_is_taken_out_of_a_copy_is_missed(seed: int, steps: int) -> None:
    log = a_history(seed, steps)
    values = values_of(log)
    for hole in range(len(values)):
        found = findings(values[:hole] + values[hole + 1 :])
        assert found or leaves_no_trace(log, hole), hole
