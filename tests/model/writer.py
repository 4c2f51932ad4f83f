"""A tenure of the log-fenced single writer, step by step, and the stored state that it keeps.

Each ``yield`` is a point at which the writer may stall for as long as it likes, for ever if it crashes, while all
others go on.
"""

from collections import ChainMap, deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, Literal, NamedTuple, Self

from shared.errors import Fenced
from shared.events import (
    CommandsRefused,
    LoggedEvent,
    LoggedFence,
    LoggedNote,
    LogRecord,
    NotedCommand,
    TenantEpisodeRecorded,
    WriterFenced,
)
from shared.ids import CommandId, EventId, Position, StreamId
from shared.log import Cursor

from .broker import Delivery, Partition
from .trace import Trace

MAX_IN_FLIGHT = 8

Accept = Callable[[Cursor, int, LogRecord], tuple[Cursor, bool]]
Code = Literal["accepted", "refused", "unchanged", "replayed"]
State = MutableMapping[tuple[str, str], Any]
Steps = Iterator[None]

_AT = datetime(2026, 1, 1, tzinfo=UTC)


class Command(NamedTuple):
    """A record of the commands partition."""

    offset: int
    stream: StreamId
    key: str | None
    body: int

    @property
    def command_id(self) -> CommandId:
        return CommandId(f"c{self.offset}")


class Receipt(NamedTuple):
    """What an accepted command came to, as it is kept under its idempotency key."""

    command_offset: int
    body: int
    event_ids: tuple[int, ...]
    position: int


class Answer(NamedTuple):
    """What the caller hears. A replay names the event_ids and the position of the answer that it repeats."""

    command: Command
    code: Code
    event_ids: tuple[int, ...]
    position: int


@dataclass(frozen=True, kw_only=True)
class World:
    """What the writers of one partition share."""

    random: Random
    commands: Sequence[Command]
    events: Partition
    accept: Accept
    reply: Callable[[str, Answer], None]
    trace: Trace


class StateStore:
    """The stored state: a cache of the log up to ``cursor``. It outlives a tenure, and may outlive a crash."""

    def __init__(self) -> None:
        self.state: dict[tuple[str, str], Any] = {}
        self.cursor = Cursor()
        self._tenure: object = None

    def copy(self) -> Self:
        copy = type(self)()
        copy.state, copy.cursor = self.state.copy(), self.cursor
        return copy

    def open(self, tenure: object) -> tuple[State, Cursor]:
        """The state, and where it stands. From now on no earlier tenure can change it, nor see it change."""
        self._tenure = tenure
        self.state = self.state.copy()
        return self.state, self.cursor

    def flush(self, tenure: object, changes: State, cursor: Cursor) -> None:
        """Store both or neither."""
        if self._tenure is not tenure:
            raise Fenced
        self.state.update(changes)
        self.cursor = cursor


def evolve(state: State, record: LogRecord) -> None:
    """Fold an accepted record.

    Kept per stream: the last event_id, and a digest of all its events, which shows whether a decision was taken on the
    state that the log gives at its place.
    """
    match record:
        case LoggedEvent():
            digest = state.get(("digest", record.stream), 0)
            state["event_id", record.stream] = record.event_id
            state["digest", record.stream] = hash((digest, record.event_id, record.command_offset, record.position))
            state["command_offset", ""] = record.command_offset
            if record.idempotency_key and record.answer:
                first_event_id = int(record.answer)
                state["key", record.idempotency_key] = Receipt(
                    record.command_offset,
                    int(record.request_hash or ""),
                    tuple(range(first_event_id, record.event_id + 1)),
                    record.position,
                )
        case LoggedNote():
            state["command_offset", ""] = record.command_offset
        case LoggedFence():
            pass


@dataclass(slots=True, eq=False)
class Pending:
    """A batch that is being made or was sent: its part of the overlay, and the answers that rest on it."""

    changes: State
    records: list[LoggedEvent | LoggedNote] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    first_position: int = 0
    delivery: Delivery | None = None


class Tenure:
    """One ingestor's time as the writer of the partition, as far as it knows. It ends with `Fenced`."""

    def __init__(self, name: str, world: World, store: StateStore) -> None:
        self.name = name
        self.world = world
        self.random = world.random
        self.store = store
        self.writer = -1
        self.position_at_fence = 0
        self.position = 0
        self.next_command = 0
        self.in_flight: deque[Pending] = deque()
        self.overlay: ChainMap[tuple[str, str], Any] = ChainMap()
        """The stored state, and over it the changes of every batch in flight; the newest comes first."""
        self.notes_replays = self.random.random() < 0.5
        """A replay may leave a note or not: it is safe either way."""

    def run(self) -> Steps:
        yield from self.fence()
        yield from self.recover(up_to=self.writer)
        yield from self.go_on()

    def go_on(self) -> Steps:
        while True:
            if len(self.in_flight) < MAX_IN_FLIGHT and self.random.random() < 0.7:
                self.send(self.decide())
            yield
            yield from self.acknowledge()

    def fence(self) -> Steps:
        """Step 1: take the partition over. The fence's offset is this tenure's writer number."""
        delivery = self.world.events.send(self.name, (LoggedFence(WriterFenced(self.name, nonce=self.name)),))
        while not delivery.done:
            yield
        offset = delivery.base_offset
        self.writer = offset if offset is not None and offset >= 0 else self.find_fence()

    def find_fence(self) -> int:
        """No ack says where the fence is. If it is not in the log either, a new tenure has to try again."""
        for offset, record in enumerate(self.world.events.records):
            if isinstance(record, LoggedFence) and record.fence.nonce == self.name:
                return offset
        raise Fenced

    def recover(self, up_to: int) -> Steps:
        """Step 2: read from the stored state's checkpoint up to the own fence."""
        stored, cursor = self.store.open(self)
        self.overlay.maps = [stored]
        changes = self.lay_over()
        yield
        if cursor.offset > up_to + 1:
            raise Fenced  # the stored state is already a later tenure's
        while cursor.offset <= up_to:
            record = self.world.events.records[cursor.offset]
            cursor, happened = self.world.accept(cursor, cursor.offset, record)
            if happened:
                evolve(self.overlay, record)
        self.store.flush(self, changes, cursor)
        self.overlay.maps.pop(0)
        self.position = self.position_at_fence = cursor.position
        self.next_command = self.overlay.get(("command_offset", ""), -1) + 1

    def decide(self) -> Pending:
        """Step 3: some commands in order, each on the state that the ones before it made."""
        batch = Pending(self.lay_over(), first_position=self.position + 1)
        for command in self.world.commands[self.next_command :][: self.random.randint(1, 3)]:
            self.next_command = command.offset + 1
            first = self.remembered(command)
            if first is None:
                self.judge(command, batch)
            elif first.body != command.body:
                self.note(command, "refused", batch)
            else:
                self.replay(command, first, batch)
        return batch

    def remembered(self, command: Command) -> Receipt | None:
        """What an earlier command under the same idempotency key came to."""
        return self.overlay.get(("key", command.key)) if command.key else None

    def judge(self, command: Command, batch: Pending) -> None:
        """Decide at random: another release may decide otherwise, and the protocol must not lean on agreement."""
        if self.random.random() < 0.6:
            self.accept(command, self.random.choice((1, 1, 2, 3)), batch)
        else:
            self.note(command, self.random.choice(("refused", "unchanged")), batch)

    def accept(self, command: Command, count: int, batch: Pending) -> None:
        """Each event says on which state it was decided; the last one says what a replay has to repeat."""
        decided_on = self.overlay.get(("digest", command.stream), 0)
        first_event_id = self.next_event_id(command.stream)
        event_ids = tuple(range(first_event_id, first_event_id + count))
        for event_id in event_ids:
            last = event_id == event_ids[-1]
            keyed = last and command.key is not None
            self.write(
                LoggedEvent(
                    stream=command.stream,
                    event_id=EventId(event_id),
                    position=Position(self.position + 1),
                    writer=self.writer,
                    command_id=command.command_id,
                    command_offset=command.offset,
                    actor=self.name,
                    at=_AT,
                    event=TenantEpisodeRecorded(id="", type="", content=str(decided_on), timestamp=_AT),
                    completes="RecordEpisodes" if last else None,
                    idempotency_key=command.key if keyed else None,
                    request_hash=str(command.body) if keyed else None,
                    answer=str(first_event_id) if keyed else None,
                ),
                batch,
            )
        batch.answers.append(Answer(command, "accepted", event_ids, self.position))

    def next_event_id(self, stream: StreamId) -> int:
        return int(self.overlay.get(("event_id", stream), 0)) + 1

    def note(self, command: Command, code: Code, batch: Pending) -> None:
        """An answer without an event leaves a note, so that it too rests on an append; neighbours share one."""
        noted = NotedCommand(command.command_id, code)
        last = batch.records[-1] if batch.records else None
        if isinstance(last, LoggedNote):
            batch.records.pop()
            self.position -= 1
            refusals = (*last.note.refusals, noted)
        else:
            refusals = (noted,)
        self.write(
            LoggedNote(Position(self.position + 1), self.writer, _AT, CommandsRefused(command.offset, refusals)), batch
        )
        batch.answers.append(Answer(command, code, (), self.position))

    def replay(self, command: Command, first: Receipt, batch: Pending) -> None:
        """The same answer once more, after the events that it repeats are known to stand."""
        answer = Answer(command, "replayed", first.event_ids, first.position)
        if self.notes_replays:
            self.note(command, "replayed", batch)
            batch.answers[-1] = answer
            return
        for pending in (*self.in_flight, batch):
            if ("key", command.key) in pending.changes:
                pending.answers.append(answer)
                return
        self.world.reply(self.name, answer)

    def write(self, record: LoggedEvent | LoggedNote, batch: Pending) -> None:
        batch.records.append(record)
        evolve(self.overlay, record)
        self.position = record.position

    def send(self, batch: Pending) -> None:
        """Step 4: in order, up to `MAX_IN_FLIGHT` of them unacknowledged."""
        if batch.records:
            batch.delivery = self.world.events.send(self.name, tuple(batch.records))
            self.in_flight.append(batch)
        else:
            self.overlay.maps.pop(0)

    def acknowledge(self) -> Steps:
        """Step 5: strictly in send order, and only at the exact offset. Step 6: anything else ends the tenure."""
        while (batch := self.oldest_done()) is not None:
            if not self.is_good(batch):
                raise Fenced
            yield
            self.reply(batch)
            yield
            self.flush(batch)
            self.in_flight.remove(batch)

    def oldest_done(self) -> Pending | None:
        oldest = self.in_flight[0] if self.in_flight else None
        return oldest if oldest and oldest.delivery and oldest.delivery.done else None

    def is_good(self, batch: Pending) -> bool:
        """Whether the ack proves that nobody else has written since the fence."""
        return batch.delivery is not None and batch.delivery.base_offset == self.offset_of(batch.first_position)

    def offset_of(self, position: int) -> int:
        """Where a record of this tenure stands if nobody else has written since the fence."""
        return self.writer + (position - self.position_at_fence)

    def reply(self, batch: Pending) -> None:
        for answer in batch.answers:
            self.world.reply(self.name, answer)

    def flush(self, batch: Pending) -> None:
        """Its part of the overlay becomes stored state, together with the place in the log that it is good for."""
        last = batch.records[-1].position
        self.store.flush(self, batch.changes, Cursor(self.offset_of(last) + 1, self.writer, last))
        self.overlay.maps = [changes for changes in self.overlay.maps if changes is not batch.changes]

    def lay_over(self) -> State:
        changes: State = {}
        self.overlay.maps.insert(0, changes)
        return changes
