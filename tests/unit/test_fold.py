"""Batches folded: however a history is cut, the documents are the same, and the counters are right."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from projector.fold import Inapplicable, Memory, Writes, blame, fold, found, missing, touched_by, weight
from projector.views import Documents, no_documents, project
from shared.commands import Entity
from shared.events import (
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    TenantEpisodeRecorded,
)
from shared.ids import namespace_stream, tenant_stream
from shared.log import Commit
from shared.read_models import BLOCK, ENTITIES, NAMESPACES, PROJECT_EPISODES, PROJECTS, STREAMS, TENANT_EPISODES
from tests.event_log import NOON, History, PartitionLog

ALICE = namespace_stream("alice")
NOTHING = Writes({}, {})


def rebuilt(log: PartitionLog) -> Documents:
    """Replay everything in memory."""
    documents = no_documents()
    for logged in log.events:
        project(documents, logged)
    return documents


class Store:
    """Documents that are a batch behind, as the real ones are while a transaction is on its way."""

    def __init__(self, remembered: int = 2) -> None:
        self.documents = no_documents()
        self.in_flight = NOTHING
        self.memory = Memory(remembered)

    def apply(self, commits: Sequence[Commit]) -> None:
        touches = touched_by(commits)
        known = self.memory.beside(self.in_flight, touches)
        loaded = {
            name: {key: self.documents[name][key] for key in keys if key in self.documents[name]}
            for name, keys in missing(touches, known).items()
        }
        writes = fold(found(touches, known, loaded), commits)
        self.memory.note(writes)
        self.settle()
        self.in_flight = writes

    def settle(self) -> None:
        for name, there in self.in_flight.new.items():
            assert not there.keys() & self.documents[name].keys()
            self.documents[name].update(there)
        for name, there in self.in_flight.changed.items():
            assert there.keys() <= self.documents[name].keys()
            self.documents[name].update(there)
        self.in_flight = NOTHING


def cut(commits: Sequence[Commit], sizes: Iterator[int]) -> Iterator[Sequence[Commit]]:
    start = 0
    while start < len(commits):
        end = start + next(sizes)
        yield commits[start:end]
        start = end


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 60), sizes=st.lists(st.integers(1, 12), min_size=1))
def test_live_equals_rebuilt_however_the_batches_are_cut(seed: int, steps: int, sizes: list[int]) -> None:
    log = PartitionLog()
    history = History(log, random.Random(seed), namespaces=2, tenants=2)  # noqa: S311 - reproducible, not secret
    for _ in range(steps):
        history.step()
        if history.random.random() < 0.1:
            log.note()
    store = Store()
    endless = (sizes[number % len(sizes)] for number in range(10**6))
    for commits in cut(log.commits, endless):
        store.apply(commits)
    store.settle()
    replayed = rebuilt(log)
    assert store.documents == replayed
    for name, there in replayed.items():
        for key, document in there.items():
            assert repr(store.documents[name][key]) == repr(document), "field order too"
    assert_counters_equal_a_recount(store.documents)


def assert_counters_equal_a_recount(documents: Documents) -> None:
    living = [one for one in documents[PROJECT_EPISODES].values() if not one["deleted"]]
    for project_id, one in documents[PROJECTS].items():
        ordinals = [episode["ordinal"] for episode in living if episode["project_id"] == project_id]
        assert one["total"] == len(ordinals)
        blocks = Counter((ordinal - 1) // BLOCK for ordinal in ordinals)
        assert one["blocks"] == [blocks[number] for number in range(len(one["blocks"]))]
    mentions: Counter[str] = Counter()
    for episode in documents[TENANT_EPISODES].values():
        mentions.update({f"{episode['tenant_id']}/{entity['id']}" for entity in episode["entities"]})
    assert {key: one["mentions"] for key, one in documents[ENTITIES].items()} == mentions


def created(key: str = "e1", ordinal: int = 1, description: str = "") -> ProjectEpisodeCreated:
    return ProjectEpisodeCreated(
        id=key,
        project_id="p1",
        project="robotics",
        ordinal=ordinal,
        name=key,
        description=description,
        tags=(),
        folder=None,
        write_protected=False,
        status="running",
        metadata=Raw(b"null"),
    )


def a_log() -> PartitionLog:
    log = PartitionLog()
    log.append(ALICE, NamespaceCreated("n1", "alice"), ProjectCreated("p1", "robotics", "robotics"), created())
    return log


def test_what_a_batch_creates_is_not_loaded() -> None:
    log = a_log()
    log.append(tenant_stream("t"), recorded("ep_1", Entity("ent_1", "a", "b")))
    assert missing(touched_by(log.commits), NOTHING) == {ENTITIES: ["t/ent_1"]}


def recorded(key: str, *entities: Entity) -> TenantEpisodeRecorded:
    return TenantEpisodeRecorded(id=key, type="message", content="x", timestamp=NOON, entities=entities)


def test_what_is_touched_often_is_remembered_for_longer() -> None:
    log = a_log()
    memory = Memory()
    memory.note(fold(no_documents(), log.commits))
    touches = touched_by([log.append(ALICE, ProjectEpisodeDeleted("e1", "p1", "robotics", "e1"))])
    known = memory.beside(NOTHING, touches)
    assert missing(touches, known) == {PROJECT_EPISODES: ["e1"]}
    assert {name: [*there] for name, there in known.changed.items()} == {PROJECTS: ["p1"], STREAMS: [ALICE]}
    just_written = {"_id": "p1", "total": 7}
    assert memory.beside(Writes({}, {PROJECTS: {"p1": just_written}}), touches).changed[PROJECTS]["p1"] is just_written


def test_what_was_written_longest_ago_is_forgotten_first() -> None:
    memory = Memory(2)
    for key, at in (("a", 1), ("b", 1), ("a", 2), ("c", 1)):
        memory.note(Writes({}, {STREAMS: {key: {"_id": key, "event_id": at}}}))
    touches = {STREAMS: dict.fromkeys("abc", False), PROJECTS: {}, ENTITIES: {}}
    assert memory.beside(NOTHING, touches).changed == {
        STREAMS: {"a": {"_id": "a", "event_id": 2}, "c": {"_id": "c", "event_id": 1}}
    }


def test_what_was_just_written_is_not_loaded() -> None:
    log = a_log()
    writes = fold(no_documents(), log.commits)
    more = [log.append(ALICE, ProjectEpisodeDeleted("e1", "p1", "robotics", "e1"))]
    assert missing(touched_by(more), NOTHING) == {PROJECT_EPISODES: ["e1"], PROJECTS: ["p1"], STREAMS: [ALICE]}
    assert missing(touched_by(more), writes) == {}
    assert weight(touched_by(more), writes) > 0


def test_each_touched_document_is_written_once_and_no_other() -> None:
    log = a_log()
    before = fold(no_documents(), log.commits)
    more = [log.append(ALICE, created(f"e{number}", number)) for number in (2, 3)]
    writes = fold(found(touched_by(more), before, {}), more)
    assert {name: [*there] for name, there in writes.new.items() if there} == {PROJECT_EPISODES: ["e2", "e3"]}
    assert {name: [*there] for name, there in writes.changed.items() if there} == {PROJECTS: ["p1"], STREAMS: [ALICE]}
    assert writes.changed[PROJECTS]["p1"]["total"] == 3
    assert not before.new[NAMESPACES].keys() & writes.changed[NAMESPACES].keys()


def test_the_event_that_does_not_fit_is_named() -> None:
    log = a_log()
    log.append(ALICE, created("e2", 2), created("e2", 3))
    with pytest.raises(Inapplicable) as inapplicable:
        fold(no_documents(), log.commits)
    assert inapplicable.value.index == 2, "the fence, the first command, then this one"
    assert inapplicable.value.offset == 5
    assert str(inapplicable.value) == (
        "ProjectEpisodeCreated (event 5 of namespace:alice, position 5) cannot be applied: e2 exists already"
    )


def test_a_batch_that_fails_leaves_what_was_loaded_as_it_was() -> None:
    log = a_log()
    before: dict[str, dict[str, Any]] = no_documents()
    log.append(ALICE, created("e1", 2))
    with pytest.raises(Inapplicable):
        fold(before, log.commits)
    assert before == no_documents()


def test_the_last_event_that_touches_a_document_is_to_blame_for_it() -> None:
    log = a_log()
    commit = log.append(ALICE, created("e2", 2), created("e3", 3), created("e4", 4))
    assert blame(commit, PROJECT_EPISODES, "e3", "it is too large") == (
        5,
        "ProjectEpisodeCreated (event 5 of namespace:alice, position 5) cannot be applied: it is too large",
    )
    assert blame(commit, PROJECTS, "p1", "it is too large")[0] == 6


def test_the_text_of_what_was_just_written_is_weighed() -> None:
    log = PartitionLog()
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"), created(description="x" * 1000))
    first = fold(no_documents(), log.commits)
    deletion = [log.append(ALICE, ProjectEpisodeDeleted("e1", "p1", "robotics", "e1"))]
    assert 1000 < weight(touched_by(deletion), first) < 2000
    second = fold(found(touched_by(deletion), first, {}), deletion)
    assert 1000 < weight(touched_by(deletion), second) < 2000
    elsewhere = [log.append(tenant_stream("t"), recorded("ep_1"))]
    assert weight(touched_by(elsewhere), first) == 0
