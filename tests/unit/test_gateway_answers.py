"""Receipts and documents → bodies."""

import json
from datetime import UTC, datetime, timedelta, timezone

from msgspec import Raw

from gateway import answers
from gateway.paging import Page
from shared.commands import ItemError
from shared.events import FolderRef
from shared.ids import EventId
from shared.receipts import EpisodeDeleted, EpisodePatched, EpisodeRestored, EpisodesRecorded
from tests.unit.gateway_fakes import AT, ID, project_episode_document, snapshot, tenant_episode_document, upserted

PATCHED = {
    "id": ID,
    "name": "run-042",
    "description": "Updated description",
    "tags": ["batch-1"],
    "status": "completed",
    "writeProtected": True,
    "folderId": "f",
    "metadata": {"a": 1},
    "createdAt": "2026-04-14T10:00:00.123Z",
    "updatedAt": "2026-04-14T10:00:00.123Z",
}
CHANGED = snapshot(
    description="Updated description",
    tags=("batch-1",),
    status="completed",
    write_protected=True,
    folder=FolderRef("f", "/experiments/batch-1"),
    metadata=Raw(b'{"a":1}'),
)


def test_times_are_in_utc_with_milliseconds() -> None:
    assert answers.instant(datetime(2026, 4, 14, 10, tzinfo=UTC)) == "2026-04-14T10:00:00.000Z"
    assert answers.instant(datetime(2026, 4, 14, 10, 0, 0, 999_999, tzinfo=UTC)) == "2026-04-14T10:00:00.999Z"
    east = timezone(timedelta(hours=2))
    assert answers.instant(datetime(2026, 4, 14, 12, tzinfo=east)) == "2026-04-14T10:00:00.000Z"
    assert answers.instant(datetime(1, 1, 1, tzinfo=UTC)) == "0001-01-01T00:00:00.000Z"


def test_a_folder_is_shown_by_its_last_segment() -> None:
    status, body = answers.outcome(upserted(folder=FolderRef("f", "/experiments/batch-1")))
    assert status == 201
    answer = json.loads(body)
    assert answer["folder"] == {"id": "f", "name": "batch-1", "path": "/experiments/batch-1"}
    assert answer["episode"]["folderId"] == "f"


def test_a_patched_episode() -> None:
    status, body = answers.outcome(EpisodePatched(CHANGED))
    assert (status, json.loads(body)) == (200, PATCHED)
    assert list(json.loads(body)) == list(PATCHED)


def test_a_restored_episode_has_the_shape_of_get() -> None:
    status, body = answers.outcome(EpisodeRestored(CHANGED))
    assert (status, json.loads(body)) == (200, PATCHED | {"projectId": ID})


def test_a_deleted_episode() -> None:
    status, body = answers.outcome(EpisodeDeleted(ID, AT))
    assert (status, json.loads(body)) == (200, {"id": ID, "deletedAt": "2026-04-14T10:00:00.123Z"})


def test_recorded_episodes() -> None:
    errors = (ItemError(1, "validation_error", "Field 'content' is required"),)
    status, body = answers.outcome(EpisodesRecorded((EventId(44), EventId(7)), ("ep_a", "ep_b"), errors))
    assert (status, json.loads(body)) == (
        201,
        {
            "count": 2,
            "event_ids": [44, 7],
            "errors": [{"index": 1, "code": "validation_error", "message": "Field 'content' is required"}],
            "episode_ids": ["ep_a", "ep_b"],
        },
    )


def test_metadata_is_spliced_in_as_it_stands() -> None:
    text = '{"n":123456789012345678901234567890,"a\\u0000":[]}'
    assert text.encode() in answers.outcome(upserted(metadata=Raw(text.encode())))[1]
    assert text.encode() in answers.project_episode(project_episode_document(metadata=text))
    assert text.encode() in answers.tenant_episode(tenant_episode_document(metadata=text))


def test_a_read_episode_has_the_shape_of_patch_and_its_project() -> None:
    document = project_episode_document(
        description="Updated description",
        tags=["batch-1"],
        status="completed",
        write_protected=True,
        folder={"id": "f", "path": "/experiments/batch-1"},
        metadata='{"a":1}',
    )
    assert json.loads(answers.project_episode(document)) == PATCHED | {"projectId": ID}


def test_an_empty_list() -> None:
    assert json.loads(answers.project_episodes([], Page(3, 10), 0)) == {
        "episodes": [],
        "page": 3,
        "pageSize": 10,
        "total": 0,
        "totalPages": 0,
    }
