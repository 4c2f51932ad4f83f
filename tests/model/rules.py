"""The rules that every history must keep, held against the log and against every answer as it is given."""

from typing import NamedTuple

from shared.events import LoggedEvent, LoggedNote, LogRecord
from shared.log import Cursor

from .broker import Partition
from .writer import Accept, Answer, Command, Receipt, State, StateStore, evolve


class Violation(AssertionError):
    """A history in which a rule was broken."""


class Outcome(NamedTuple):
    """What the log says that a command came to."""

    code: str
    event_ids: tuple[int, ...]
    position: int


class Auditor:
    """Reads the log from its start, by the rule under test, as far as it has grown, and hears every answer."""

    def __init__(self, events: Partition, accept: Accept) -> None:
        self.accepted: list[int] = []
        """Offsets of the records that happened, in order; fences are among them."""
        self.cursors = [Cursor()]
        """Where this reader stood before each offset of the log."""
        self.outcomes: dict[str, Outcome] = {}
        """By command_id."""
        self.answers: dict[str, Answer] = {}
        self._events = events
        self._accept = accept
        self._state: State = {}
        self._position = 0
        """Counted here, and not taken from the cursor: that is the reader's own belief."""
        self._command: list[LoggedEvent] = []
        """The events so far of a command that is not complete."""
        self._decided_on = ""
        """What the state was before that command."""

    def hear(self, answer: Answer) -> None:
        """An answer must be true in the log by the time it is given, and no other answer may have been given.

        A refusal is not looked for in the log: that it leaves a note is the protocol's way, not the caller's concern.
        What concerns the caller is that the command is never judged again.
        """
        self.read_on()
        command = answer.command
        said_before = self.answers.setdefault(command.command_id, answer)
        if said_before != answer:
            raise Violation(f"a command is answered in two ways: {said_before}, {answer}")
        outcome = self.outcomes.get(command.command_id)
        if outcome is not None and outcome.code != answer.code:
            raise Violation(f"an answer is not what the log says: {answer}, {outcome}")
        if answer.code == "accepted" and outcome != Outcome(*answer[1:]):
            raise Violation(f"an answer is not what the log says: {answer}, {outcome}")
        if answer.code == "replayed":
            first: Receipt | None = self._state.get(("key", command.key or ""))
            if first is None or (first.body, *first[2:]) != (command.body, *answer[2:]):
                raise Violation(f"a replay repeats what the log does not hold: {answer}, {first}")

    def read_on(self) -> None:
        for offset in range(len(self.cursors) - 1, len(self._events.records)):
            record = self._events.records[offset]
            cursor, happened = self._accept(self.cursors[-1], offset, record)
            self.cursors.append(cursor)
            if happened:
                self.accepted.append(offset)
                self._take(record)

    def _take(self, record: LogRecord) -> None:
        if isinstance(record, LoggedEvent | LoggedNote):
            self._position += 1
            if record.position != self._position:
                raise Violation(
                    f"positions have a gap or a repeat: {record.position} stands where {self._position} should"
                )
        if isinstance(record, LoggedEvent):
            self._take_event(record)
            return
        if self._command:
            raise Violation(f"the events of {self._command[0].command_id} break off")
        if isinstance(record, LoggedNote):
            for noted in record.note.refusals:
                self._conclude(noted.command_id, Outcome(noted.code, (), record.position))
        evolve(self._state, record)

    def _take_event(self, event: LoggedEvent) -> None:
        last_event_id = self._state.get(("event_id", event.stream), 0)
        if event.event_id != last_event_id + 1:
            raise Violation(f"event_ids have a gap or a repeat: {event.event_id} follows {last_event_id}")
        if not self._command:
            self._decided_on = str(self._state.get(("digest", event.stream), 0))
        elif self._command[0].command_id != event.command_id:
            raise Violation(f"the events of {self._command[0].command_id} break off")
        if event.event.content != self._decided_on:  # type: ignore[union-attr]
            raise Violation(f"{event.command_id} was decided on a state that never was")
        if event.idempotency_key and ("key", event.idempotency_key) in self._state:
            raise Violation(f"{event.command_id} is accepted under a key that was taken")
        self._command.append(event)
        evolve(self._state, event)
        if event.completes is not None:
            event_ids = tuple(each.event_id for each in self._command)
            self._command = []
            self._conclude(event.command_id, Outcome("accepted", event_ids, event.position))

    def _conclude(self, command_id: str, outcome: Outcome) -> None:
        if command_id in self.outcomes:
            raise Violation(f"{command_id} happens twice: {self.outcomes[command_id]}, {outcome}")
        answer = self.answers.get(command_id)
        if answer is not None and answer.code != outcome.code:
            raise Violation(f"{command_id} was answered {answer.code} and is judged again: {outcome}")
        self.outcomes[command_id] = outcome

    def check_store(self, store: StateStore) -> None:
        """A stored state is the log up to its cursor, so a reader that starts there agrees with one from the start."""
        self.read_on()
        if store.cursor not in self.cursors:
            raise Violation(f"a checkpoint is wrong: no reader from the start was ever at {store.cursor}")
        state: State = {}
        for offset in self.accepted:
            if offset < store.cursor.offset:
                evolve(state, self._events.records[offset])
        if store.state != state:
            raise Violation(f"a stored state is not the log up to its checkpoint: {store.state}, {state}")

    def check_reader_from(self, cursor: Cursor) -> None:
        """A reader that starts at a checkpoint accepts what one from the start accepts from there on."""
        self.read_on()
        accepted = []
        start = cursor.offset
        for offset, record in enumerate(self._events.records[start:], start):
            cursor, happened = self._accept(cursor, offset, record)
            if happened:
                accepted.append(offset)
        if accepted != [offset for offset in self.accepted if offset >= start]:
            raise Violation(f"a reader from offset {start} disagrees: {accepted}, {self.accepted}")

    def is_done(self, command: Command) -> bool:
        """Whether the command came to something, or repeats what did and so may be answered without a trace."""
        return command.command_id in self.outcomes or command.command_id in self.answers or self._repeats(command)

    def _repeats(self, command: Command) -> bool:
        first: Receipt | None = self._state.get(("key", command.key or ""))
        passed = self._state.get(("command_offset", ""), -1) >= command.offset
        return passed and first is not None and first.command_offset < command.offset and first.body == command.body
