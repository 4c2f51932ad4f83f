"""The batch API: episodes that a tenant's agents record, many at a time. One stream per tenant."""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from msgspec import UNSET, Struct

from ingestor.domain.state import Changes, RecordedItem, State, item_key
from shared.commands import ItemError, RecordEpisodes
from shared.events import LoggedEvent, TenantEpisodeRecorded
from shared.ids import EventId, episode_id
from shared.receipts import EpisodesRecorded


class Repeat(Struct, frozen=True):
    """A valid item that had been recorded before: its place among the valid items, and what it became then."""

    place: int
    event_id: EventId
    episode_id: str


class BeyondEvents(Struct, frozen=True):
    """What the answer to a batch holds beyond the events that it made."""

    errors: tuple[ItemError, ...]
    repeats: tuple[Repeat, ...]


def decide(state: State, command: RecordEpisodes, at: datetime) -> Sequence[TenantEpisodeRecorded]:
    """One event for each item whose idempotency_key was not seen in this tenant. Never refuses."""
    events: list[TenantEpisodeRecorded] = []
    seen: set[str] = set()
    for item in command.items:
        if item.idempotency_key is not None:
            if item.idempotency_key in seen or state.item(item.idempotency_key) is not None:
                continue
            seen.add(item.idempotency_key)
        events.append(
            TenantEpisodeRecorded(
                id=episode_id(command.command_id, len(events)),
                namespace=command.namespace,
                type=item.type,
                content=item.content,
                source=item.source,
                author=item.author,
                channel=item.channel,
                timestamp=at if item.timestamp is UNSET else item.timestamp,
                metadata=item.metadata,
                entities=item.entities,
                idempotency_key=item.idempotency_key,
            )
        )
    return events


def evolve(logged: LoggedEvent, event: TenantEpisodeRecorded) -> Changes:
    """What the event changes."""
    if event.idempotency_key is None:
        return {}
    return {item_key(logged.stream, event.idempotency_key): RecordedItem(logged.event_id, event.id)}


def beyond_events(state: State, command: RecordEpisodes, first_event_id: EventId) -> BeyondEvents:
    """What the answer holds beyond the events, which begin with ``first_event_id``; ``state`` is after them."""
    repeats: list[Repeat] = []
    next_event_id = first_event_id
    for place, item in enumerate(command.items):
        known = state.item(item.idempotency_key) if item.idempotency_key is not None else None
        if known is not None and known.event_id != next_event_id:
            repeats.append(Repeat(place, known.event_id, known.episode_id))
        else:
            next_event_id = EventId(next_event_id + 1)
    return BeyondEvents(command.errors, tuple(repeats))


def outcome(events: Sequence[LoggedEvent], beyond: BeyondEvents) -> EpisodesRecorded:
    """The answer: recorded items and repeated ones in the order of the request."""
    pairs = [(logged.event_id, logged.event.id) for logged in events]
    for repeat in beyond.repeats:
        pairs.insert(repeat.place, (repeat.event_id, repeat.episode_id))
    return EpisodesRecorded(
        event_ids=tuple(event_id for event_id, _ in pairs),
        episode_ids=tuple(episode for _, episode in pairs),
        errors=beyond.errors,
    )


def to_text(beyond: BeyondEvents) -> str | None:
    """As it stands in the log, in ``answer``; None if the events say it all."""
    return msgspec.json.encode(beyond).decode() if beyond.errors or beyond.repeats else None


def from_text(text: str | None) -> BeyondEvents:
    return BeyondEvents((), ()) if text is None else msgspec.json.decode(text, type=BeyondEvents)
