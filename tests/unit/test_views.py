"""What each event does to the read models, what it counts, and what it leaves alone."""

from typing import Any

import pytest
from msgspec import Raw

from projector.views import INDEXES, Documents, no_documents, project, touched
from shared import read_models
from shared.commands import Entity
from shared.errors import PoisonRecord
from shared.events import (
    EpisodeChanges,
    Event,
    FolderCreated,
    FolderRef,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
    TenantEpisodeRecorded,
)
from shared.ids import StreamId, namespace_stream, tenant_stream
from shared.read_models import (
    BLOCK,
    ENTITIES,
    FOLDERS,
    NAMESPACES,
    PROJECT_EPISODES,
    PROJECTS,
    STREAMS,
    TENANT_EPISODES,
)
from tests.event_log import NOON, PartitionLog

ALICE = namespace_stream("alice")
ACME = tenant_stream("acme")

PROJECT = ProjectCreated("p1", "robotics", "robotics")
DELETED = ProjectEpisodeDeleted("e1", "p1", "robotics", "run-1")
RESTORED = ProjectEpisodeRestored("e1", "p1", "robotics", "run-1")


def created(key: str = "e1", ordinal: int = 1, **fields: Any) -> ProjectEpisodeCreated:
    defaults: dict[str, Any] = {
        "name": "run-1",
        "description": None,
        "tags": (),
        "folder": None,
        "write_protected": False,
        "status": "running",
        "metadata": Raw(b"null"),
    }
    return ProjectEpisodeCreated(id=key, project_id="p1", project="robotics", ordinal=ordinal, **(defaults | fields))


def revised(**changes: Any) -> ProjectEpisodeRevised:
    return ProjectEpisodeRevised("e1", "p1", "robotics", "run-1", EpisodeChanges(**changes))


def recorded(key: str = "ep_1", *entities: Entity, **fields: Any) -> TenantEpisodeRecorded:
    defaults: dict[str, Any] = {"type": "message", "content": "It happened.", "timestamp": NOON}
    return TenantEpisodeRecorded(id=key, entities=entities, **(defaults | fields))


class ReadModels:
    """Documents, and the log that made them."""

    def __init__(self) -> None:
        self.documents: Documents = no_documents()
        self.log = PartitionLog()

    def when(self, *events: Event, stream: StreamId = ALICE) -> "ReadModels":
        """Project the events of one command."""
        for logged in self.log.append(stream, *events).events:
            project(self.documents, logged)
        return self

    def one(self, collection: str, key: str) -> dict[str, Any]:
        return self.documents[collection][key]


def given(*events: Event, stream: StreamId = ALICE) -> ReadModels:
    models = ReadModels()
    for event in events:
        models.when(event, stream=stream)
    return models


def test_the_collections_are_those_of_the_layout() -> None:
    layout = {value for name, value in vars(read_models).items() if name.isupper() and isinstance(value, str)}
    assert set(INDEXES) == layout - {read_models.CHECKPOINTS, read_models.POINTERS, read_models.POINTER_ID}


def test_a_namespace_is_kept() -> None:
    models = given(NamespaceCreated("n1", "alice"))
    assert models.one(NAMESPACES, "n1") == {"_id": "n1", "slug": "alice", "created_at": models.log.at}


def test_a_project_begins_empty() -> None:
    models = given(PROJECT)
    assert models.one(PROJECTS, "p1") == {
        "_id": "p1",
        "namespace": "alice",
        "slug": "robotics",
        "name": "robotics",
        "created_at": models.log.at,
        "total": 0,
        "blocks": [],
    }


def test_a_folder_is_called_by_its_last_segment() -> None:
    models = given(PROJECT, FolderCreated("f2", "p1", "robotics", "f1", "/a/b c", "b c"))
    assert models.one(FOLDERS, "f2") == {
        "_id": "f2",
        "namespace": "alice",
        "project": "robotics",
        "project_id": "p1",
        "parent_id": "f1",
        "name": "b c",
        "path": "/a/b c",
        "created_at": models.log.at,
    }


def test_an_episode_is_kept_as_created() -> None:
    models = given(
        PROJECT,
        created(
            description="First.",
            tags=("x", "y"),
            folder=FolderRef("f1", "/a"),
            metadata=Raw(b'{"n":18446744073709551616}'),
        ),
    )
    assert models.one(PROJECT_EPISODES, "e1") == {
        "_id": "e1",
        "namespace": "alice",
        "project": "robotics",
        "project_id": "p1",
        "ordinal": 1,
        "name": "run-1",
        "description": "First.",
        "tags": ["x", "y"],
        "status": "running",
        "write_protected": False,
        "folder": {"id": "f1", "path": "/a"},
        "metadata": '{"n":18446744073709551616}',
        "created_at": models.log.at,
        "updated_at": models.log.at,
        "deleted": False,
        "deleted_at": None,
        "event_id": 2,
    }


def test_a_created_episode_is_counted() -> None:
    models = given(PROJECT, created())
    assert (models.one(PROJECTS, "p1")["total"], models.one(PROJECTS, "p1")["blocks"]) == (1, [1])


def test_blocks_begin_after_every_full_one() -> None:
    models = given(PROJECT, *(created(f"e{n}", n) for n in range(1, BLOCK + 2)))
    assert models.one(PROJECTS, "p1")["blocks"] == [BLOCK, 1]
    models.when(ProjectEpisodeDeleted(f"e{BLOCK}", "p1", "robotics", "run-1"))
    assert models.one(PROJECTS, "p1")["blocks"] == [BLOCK - 1, 1]
    models.when(ProjectEpisodeDeleted(f"e{BLOCK + 1}", "p1", "robotics", "run-1"))
    assert models.one(PROJECTS, "p1")["blocks"] == [BLOCK - 1, 0]
    assert models.one(PROJECTS, "p1")["total"] == BLOCK - 1


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"name": "run-2"}, "name", "run-2"),
        ({"description": None}, "description", None),
        ({"tags": ("z",)}, "tags", ["z"]),
        ({"folder": None}, "folder", None),
        ({"folder": FolderRef("f2", "/b")}, "folder", {"id": "f2", "path": "/b"}),
        ({"write_protected": True}, "write_protected", True),
        ({"status": "archived"}, "status", "archived"),
        ({"metadata": Raw(b"null")}, "metadata", "null"),
    ],
)
def test_a_revision_changes_its_keys_and_no_others(change: dict[str, Any], field: str, value: Any) -> None:
    models = given(
        PROJECT,
        created(description="First.", tags=("x",), folder=FolderRef("f1", "/a"), metadata=Raw(b'{"n":1}')),
    )
    before = models.one(PROJECT_EPISODES, "e1")
    models.when(revised(**change))
    assert models.one(PROJECT_EPISODES, "e1") == before | {field: value, "updated_at": models.log.at, "event_id": 3}


def test_a_revision_without_changes_moves_updated_at() -> None:
    models = given(PROJECT, created())
    before = models.one(PROJECT_EPISODES, "e1")
    models.when(revised())
    assert models.one(PROJECT_EPISODES, "e1") == before | {"updated_at": models.log.at, "event_id": 3}
    assert models.log.at > before["updated_at"]


def test_a_deleted_episode_keeps_its_document_and_is_not_counted() -> None:
    models = given(PROJECT, created())
    before = models.one(PROJECT_EPISODES, "e1")
    models.when(DELETED)
    at = models.log.at
    after = {"deleted": True, "deleted_at": at, "updated_at": at, "event_id": 3}
    assert models.one(PROJECT_EPISODES, "e1") == before | after
    assert (models.one(PROJECTS, "p1")["total"], models.one(PROJECTS, "p1")["blocks"]) == (0, [0])


def test_a_restored_episode_is_counted_again() -> None:
    models = given(PROJECT, created())
    before = models.one(PROJECT_EPISODES, "e1")
    models.when(DELETED).when(RESTORED)
    assert models.one(PROJECT_EPISODES, "e1") == before | {"updated_at": models.log.at, "event_id": 4}
    assert (models.one(PROJECTS, "p1")["total"], models.one(PROJECTS, "p1")["blocks"]) == (1, [1])


def test_a_recorded_episode_is_kept() -> None:
    models = given(
        recorded(
            "ep_1",
            Entity("ent_1", "Kafka", "technology"),
            namespace="notes",
            source="chat",
            author="ann",
            channel="#a",
            metadata=Raw(b'{"k":null}'),
            idempotency_key="k-1",
        ),
        stream=ACME,
    )
    assert models.one(TENANT_EPISODES, "ep_1") == {
        "_id": "ep_1",
        "tenant_id": "acme",
        "namespace": "notes",
        "event_id": 1,
        "type": "message",
        "content": "It happened.",
        "source": "chat",
        "author": "ann",
        "channel": "#a",
        "timestamp": NOON,
        "metadata": '{"k":null}',
        "entities": [{"id": "ent_1", "name": "Kafka", "type": "technology"}],
        "status": "active",
        "created_at": models.log.at,
    }


def test_an_entity_counts_episodes_not_mentions() -> None:
    kafka, shouted = Entity("ent_1", "Kafka", "technology"), Entity("ent_1", "KAFKA", "technology")
    models = given(recorded("ep_1", kafka, shouted), recorded("ep_2"), recorded("ep_3", shouted), stream=ACME)
    assert models.documents[ENTITIES] == {
        "acme/ent_1": {
            "_id": "acme/ent_1",
            "tenant_id": "acme",
            "entity_id": "ent_1",
            "name": "Kafka",
            "type": "technology",
            "mentions": 2,
            "first_event_id": 1,
            "last_event_id": 3,
        }
    }


def test_tenants_do_not_share_entities() -> None:
    models = given(recorded("ep_1", Entity("ent_1", "Kafka", "technology")), stream=ACME)
    models.when(recorded("ep_2", Entity("ent_1", "Kafka", "technology")), stream=tenant_stream("globex"))
    assert [one["mentions"] for one in models.documents[ENTITIES].values()] == [1, 1]


def test_an_owner_may_have_a_colon_in_its_name() -> None:
    models = given(recorded("ep_1"), stream=tenant_stream("a:b"))
    assert models.one(TENANT_EPISODES, "ep_1")["tenant_id"] == "a:b"


def test_every_event_moves_its_stream() -> None:
    models = given(NamespaceCreated("n1", "alice"), PROJECT)
    models.when(recorded("ep_1"), stream=ACME)
    assert models.one(STREAMS, ALICE) == {"_id": ALICE, "event_id": 2, "at": models.log.events[1].at}
    assert models.one(STREAMS, ACME) == {"_id": ACME, "event_id": 1, "at": models.log.at}


@pytest.mark.parametrize("event_id", [1, 2, 4])
def test_a_hole_or_a_repeat_in_a_stream_does_not_fit(event_id: int) -> None:
    models = given(NamespaceCreated("n1", "alice"), PROJECT)
    models.log.last_event_ids[ALICE] = event_id - 1
    with pytest.raises(PoisonRecord, match=f"event {event_id} cannot follow event 2 of namespace:alice"):
        models.when(created())


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([revised()], "e1 does not exist"),
        ([DELETED], "e1 does not exist"),
        ([RESTORED], "e1 does not exist"),
        ([created()], "p1 does not exist"),
        ([NamespaceCreated("n1", "alice")] * 2, "n1 exists already"),
        ([PROJECT, PROJECT], "p1 exists already"),
        ([FolderCreated("f1", "p1", "robotics", None, "/a", "a")] * 2, "f1 exists already"),
        ([PROJECT, created(), created("e1", 2)], "e1 exists already"),
        ([PROJECT, created(), DELETED, DELETED], "e1 is deleted"),
        ([PROJECT, created(), DELETED, revised()], "e1 is deleted"),
        ([PROJECT, created(), RESTORED], "e1 is not deleted"),
        ([PROJECT, created("e1", 0)], "ordinal 0"),
        ([PROJECT, created("e1", BLOCK + 1)], f"ordinal {BLOCK + 1}"),
    ],
)
def test_an_event_that_does_not_fit_its_document_says_why(events: list[Event], why: str) -> None:
    *before, last = events
    models = given(*before)
    with pytest.raises(PoisonRecord, match=why):
        models.when(last)


def test_an_episode_is_recorded_once() -> None:
    with pytest.raises(PoisonRecord, match="ep_1 exists already"):
        given(recorded(), recorded(), stream=ACME)


@pytest.mark.parametrize(
    ("before", "event", "stream"),
    [
        ([], NamespaceCreated("n1", "alice"), ALICE),
        ([], PROJECT, ALICE),
        ([], FolderCreated("f1", "p1", "robotics", None, "/a", "a"), ALICE),
        ([PROJECT], created(), ALICE),
        ([PROJECT, created()], revised(), ALICE),
        ([PROJECT, created()], DELETED, ALICE),
        ([PROJECT, created(), DELETED], RESTORED, ALICE),
        ([], recorded("ep_1", Entity("ent_1", "a", "b"), Entity("ent_2", "c", "d"), Entity("ent_1", "A", "b")), ACME),
    ],
)
def test_an_event_touches_what_it_says_and_old_documents_stay_as_they_were(
    before: list[Event], event: Event, stream: StreamId
) -> None:
    models = given(*before, stream=stream)
    old = {name: dict(there) for name, there in models.documents.items()}
    copies = {name: {key: repr(one) for key, one in there.items()} for name, there in old.items()}
    models.when(event, stream=stream)
    changes = {
        (name, key, key not in old[name])
        for name, there in models.documents.items()
        for key, one in there.items()
        if old[name].get(key) is not one
    }
    says = touched(models.log.events[-1])
    assert {touch[:2] for touch in says} == {change[:2] for change in changes}
    assert {touch for touch in says if touch[2]} <= changes, "what it creates was not there"
    assert {name: {key: repr(one) for key, one in there.items()} for name, there in old.items()} == copies
