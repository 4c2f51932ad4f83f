"""The protocol with one part left out or done wrong. Each is a mistake that somebody might make."""

from collections.abc import Callable
from dataclasses import replace

from shared.errors import Fenced
from shared.events import LoggedEvent, LoggedFence, LoggedNote, LogRecord
from shared.ids import Position
from shared.log import Cursor, accept

from .broker import Partition
from .history import Protocol
from .writer import Accept, Answer, Code, Command, Pending, Receipt, State, StateStore, Steps, Tenure, evolve

# Steps 1 and 2: fence and recover.


class RecoversBeforeItFences(Tenure):
    """Reads to the end of the log, and fences only then: it does not know what landed in between."""

    def run(self) -> Steps:
        self.end = len(self.world.events.records) - 1
        yield
        yield from super().run()

    def recover(self, up_to: int) -> Steps:
        return super().recover(min(self.end, up_to))


class TakesAnyFenceForItsOwn(Tenure):
    """Without an ack it goes by the latest fence in the log, whoever's it is."""

    def find_fence(self) -> int:
        latest = _latest_fence(self.world.events)
        if latest is None:
            raise Fenced
        return latest


class RecoversAllItReads(Tenure):
    """Knows the reader's rule for others, but takes all that the log holds for its own state."""

    def run(self) -> Steps:
        self.world = replace(self.world, accept=accept_if(lambda *_: True))
        return super().run()


class GoesOnUnderItsOldFence(Tenure):
    """After a failed append it recovers to the end of the log, and fences again only if another has fenced."""

    end: int

    def run(self) -> Steps:
        yield from self.fence()
        self.end = self.writer
        while self.writer == _latest_fence(self.world.events):
            try:
                yield from self.recover(up_to=self.end)
                yield from self.go_on()
            except Fenced:
                self.in_flight.clear()
                self.end = len(self.world.events.records) - 1
        raise Fenced

    def offset_of(self, position: int) -> int:
        return self.end + (position - self.position_at_fence)


class RemembersCommandsItOnlyDecided(Tenure):
    """The next tenure goes on after the last command that was decided, not after the last one in the log."""

    def run(self) -> Steps:
        try:
            yield from super().run()
        except Fenced:
            self.store.state["command_offset", ""] = self.next_command - 1
            raise


class KeepsTheOverlay(Tenure):
    """The next tenure builds on the changes of batches that were still in flight."""

    def run(self) -> Steps:
        try:
            yield from super().run()
        except Fenced:
            for batch in self.in_flight:
                self.store.state.update(batch.changes)
            raise


class CheckpointWithoutTheFence(StateStore):
    """Keeps offset and position only."""

    def flush(self, tenure: object, changes: State, cursor: Cursor) -> None:
        super().flush(tenure, changes, Cursor(cursor.offset, -1, cursor.position))


class StoreOpenToAll(StateStore):
    """An earlier tenure that awakes may still store, over what a later one has stored."""

    def open(self, tenure: object) -> tuple[State, Cursor]:
        return self.state, self.cursor

    def flush(self, tenure: object, changes: State, cursor: Cursor) -> None:
        self.state.update(changes)
        self.cursor = cursor


class StoreReadByAll(StateStore):
    """An earlier tenure that awakes can store no more, but sees what a later one has stored."""

    def open(self, tenure: object) -> tuple[State, Cursor]:
        state = self.state
        _, cursor = super().open(tenure)
        self.state = state
        return self.state, cursor


# Steps 3 and 4: decide and send.


class KnowsStoredKeysOnly(Tenure):
    """Does not look among the batches in flight for an idempotency key."""

    def remembered(self, command: Command) -> Receipt | None:
        return self.store.state.get(("key", command.key)) if command.key else None


class BurnsEventIds(Tenure):
    """A refusal uses up the event_id that the command would have had."""

    def note(self, command: Command, code: Code, batch: Pending) -> None:
        self.overlay["event_id", command.stream] = self.next_event_id(command.stream)
        super().note(command, code, batch)


class RefusesWithoutANote(Tenure):
    """Why write what changed nothing?"""

    def note(self, command: Command, code: Code, batch: Pending) -> None:
        self.world.reply(self.name, Answer(command, code, (), self.position))


class NotesLater(Tenure):
    """Collects the notes of one batch and writes them into the next, behind commands that came after."""

    def run(self) -> Steps:
        self.waiting: list[tuple[Command, Code]] = []
        self.notes_replays = False
        return super().run()

    def decide(self) -> Pending:
        waiting, self.waiting = self.waiting, []
        batch = super().decide()
        for command, code in waiting:
            super().note(command, code, batch)
        return batch

    def note(self, command: Command, code: Code, batch: Pending) -> None:
        self.waiting.append((command, code))


class ReplaysAtOnce(Tenure):
    """Repeats an answer whose events are still in flight."""

    def replay(self, command: Command, first: Receipt, batch: Pending) -> None:
        self.world.reply(self.name, Answer(command, "replayed", first.event_ids, first.position))


class SplitsCommands(Tenure):
    """One batch per event, so half a command may land."""

    def send(self, batch: Pending) -> None:
        self.overlay.maps.pop(0)
        for record in batch.records:
            part = Pending(self.lay_over(), [record], first_position=record.position)
            evolve(self.overlay, record)
            if record is batch.records[-1]:
                part.answers = batch.answers
            super().send(part)


class RepliesBeforeTheAck(Tenure):
    def send(self, batch: Pending) -> None:
        super().send(batch)
        self.reply(batch)
        batch.answers.clear()


class FlushesBeforeTheAck(Tenure):
    """The checkpoint is ahead of what is known to be in the log."""

    def send(self, batch: Pending) -> None:
        super().send(batch)
        if batch.records:
            super().flush(batch)

    def flush(self, batch: Pending) -> None:
        pass


# Step 5: acknowledge.


class TrustsAnySuccess(Tenure):
    def is_good(self, batch: Pending) -> bool:
        return batch.delivery is not None and batch.delivery.base_offset is not None


class TrustsAnUnknownOffset(Tenure):
    def is_good(self, batch: Pending) -> bool:
        return super().is_good(batch) or (batch.delivery is not None and batch.delivery.base_offset == -1)


class TrustsLaterOffsets(Tenure):
    """Checks that offsets go up, not that they are exact."""

    def is_good(self, batch: Pending) -> bool:
        offset = batch.delivery.base_offset if batch.delivery else None
        return offset is not None and offset >= self.offset_of(batch.first_position)


class ChecksTheFirstOffsetOnly(Tenure):
    """Is sure of the partition once its first batch has stood at the right offset."""

    sure = False

    def is_good(self, batch: Pending) -> bool:
        succeeded = batch.delivery is not None and batch.delivery.base_offset is not None
        self.sure = self.sure or super().is_good(batch)
        return succeeded and self.sure


class AcknowledgesInAnyOrder(Tenure):
    """Takes whichever batch is at its exact offset, also while an earlier one is still open."""

    def oldest_done(self) -> Pending | None:
        return next((batch for batch in self.in_flight if self.is_good(batch)), super().oldest_done())


# The reader's rule.


def accept_if(
    happens: Callable[[Cursor, LoggedEvent | LoggedNote], bool],
    take_over: Callable[[int, LoggedFence], int] = lambda offset, _: offset,
) -> Accept:
    """A reader with another rule for events and notes, or one that knows a tenure by something else than its fence."""

    def accept_otherwise(cursor: Cursor, offset: int, record: LogRecord) -> tuple[Cursor, bool]:
        if isinstance(record, LoggedFence):
            return Cursor(offset + 1, take_over(offset, record), cursor.position), True
        happened = happens(cursor, record)
        return Cursor(offset + 1, cursor.fence, record.position if happened else cursor.position), happened

    return accept_otherwise


def accept_counting_from_each_fence(cursor: Cursor, offset: int, record: LogRecord) -> tuple[Cursor, bool]:
    """Begins with position 1 again in each tenure."""
    cursor, happened = accept(cursor, offset, record)
    if isinstance(record, LoggedFence):
        cursor = Cursor(cursor.offset, cursor.fence, Position(0))
    return cursor, happened


class WritesUnderItsOwnersName(Tenure):
    """The writer number is the ingestor's own, the same in each of its tenures."""

    fence_offset: int

    def recover(self, up_to: int) -> Steps:
        yield from super().recover(up_to)
        self.fence_offset, self.writer = self.writer, _number_of(self.name)

    def offset_of(self, position: int) -> int:
        return self.fence_offset + (position - self.position_at_fence)


def _number_of(tenure: str) -> int:
    """The same for all tenures of an ingestor: ``A`` of ``A1`` and ``A7``."""
    return ord(tenure[0])


FAULTY = {
    "recovers before it fences": Protocol(tenure=RecoversBeforeItFences),
    "takes any fence for its own": Protocol(tenure=TakesAnyFenceForItsOwn),
    "recovers all it reads": Protocol(tenure=RecoversAllItReads),
    "goes on under its old fence": Protocol(tenure=GoesOnUnderItsOldFence),
    "remembers commands it only decided": Protocol(tenure=RemembersCommandsItOnlyDecided),
    "keeps the overlay": Protocol(tenure=KeepsTheOverlay),
    "checkpoint without the fence": Protocol(store=CheckpointWithoutTheFence),
    "store open to all": Protocol(store=StoreOpenToAll),
    "store read by all": Protocol(store=StoreReadByAll),
    "knows stored keys only": Protocol(tenure=KnowsStoredKeysOnly),
    "burns event_ids": Protocol(tenure=BurnsEventIds),
    "refuses without a note": Protocol(tenure=RefusesWithoutANote),
    "notes later": Protocol(tenure=NotesLater),
    "replays at once": Protocol(tenure=ReplaysAtOnce),
    "splits commands": Protocol(tenure=SplitsCommands),
    "replies before the ack": Protocol(tenure=RepliesBeforeTheAck),
    "flushes before the ack": Protocol(tenure=FlushesBeforeTheAck),
    "trusts any success": Protocol(tenure=TrustsAnySuccess),
    "trusts an unknown offset": Protocol(tenure=TrustsAnUnknownOffset),
    "trusts later offsets": Protocol(tenure=TrustsLaterOffsets),
    "checks the first offset only": Protocol(tenure=ChecksTheFirstOffsetOnly),
    "acknowledges in any order": Protocol(tenure=AcknowledgesInAnyOrder),
    "readers ignore the fence": Protocol(
        accept=accept_if(lambda cursor, record: record.position == cursor.position + 1)
    ),
    "readers ignore the position": Protocol(accept=accept_if(lambda cursor, record: record.writer == cursor.fence)),
    "readers accept gaps": Protocol(
        accept=accept_if(lambda cursor, record: record.writer == cursor.fence and record.position > cursor.position)
    ),
    "readers count from each fence": Protocol(accept=accept_counting_from_each_fence),
    "writers are ingestors, not tenures": Protocol(
        tenure=WritesUnderItsOwnersName,
        accept=accept_if(
            lambda cursor, record: record.writer == cursor.fence and record.position == cursor.position + 1,
            take_over=lambda _, record: _number_of(record.fence.owner),
        ),
    ),
}


def _latest_fence(events: Partition) -> int | None:
    fences = (offset for offset, record in enumerate(events.records) if isinstance(record, LoggedFence))
    return max(fences, default=None)
