"""Idempotency, and that a cold start knows what a live writer knows."""

from datetime import timedelta

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import Raw

from ingestor.domain.judgement import relearn
from ingestor.domain.state import Overlay
from ingestor.recovery import Recovery
from ingestor.state import Checkpoint
from shared.commands import Command, EpisodeFields, ItemError
from shared.log import Cursor, LogReader
from tests.builders import batch, delete, item, patch, restore, upsert
from tests.fakes import InMemoryStateStore
from tests.spec import NOON, WEEK, Partition, cold_start, given, note_code, outcome, refusal
from tests.written_log import WrittenLog


def test_a_retry_under_the_same_key_gets_the_first_receipt_and_no_effect() -> None:
    partition = given(upsert(idempotency_key="k", request_hash="h"))
    partition.when(upsert(fields=EpisodeFields(description="later")))
    retry = upsert(idempotency_key="k", request_hash="h")
    judged = partition.when(retry)
    assert note_code(judged) == "replayed"
    assert judged.receipt.replayed
    assert judged.receipt.command_id == retry.command_id
    assert judged.receipt.event_id == 3
    assert outcome(judged).created
    assert outcome(judged).episode.description is None
    assert not judged.events


def test_another_request_under_the_same_key_is_refused() -> None:
    partition = given(upsert(idempotency_key="k", request_hash="h"))
    assert refusal(partition.when(upsert(idempotency_key="k", request_hash="other"))) == "idempotency_mismatch"


def test_a_key_is_scoped_to_its_stream() -> None:
    partition = given(upsert(idempotency_key="k", request_hash="h"))
    judged = partition.when(upsert(idempotency_key="k", request_hash="other", namespace="bob"))
    assert not judged.receipt.replayed
    assert judged.events


def test_a_key_is_forgotten_after_its_time() -> None:
    partition = given(upsert(idempotency_key="k", request_hash="h"))
    at_the_end = partition.when(upsert(idempotency_key="k", request_hash="h"), at=NOON + WEEK)
    assert at_the_end.receipt.replayed
    just_after = NOON + WEEK + timedelta(milliseconds=1)
    assert partition.when(upsert(idempotency_key="k", request_hash="other"), at=just_after).events


def test_a_refused_request_is_judged_afresh() -> None:
    partition = given(upsert("taken"), upsert("run-1"))
    rename = patch("run-1", new_name="taken", idempotency_key="k", request_hash="h")
    assert refusal(partition.when(rename)) == "conflict"
    partition.when(patch("taken", new_name="free"))
    assert outcome(partition.when(rename)).episode.name == "taken"


def test_a_replayed_batch_answers_with_its_errors_and_repeats_after_a_cold_start_too() -> None:
    errors = (ItemError(1, "validation_error", "Field 'content' is required"),)
    partition = given(batch(item(idempotency_key="old")))
    request = {"errors": errors, "idempotency_key": "k", "request_hash": "h"}
    first = partition.when(batch(item("a"), item(idempotency_key="old"), **request))
    fresh = Partition()
    fresh.state = cold_start(partition.log)
    again = fresh.when(batch(item("a"), item(idempotency_key="old"), **request))
    assert again.receipt.replayed
    assert again.receipt.outcome == first.receipt.outcome
    assert outcome(again).event_ids == (2, 1)


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_an_answer_without_an_event_is_kept_for_retries_too(start: str) -> None:
    partition = given(upsert("run-1"))
    first = partition.when(restore("run-1", idempotency_key="k", request_hash="h"))
    assert note_code(first) == "unchanged"
    partition.when(delete("run-1"))
    if start == "cold":
        partition.state = cold_start(partition.log, partition.notes)
    again = partition.when(restore("run-1", idempotency_key="k", request_hash="h"))
    assert again.receipt.replayed
    assert again.receipt.outcome == first.receipt.outcome
    assert refusal(partition.when(patch("run-1"))) == "not_found"


_names = st.sampled_from(["a", "b", "c"])
_keys = st.none() | st.sampled_from(["k1", "k2"])
_fields = st.builds(
    EpisodeFields,
    description=st.none() | st.text(max_size=3),
    folder=st.sampled_from([None, "/x", "/x/y"]),
    write_protected=st.sampled_from([False, False, False, True]),
    metadata=st.sampled_from([Raw(b"null"), Raw(b'{"a":1}')]),
)
_commands = st.one_of(
    st.builds(upsert, _names, _fields, idempotency_key=_keys, namespace=st.sampled_from(["alice", "bob"])),
    st.builds(patch, _names, _fields, new_name=_names, idempotency_key=_keys),
    st.builds(delete, _names, idempotency_key=_keys),
    st.builds(restore, _names, idempotency_key=_keys),
    st.builds(
        lambda items, key: batch(*items, idempotency_key=key),
        st.lists(st.builds(item, idempotency_key=_keys), min_size=1, max_size=4),
        _keys,
    ),
)


@settings(max_examples=200, deadline=None)
@hypothesis_given(st.lists(_commands, max_size=25))
def test_whatever_happens_ids_have_no_gap_and_a_cold_start_knows_the_same(history: list[Command]) -> None:
    partition = Partition()
    for command in history:
        before = dict(partition.state)
        judged = partition.when(command)
        assert bool(judged.events) == (judged.note is None)
        if judged.note is not None and judged.note.kept is None:
            assert partition.state == before
        if judged.events:
            assert relearn(Overlay(before.get), judged.events, with_receipt=True) == judged.receipt
    for stream in {logged.stream for logged in partition.log}:
        event_ids = [logged.event_id for logged in partition.log if logged.stream == stream]
        assert event_ids == list(range(1, len(event_ids) + 1))
    assert [logged.position for logged in partition.log] == list(range(1, len(partition.log) + 1))
    assert cold_start(partition.log, partition.notes) == partition.state


@settings(max_examples=100, deadline=None)
@hypothesis_given(st.lists(_commands, max_size=25), st.integers(1, 6))
def test_a_recovery_in_chunks_comes_to_the_live_state(history: list[Command], chunk: int) -> None:
    live = WrittenLog()
    for command in history:
        live.write(command)
    store = InMemoryStateStore()
    recovery, reader = Recovery(store, Checkpoint(Cursor(), "", -1)), LogReader(Cursor())
    for offset, value in enumerate(live.values):
        if (commit := reader.read(offset, value)) is not None:
            recovery.take(commit)
        if offset % chunk == 0:
            recovery.flush()
    recovery.flush()
    assert store.values == live.store.values
    if history:
        assert store.checkpoint() == live.store.checkpoint()
