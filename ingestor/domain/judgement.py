"""One command against the state: its events with their places in the log, its receipt, and the state after it."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from msgspec import Raw, Struct
from msgspec.structs import replace

from ingestor.domain import project_episode, tenant_episode
from ingestor.domain.state import (
    Changes,
    Lookup,
    Overlay,
    State,
    StoredReceipt,
    StreamHead,
    head_key,
    receipt_key,
)
from shared.codec import decode_receipt, encode_receipt
from shared.commands import Command, RecordEpisodes
from shared.errors import Refused
from shared.events import CommandType, Event, KeptAnswer, LoggedEvent, NotedCommand, TenantEpisodeRecorded
from shared.ids import EventId, Position
from shared.receipts import CommandRefused, Outcome, Receipt


class Place(Struct, frozen=True):
    """Where a command stands, and where its events will."""

    command_offset: int
    at: datetime
    """The command record's Kafka timestamp."""
    writer: int
    position: Position
    """Of the last record before."""


class Judgement(Struct, frozen=True):
    """Either ``events``, all of one command; or ``note``, what the log keeps of a command without events."""

    receipt: Receipt
    events: tuple[LoggedEvent, ...] = ()
    changes: Changes = {}
    note: NotedCommand | None = None


def judge(lookup: Lookup, command: Command, place: Place, retention: timedelta) -> Judgement:
    """Decide the command. ``retention`` is how long an Idempotency-Key is kept."""
    state = State(command.stream, lookup)
    head = state.head()
    at = max(place.at, head.at)
    try:
        if (first := _first_answer(state, command, at, retention)) is not None:
            again = replace(first, command_id=command.command_id, replayed=True)
            return Judgement(again, note=NotedCommand(command.command_id, "replayed"))
        events = _decide(state, command, at)
    except Refused as refused:
        receipt = _receipt(command, head.event_id, CommandRefused(refused.code, refused.detail))
        return Judgement(receipt, note=NotedCommand(command.command_id, refused.code))
    if not events:
        return _without_events(state, command, at)

    completes: CommandType = type(command).__name__  # type: ignore[assignment]  # a command's class names its type
    logged = [
        LoggedEvent(
            stream=command.stream,
            event_id=EventId(head.event_id + number),
            position=Position(place.position + number),
            writer=place.writer,
            command_id=command.command_id,
            command_offset=place.command_offset,
            actor=command.actor,
            at=at,
            event=event,
        )
        for number, event in enumerate(events, start=1)
    ]
    changes = Overlay(lookup)
    after = _fold(changes, logged)
    answer = None
    if isinstance(command, RecordEpisodes):
        beyond = tenant_episode.beyond_events(after, command, logged[0].event_id)
        outcome: Outcome = tenant_episode.outcome(logged, beyond)
        answer = tenant_episode.to_text(beyond)
    else:
        outcome = project_episode.outcome(after, completes, logged)
    logged[-1] = replace(
        logged[-1],
        completes=completes,
        idempotency_key=command.idempotency_key,
        request_hash=command.request_hash if command.idempotency_key else None,
        answer=answer,
    )
    receipt = _receipt(command, logged[-1].event_id, outcome)
    _remember(changes, logged[-1], receipt)
    return Judgement(receipt, tuple(logged), changes)


def relearn(
    overlay: Overlay, events: Sequence[LoggedEvent], *, askable: bool = True, with_receipt: bool = False
) -> Receipt | None:
    """Fold the events of one command, all of them, over the state before them: as when they were decided.

    Args:
        overlay: the state before; the changes are put into it.
        events: as read from the log.
        askable: whether a retry under the command's Idempotency-Key may still come, if it has one.
        with_receipt: whether the receipt is wanted in any case.

    Returns:
        The receipt, if it is wanted or a retry can ask for it.
    """
    after = _fold(overlay, events)
    last = events[-1]
    if not with_receipt and not (askable and last.idempotency_key is not None):
        return None
    outcome: Outcome
    if isinstance(last.event, TenantEpisodeRecorded):
        outcome = tenant_episode.outcome(events, tenant_episode.from_text(last.answer))
    else:
        assert last.completes is not None  # noqa: S101 - the reader ends a commit with it
        outcome = project_episode.outcome(after, last.completes, events)
    receipt = Receipt(command_id=last.command_id, stream=last.stream, event_id=last.event_id, outcome=outcome)
    _remember(overlay, last, receipt)
    return receipt


def relearn_note(note: NotedCommand) -> Changes:
    """What a note read from the log changes: the receipt that it keeps for retries."""
    if note.kept is None:
        return {}
    receipt = decode_receipt(bytes(note.kept.receipt))
    key = receipt_key(receipt.stream, note.kept.idempotency_key)
    return {key: StoredReceipt(note.kept.request_hash, note.kept.at, receipt)}


def _decide(state: State, command: Command, at: datetime) -> Sequence[Event]:
    if isinstance(command, RecordEpisodes):
        return tenant_episode.decide(state, command, at)
    return project_episode.decide(state, command)


def _without_events(state: State, command: Command, at: datetime) -> Judgement:
    head = state.head()
    outcome: Outcome
    if isinstance(command, RecordEpisodes):
        beyond = tenant_episode.beyond_events(state, command, EventId(head.event_id + 1))
        outcome = tenant_episode.outcome((), beyond)
    else:
        outcome = project_episode.unchanged(state, command)
    receipt = _receipt(command, head.event_id, outcome)
    if command.idempotency_key is None:
        return Judgement(receipt, note=NotedCommand(command.command_id, "unchanged"))
    kept = KeptAnswer(command.idempotency_key, command.request_hash, at, Raw(encode_receipt(receipt)))
    note = NotedCommand(command.command_id, "unchanged", kept)
    return Judgement(receipt, changes=relearn_note(note), note=note)


def _fold(overlay: Overlay, events: Sequence[LoggedEvent]) -> State:
    """Put what the events change into the overlay; the state after them."""
    state = State(events[0].stream, overlay.__getitem__)
    for logged in events:
        if isinstance(logged.event, TenantEpisodeRecorded):
            overlay.update(tenant_episode.evolve(logged, logged.event))
        else:
            overlay.update(project_episode.evolve(state, logged, logged.event))
    last = events[-1]
    overlay[head_key(last.stream)] = StreamHead(last.event_id, last.at)
    return state


def _first_answer(state: State, command: Command, at: datetime, retention: timedelta) -> Receipt | None:
    """The receipt of the request that came first under the same Idempotency-Key, if it is still kept."""
    if command.idempotency_key is None:
        return None
    stored = state.receipt(command.idempotency_key)
    if stored is None or at - stored.at > retention:
        return None
    if stored.request_hash != command.request_hash:
        raise Refused(
            "idempotency_mismatch",
            f"The Idempotency-Key {command.idempotency_key!r} was used for another request. Use a new key.",
        )
    return stored.receipt


def _remember(changes: Changes, last: LoggedEvent, receipt: Receipt) -> None:
    if last.idempotency_key is not None:
        assert last.request_hash is not None  # noqa: S101 - they go together
        changes[receipt_key(last.stream, last.idempotency_key)] = StoredReceipt(last.request_hash, last.at, receipt)


def _receipt(command: Command, event_id: EventId, outcome: Outcome | CommandRefused) -> Receipt:
    return Receipt(command_id=command.command_id, stream=command.stream, event_id=event_id, outcome=outcome)
