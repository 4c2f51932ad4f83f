"""The rules of the batch API."""

from datetime import UTC, datetime

from shared.commands import ItemError
from shared.events import TenantEpisodeRecorded
from tests.builders import batch, item
from tests.spec import NOON, given, happened, note_code, outcome


def test_valid_items_become_events_with_contiguous_ids_in_request_order() -> None:
    partition = given(batch(item("before")))
    judged = partition.when(batch(item("one"), item("two"), item("three")))
    contents = [event.content for event in happened(judged) if isinstance(event, TenantEpisodeRecorded)]
    assert contents == ["one", "two", "three"]
    assert outcome(judged).event_ids == (2, 3, 4)
    assert outcome(judged).episode_ids == tuple(event.id for event in happened(judged))
    assert len(set(outcome(judged).episode_ids)) == 3


def test_what_the_caller_left_out_is_the_time_of_recording() -> None:
    given_time = datetime(2026, 3, 15, 9, tzinfo=UTC)
    first, second = happened(given().when(batch(item(), item(timestamp=given_time))))
    assert isinstance(first, TenantEpisodeRecorded)
    assert isinstance(second, TenantEpisodeRecorded)
    assert (first.timestamp, second.timestamp) == (NOON, given_time)


def test_an_item_whose_key_was_seen_is_not_recorded_again_and_keeps_its_first_ids() -> None:
    partition = given(batch(item("a", idempotency_key="k1"), item("b")))
    first = outcome(partition.when(batch(item("x"), item("a", idempotency_key="k1"), item("y"))))
    assert first.event_ids == (3, 1, 4)
    assert len(first.episode_ids) == 3
    assert first.episode_ids[1] == partition.log[0].event.id


def test_a_key_twice_in_one_batch_is_recorded_once() -> None:
    judged = given().when(batch(item("a", idempotency_key="k"), item("b"), item("a", idempotency_key="k")))
    assert outcome(judged).event_ids == (1, 2, 1)
    assert len(judged.events) == 2


def test_item_keys_belong_to_their_tenant() -> None:
    partition = given(batch(item(idempotency_key="k")))
    assert outcome(partition.when(batch(item(idempotency_key="k"), tenant_id="globex"))).event_ids == (1,)
    assert len(partition.log) == 2


def test_a_batch_without_anything_new_burns_no_event_id() -> None:
    errors = (ItemError(0, "validation_error", "Field 'content' is required"),)
    partition = given(batch(item(idempotency_key="k")))
    judged = partition.when(batch(item(idempotency_key="k"), errors=errors))
    assert note_code(judged) == "unchanged"
    assert outcome(judged).event_ids == (1,)
    assert outcome(judged).errors == errors
    assert judged.receipt.event_id == 1
    assert outcome(partition.when(batch(item()))).event_ids == (2,)
