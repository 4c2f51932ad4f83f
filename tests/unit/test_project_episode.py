"""The rules of the projects API."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from msgspec import UNSET, Raw

from ingestor.domain.project_episode import MAX_EPISODE_BYTES
from shared.commands import Command, EpisodeFields
from shared.events import (
    EpisodeChanges,
    FolderCreated,
    FolderRef,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeRevised,
)
from shared.ids import derived_id
from tests.builders import delete, patch, restore, upsert
from tests.spec import NOON, given, happened, happened_types, note_code, outcome, refusal


def test_the_first_write_creates_namespace_project_and_episode_in_one_command() -> None:
    command = upsert("run-042", EpisodeFields(tags=("a",), metadata=Raw(b'{"n":1}')))
    judged = given().when(command)
    namespace, project, episode = (derived_id(command.command_id, index) for index in range(3))
    assert happened(judged) == [
        NamespaceCreated(namespace, "alice"),
        ProjectCreated(project, "robotics", name="robotics"),
        ProjectEpisodeCreated(
            id=episode,
            project_id=project,
            project="robotics",
            ordinal=1,
            name="run-042",
            description=None,
            tags=("a",),
            folder=None,
            write_protected=False,
            status="running",
            metadata=Raw(b'{"n":1}'),
        ),
    ]
    assert outcome(judged).created
    assert [logged.event_id for logged in judged.events] == [1, 2, 3]
    assert [logged.completes for logged in judged.events] == [None, None, "UpsertEpisode"]


def test_only_the_owner_brings_a_namespace_into_being() -> None:
    assert refusal(given().when(upsert(owner=False))) == "not_found"
    assert happened_types(given(upsert("run-1")).when(upsert("run-2", owner=False))) == ["ProjectEpisodeCreated"]


@pytest.mark.parametrize("command", [patch(), delete(), restore()])
def test_only_an_upsert_creates_a_project(command: Command) -> None:
    assert refusal(given().when(command)) == "not_found"


@pytest.mark.parametrize("build", [patch, delete, restore])
@pytest.mark.parametrize("missing", [{"project": "other"}, {"name": "other"}])
def test_what_is_not_there_is_not_found(build: Callable[..., Command], missing: dict[str, str]) -> None:
    assert refusal(given(upsert()).when(build(**missing))) == "not_found"


def test_an_upsert_of_a_known_name_changes_only_the_keys_it_carries() -> None:
    partition = given(upsert("run-1", EpisodeFields(description="old", tags=("a",), status="completed")))
    judged = partition.when(upsert("run-1", EpisodeFields(description="new")))
    [event] = happened(judged)
    assert isinstance(event, ProjectEpisodeRevised)
    assert event.changes == EpisodeChanges(description="new")
    snapshot = outcome(judged).episode
    assert (snapshot.description, snapshot.tags, snapshot.status) == ("new", ("a",), "completed")
    assert not outcome(judged).created


def test_an_explicit_null_clears() -> None:
    full = EpisodeFields(description="d", folder="/a", metadata=Raw(b"{}"))
    judged = given(upsert("run-1", full)).when(
        upsert("run-1", EpisodeFields(description=None, folder=None, metadata=Raw(b"null")))
    )
    snapshot = outcome(judged).episode
    assert (snapshot.description, snapshot.folder, bytes(snapshot.metadata)) == (None, None, b"null")


def test_a_write_that_changes_nothing_is_recorded_and_moves_updated_at() -> None:
    partition = given(upsert("run-1", EpisodeFields(description="d")))
    judged = partition.when(upsert("run-1", EpisodeFields(description="d")), at=NOON + timedelta(seconds=1))
    [event] = happened(judged)
    assert isinstance(event, ProjectEpisodeRevised)
    assert event.changes == EpisodeChanges()
    assert outcome(judged).episode.updated_at == NOON + timedelta(seconds=1)
    assert outcome(judged).episode.created_at == NOON


def test_each_new_segment_of_a_folder_is_created_once() -> None:
    partition = given(upsert("run-1", EpisodeFields(folder="/a/b")))
    judged = partition.when(upsert("run-2", EpisodeFields(folder="/a/b/c")))
    first, second = happened(judged)
    assert isinstance(first, FolderCreated)
    assert first.path == "/a/b/c"
    assert isinstance(second, ProjectEpisodeCreated)
    assert second.folder == FolderRef(first.id, "/a/b/c")
    assert second.folder.name == "c"
    again = partition.when(upsert("run-3", EpisodeFields(folder="/a/b/c")))
    assert happened_types(again) == ["ProjectEpisodeCreated"]
    assert outcome(again).episode.folder == second.folder


def test_another_project_has_other_folders() -> None:
    partition = given(upsert("run-1", EpisodeFields(folder="/a")))
    judged = partition.when(upsert("run-1", EpisodeFields(folder="/a"), project="chemistry"))
    assert happened_types(judged) == ["ProjectCreated", "FolderCreated", "ProjectEpisodeCreated"]


def test_ordinals_count_up_within_the_project() -> None:
    partition = given(upsert("run-1"), upsert("run-2"), upsert("run-1", project="chemistry"))
    [event] = happened(partition.when(upsert("run-3")))
    assert isinstance(event, ProjectEpisodeCreated)
    assert event.ordinal == 3


def test_the_request_that_protects_may_change_other_things_and_nothing_may_later() -> None:
    partition = given(upsert())
    protecting = partition.when(patch(fields=EpisodeFields(write_protected=True, status="completed")))
    assert outcome(protecting).episode.write_protected
    assert outcome(protecting).episode.status == "completed"
    for command in (upsert(), patch(fields=EpisodeFields(write_protected=False)), delete()):
        assert refusal(partition.when(command)) == "write_protected"


def test_a_deleted_name_stays_gone_until_it_is_restored() -> None:
    partition = given(upsert(), delete())
    assert refusal(partition.when(upsert())) == "gone"
    assert refusal(partition.when(patch())) == "not_found"
    assert refusal(partition.when(delete())) == "not_found"
    restored = partition.when(restore())
    assert happened_types(restored) == ["ProjectEpisodeRestored"]
    assert happened_types(partition.when(upsert())) == ["ProjectEpisodeRevised"]


def test_the_answer_to_a_deletion_says_when() -> None:
    judged = given(upsert()).when(delete(), at=NOON + timedelta(seconds=5))
    assert outcome(judged).deleted_at == NOON + timedelta(seconds=5)


def test_restoring_what_lives_records_nothing() -> None:
    partition = given(upsert("run-1", EpisodeFields(write_protected=True)))
    judged = partition.when(restore())
    assert note_code(judged) == "unchanged"
    assert not judged.events
    assert outcome(judged).episode.name == "run-1"
    assert judged.receipt.event_id == 3


def test_a_rename_frees_the_old_name_and_keeps_the_id() -> None:
    partition = given(upsert("old"))
    judged = partition.when(patch("old", new_name="new"))
    renamed = outcome(judged).episode
    assert renamed.name == "new"
    assert refusal(partition.when(patch("old"))) == "not_found"
    again = outcome(partition.when(upsert("old")))
    assert again.created
    assert again.episode.id != renamed.id


@pytest.mark.parametrize("taken", [[upsert("taken")], [upsert("taken"), delete("taken")]])
def test_a_rename_to_a_taken_name_is_a_conflict_and_nothing_else_happens(taken: list[Command]) -> None:
    partition = given(upsert("run-1"), *taken)
    fields = EpisodeFields(folder="/new", description="new")
    assert refusal(partition.when(patch("run-1", fields, new_name="taken"))) == "conflict"
    assert happened_types(partition.when(upsert("run-2", EpisodeFields(folder="/new")))) == [
        "FolderCreated",
        "ProjectEpisodeCreated",
    ]


def test_a_rename_to_its_own_name_is_no_change() -> None:
    judged = given(upsert("run-1")).when(patch("run-1", new_name="run-1"))
    [event] = happened(judged)
    assert isinstance(event, ProjectEpisodeRevised)
    assert event.changes.name is UNSET


def test_write_protection_is_said_before_the_conflict() -> None:
    partition = given(upsert("run-1", EpisodeFields(write_protected=True)), upsert("taken"))
    assert refusal(partition.when(patch("run-1", new_name="taken"))) == "write_protected"


def test_an_episode_never_outgrows_a_mongodb_document() -> None:
    half = "x" * (MAX_EPISODE_BYTES // 2 + 1)
    partition = given(upsert("run-1", EpisodeFields(description=half)))
    too_much = EpisodeFields(metadata=Raw(f'"{half}"'.encode()))
    assert refusal(partition.when(patch("run-1", too_much))) == "payload_too_large"
    many_tags = EpisodeFields(tags=("a",) * 1_000_000)
    assert refusal(partition.when(upsert("run-2", many_tags))) == "payload_too_large"


def test_time_never_runs_backwards_within_a_stream() -> None:
    partition = given(upsert())
    judged = partition.when(upsert(), at=NOON - timedelta(hours=1))
    assert judged.events[-1].at == NOON
