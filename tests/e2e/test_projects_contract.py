"""The projects API: its document's examples, tables and error rows, namespaces, projects, upserts, order of checks."""

from http import HTTPStatus
from typing import Any

import pytest

from tests.e2e.client import (
    Cluster,
    Http,
    Project,
    a_project,
    assert_problem,
    assert_project_id,
    assert_time,
    body_of,
    event_id_of,
    unique,
)

pytest_plugins = ["tests.e2e.contract_fixtures"]

UPSERTED = {
    "id",
    "name",
    "description",
    "tags",
    "projectId",
    "folderId",
    "writeProtected",
    "status",
    "metadata",
}
LISTED = {"id", "name", "description", "tags", "status", "writeProtected", "folderId", "createdAt", "updatedAt"}
PATCHED = LISTED | {"metadata"}
SINGLE = PATCHED | {"projectId"}

FULL: dict[str, Any] = {
    "description": "A walk round the block",
    "tags": ["outdoor", "batch-1"],
    "folder": "/experiments/batch-1",
    "metadata": {"robot": "r2", "speed": 1.5, "nested": {"list": [1, "two", None, True]}},
}


# ---- the examples ----------------------------------------------------------------------------------------------------


async def test_a_first_upsert_answers_201_with_the_documented_shape(project: Project) -> None:
    answer = body_of(await project.upsert("run-042"), HTTPStatus.CREATED)
    ids = {"episode": answer["episode"]["id"], "workspace": answer["workspace"]["id"]}
    namespace_id = answer["namespace"]["id"]
    assert answer == {
        "episode": {
            "id": ids["episode"],
            "name": "run-042",
            "description": None,
            "tags": [],
            "projectId": ids["workspace"],
            "folderId": None,
            "writeProtected": False,
            "status": "running",
            "metadata": None,
        },
        "workspace": {"id": ids["workspace"], "slug": "robotics"},
        "folder": None,
        "namespace": {"id": namespace_id, "slug": project.namespace},
    }
    for value in (*ids.values(), namespace_id):
        assert_project_id(value)
    assert len({*ids.values(), namespace_id}) == 3


async def test_a_second_upsert_answers_200_with_the_same_ids(project: Project) -> None:
    first = body_of(await project.upsert("run-042"), HTTPStatus.CREATED)
    second = body_of(await project.upsert("run-042"), HTTPStatus.OK)
    assert second == first


async def test_an_upsert_takes_every_field_of_the_table(project: Project) -> None:
    answer = body_of(await project.upsert("run-042", writeProtected=True, **FULL), HTTPStatus.CREATED)
    episode = answer["episode"]
    assert episode.keys() == UPSERTED
    assert answer["folder"].keys() == {"id", "name", "path"}
    assert answer["folder"] == {"id": episode["folderId"], "name": "batch-1", "path": "/experiments/batch-1"}
    assert_project_id(episode["folderId"])
    assert episode["description"] == FULL["description"]
    assert episode["tags"] == FULL["tags"]
    assert episode["metadata"] == FULL["metadata"]
    assert episode["writeProtected"] is True
    assert episode["status"] == "running"


async def test_an_update_answers_with_every_key_too(project: Project) -> None:
    await project.given("run-042")
    answer = body_of(await project.upsert("run-042", **FULL), HTTPStatus.OK)
    assert answer.keys() == {"episode", "workspace", "folder", "namespace"}
    assert answer["episode"].keys() == UPSERTED
    assert answer["folder"].keys() == {"id", "name", "path"}


async def test_a_list_has_the_documented_shape(project: Project) -> None:
    episode = await project.given("run-042")
    answer = body_of(await project.list(), HTTPStatus.OK)
    (listed,) = answer["episodes"]
    assert answer == {
        "episodes": [
            {
                "id": episode["id"],
                "name": "run-042",
                "description": None,
                "tags": [],
                "status": "running",
                "writeProtected": False,
                "folderId": None,
                "createdAt": listed["createdAt"],
                "updatedAt": listed["updatedAt"],
            }
        ],
        "page": 1,
        "pageSize": 50,
        "total": 1,
        "totalPages": 1,
    }
    assert assert_time(listed["createdAt"]) == assert_time(listed["updatedAt"])


async def test_a_list_shows_what_was_written(project: Project) -> None:
    written = await project.given("run-042", **FULL)
    (listed,) = body_of(await project.list(), HTTPStatus.OK)["episodes"]
    assert listed.keys() == LISTED
    for key in LISTED & UPSERTED:
        assert listed[key] == written[key], key


async def test_a_patch_answers_200_with_the_documented_shape(project: Project) -> None:
    created = await project.given("run-042")
    response = await project.patch(
        "run-042",
        description="Updated description",
        tags=["batch-1"],
        status="completed",
        writeProtected=True,
        folder="/experiments/batch-1",
    )
    answer = body_of(response, HTTPStatus.OK)
    assert answer == {
        "id": created["id"],
        "name": "run-042",
        "description": "Updated description",
        "tags": ["batch-1"],
        "status": "completed",
        "writeProtected": True,
        "folderId": answer["folderId"],
        "metadata": None,
        "createdAt": answer["createdAt"],
        "updatedAt": answer["updatedAt"],
    }
    assert_project_id(answer["folderId"])
    assert assert_time(answer["createdAt"]) < assert_time(answer["updatedAt"])


async def test_a_single_episode_has_the_patched_shape_and_its_project(project: Project) -> None:
    created = await project.given("run-042")
    patched = body_of(await project.patch("run-042", **FULL), HTTPStatus.OK)
    assert patched.keys() == PATCHED
    single = await project.seen("run-042")
    assert single.keys() == SINGLE
    assert single == {**patched, "projectId": created["projectId"]}


async def test_a_delete_answers_200_with_id_and_time(project: Project) -> None:
    created = await project.given("run-042")
    answer = body_of(await project.delete("run-042"), HTTPStatus.OK)
    assert answer == {"id": created["id"], "deletedAt": answer["deletedAt"]}
    assert_time(answer["deletedAt"])


async def test_a_restore_answers_200_with_the_shape_of_the_single_episode(project: Project) -> None:
    await project.given("run-042", **FULL)
    await project.delete("run-042")
    restored = body_of(await project.restore("run-042"), HTTPStatus.OK)
    assert restored.keys() == SINGLE
    assert restored == await project.seen("run-042")


# ---- the error rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{}, {"description": "no name"}, {"name": None}, {"name": ""}, {"name": " "}, {"name": "   "}]
)
async def test_an_upsert_without_a_name_is_400(project: Project, body: dict[str, Any]) -> None:
    assert_problem(await project.post(body), HTTPStatus.BAD_REQUEST, "validation_error")


async def test_an_upsert_of_a_write_protected_episode_is_403(project: Project) -> None:
    await project.given("run-042", writeProtected=True)
    assert_problem(await project.upsert("run-042"), HTTPStatus.FORBIDDEN, "write_protected")


async def test_an_upsert_in_an_unknown_namespace_is_404(project: Project, cluster: Cluster) -> None:
    ghost = unique("ghost")
    granted = project.beside(namespace=ghost, token=cluster.token(unique("carol"), namespaces=[ghost]))
    assert_problem(await granted.upsert("run-042"), HTTPStatus.NOT_FOUND, "not_found")


async def test_an_upsert_of_a_deleted_episode_is_410(project: Project) -> None:
    await project.given("run-042")
    await project.delete("run-042")
    assert_problem(await project.upsert("run-042"), HTTPStatus.GONE, "gone")


async def test_a_list_in_an_unknown_namespace_is_404(project: Project, cluster: Cluster) -> None:
    ghost = unique("ghost")
    granted = project.beside(namespace=ghost, token=cluster.token(unique("carol"), namespaces=[ghost]))
    assert_problem(await granted.list(), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_list_of_an_unknown_project_is_404(project: Project) -> None:
    await project.given("run-042")
    assert_problem(await project.beside(slug="other").list(), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_patch_of_a_write_protected_episode_is_403(project: Project) -> None:
    await project.given("run-042", writeProtected=True)
    response = await project.patch("run-042", description="Updated description")
    assert_problem(response, HTTPStatus.FORBIDDEN, "write_protected")


@pytest.mark.parametrize("missing", ["namespace", "project", "episode"])
@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "RESTORE"])
async def test_an_episode_that_is_not_there_is_404(
    project: Project, cluster: Cluster, missing: str, method: str
) -> None:
    await project.given("run-042")
    place, name = project, "run-042"
    if missing == "namespace":
        ghost = unique("ghost")
        place = project.beside(namespace=ghost, token=cluster.token(project.namespace, namespaces=[ghost]))
    elif missing == "project":
        place = project.beside(slug="other")
    else:
        name = "run-043"
    match method:
        case "GET":
            response = await place.get(name)
        case "PATCH":
            response = await place.patch(name, description="Updated description")
        case "DELETE":
            response = await place.delete(name)
        case _:
            response = await place.restore(name)
    assert_problem(response, HTTPStatus.NOT_FOUND, "not_found")


# ---- types of the body -----------------------------------------------------------------------------------------------

WRONG_TYPES = [
    {"name": 42},
    {"name": ["run-042"]},
    {"description": 42},
    {"description": ["a"]},
    {"tags": "batch-1"},
    {"tags": [1]},
    {"tags": [None]},
    {"tags": {"a": "b"}},
    {"folder": 42},
    {"folder": ["a", "b"]},
    {"writeProtected": "true"},
    {"writeProtected": 1},
    {"metadata": "text"},
    {"metadata": ["list"]},
    {"metadata": 42},
    {"status": "finished"},
    {"status": "RUNNING"},
    {"status": 1},
]


@pytest.mark.parametrize("fields", WRONG_TYPES, ids=str)
async def test_an_upsert_with_a_field_of_a_wrong_type_is_400(project: Project, fields: dict[str, Any]) -> None:
    assert_problem(await project.post({"name": "run-042", **fields}), HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("fields", WRONG_TYPES, ids=str)
async def test_a_patch_with_a_field_of_a_wrong_type_is_400(project: Project, fields: dict[str, Any]) -> None:
    await project.given("run-042")
    before = await project.seen("run-042")
    response = await project.http.write(
        project.stream,
        "PATCH",
        project.episode_target("run-042"),
        authorization=project.authorization,
        body={"description": "Updated description", **fields},
    )
    assert_problem(response, HTTPStatus.BAD_REQUEST, "validation_error")
    assert await project.seen("run-042") == before


async def test_unknown_keys_are_ignored(project: Project) -> None:
    body_of(await project.upsert("run-042", colour="red", id="mine"), HTTPStatus.CREATED)
    body_of(await project.patch("run-042", colour="blue", createdAt="2020-01-01T00:00:00Z"), HTTPStatus.OK)
    assert (await project.seen("run-042")).keys() == SINGLE


# ---- namespaces and projects -----------------------------------------------------------------------------------------


async def test_the_first_write_makes_namespace_project_and_episode_in_one_command(project: Project) -> None:
    response = await project.upsert("run-042")
    assert event_id_of(response) == 3


async def test_the_first_write_to_another_project_makes_it_in_the_same_command(project: Project) -> None:
    first = await project.upsert("run-042")
    other = await project.beside(slug="kitchen").upsert("run-042")
    assert event_id_of(other) == event_id_of(first) + 2
    ours, theirs = (body_of(response, HTTPStatus.CREATED) for response in (first, other))
    assert theirs["workspace"]["slug"] == "kitchen"
    assert theirs["workspace"]["id"] != ours["workspace"]["id"]
    assert theirs["namespace"] == ours["namespace"]
    assert theirs["episode"]["id"] != ours["episode"]["id"]


async def test_a_name_is_unique_within_its_project_only(project: Project) -> None:
    kitchen = project.beside(slug="kitchen")
    await project.given("run-042", description="robotics")
    await kitchen.given("run-042", description="kitchen")
    assert (await project.seen("run-042"))["description"] == "robotics"
    assert (await kitchen.seen("run-042"))["description"] == "kitchen"


async def test_own_namespaces_have_projects_only_by_writing(project: Project) -> None:
    assert_problem(await project.list(), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.get("run-042"), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.patch("run-042", tags=[]), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.list(), HTTPStatus.NOT_FOUND, "not_found")
    # Had one of them made anything, the first write would not be events 1, 2 and 3.
    assert event_id_of(await project.upsert("run-042")) == 3


async def test_a_namespace_is_made_by_its_owner_only(project: Project, cluster: Cluster) -> None:
    guest = project.beside(token=cluster.token(unique("guest"), namespaces=[project.namespace]))
    for _ in range(2):
        assert_problem(await guest.upsert("run-042"), HTTPStatus.NOT_FOUND, "not_found")
    await project.given("run-041")
    body_of(await guest.upsert("run-042"), HTTPStatus.CREATED)
    body_of(await guest.beside(slug="by-the-guest").upsert("run-042"), HTTPStatus.CREATED)
    assert await project.names() == ["run-041", "run-042"]


async def test_somebody_elses_namespace_is_403_whether_it_exists_or_not(project: Project, cluster: Cluster) -> None:
    await project.given("run-042")
    stranger = cluster.token(unique("stranger"))
    for place in (project.beside(token=stranger), project.beside(namespace=unique("ghost"), token=stranger)):
        assert_problem(await place.upsert("run-042"), HTTPStatus.FORBIDDEN, "forbidden")
        assert_problem(await place.list(), HTTPStatus.FORBIDDEN, "forbidden")
        assert_problem(await place.get("run-042"), HTTPStatus.FORBIDDEN, "forbidden")
        assert_problem(await place.patch("run-042", tags=["mine"]), HTTPStatus.FORBIDDEN, "forbidden")
        assert_problem(await place.delete("run-042"), HTTPStatus.FORBIDDEN, "forbidden")
        assert_problem(await place.restore("run-042"), HTTPStatus.FORBIDDEN, "forbidden")
    assert (await project.seen("run-042"))["tags"] == []


# ---- upsert semantics ------------------------------------------------------------------------------------------------


async def test_an_upsert_keeps_what_it_does_not_name(project: Project) -> None:
    first = await project.given("run-042", **FULL)
    again = body_of(await project.upsert("run-042"), HTTPStatus.OK)["episode"]
    assert again == first
    changed = body_of(await project.upsert("run-042", description="Other"), HTTPStatus.OK)["episode"]
    assert changed == {**first, "description": "Other"}


async def test_a_patch_keeps_what_it_does_not_name(project: Project) -> None:
    await project.given("run-042", **FULL)
    before = await project.seen("run-042")
    after = body_of(await project.patch("run-042", tags=["other"]), HTTPStatus.OK)
    assert {**after, "projectId": before["projectId"]} == {
        **before,
        "tags": ["other"],
        "updatedAt": after["updatedAt"],
    }


@pytest.mark.parametrize("method", ["upsert", "patch"])
@pytest.mark.parametrize(
    ("key", "shown", "empty"),
    [
        ("description", "description", None),
        ("metadata", "metadata", None),
        ("folder", "folderId", None),
        ("tags", "tags", []),
    ],
)
async def test_an_explicit_null_clears(project: Project, method: str, key: str, shown: str, empty: object) -> None:
    await project.given("run-042", **FULL)
    before = await project.seen("run-042")
    change = project.upsert if method == "upsert" else project.patch
    fields: dict[str, Any] = {key: None}
    body_of(await change("run-042", **fields), HTTPStatus.OK)
    after = await project.seen("run-042")
    assert after == {**before, shown: empty, "updatedAt": after["updatedAt"]}


async def test_nulls_at_creation_are_the_defaults(project: Project) -> None:
    episode = await project.given("run-042", description=None, tags=None, metadata=None, folder=None)
    assert episode["description"] is None
    assert episode["tags"] == []
    assert episode["metadata"] is None
    assert episode["folderId"] is None


@pytest.mark.parametrize("method", ["upsert", "patch"])
async def test_metadata_is_replaced_not_merged(project: Project, method: str) -> None:
    await project.given("run-042", metadata={"a": 1, "deep": {"b": 2, "c": 3}})
    change = project.upsert if method == "upsert" else project.patch
    body_of(await change("run-042", metadata={"deep": {"d": 4}}), HTTPStatus.OK)
    assert (await project.seen("run-042"))["metadata"] == {"deep": {"d": 4}}


@pytest.mark.parametrize("method", ["upsert", "patch"])
async def test_empty_metadata_is_an_empty_object(project: Project, method: str) -> None:
    await project.given("run-042", metadata={"a": 1})
    change = project.upsert if method == "upsert" else project.patch
    body_of(await change("run-042", metadata={}), HTTPStatus.OK)
    assert (await project.seen("run-042"))["metadata"] == {}


async def test_an_upsert_leaves_the_status_unless_it_names_one(project: Project) -> None:
    await project.given("run-042")
    await project.patch("run-042", status="completed")
    assert body_of(await project.upsert("run-042"), HTTPStatus.OK)["episode"]["status"] == "completed"
    response = await project.upsert("run-042", status="failed")
    assert body_of(response, HTTPStatus.OK)["episode"]["status"] == "failed"
    assert (await project.seen("run-042"))["status"] == "failed"


@pytest.mark.parametrize("method", ["upsert", "patch"])
async def test_a_write_that_changes_nothing_moves_updated_at_and_nothing_else(project: Project, method: str) -> None:
    await project.given("run-042", **FULL)
    before = await project.seen("run-042")
    change = project.upsert if method == "upsert" else project.patch
    body_of(await change("run-042", **FULL), HTTPStatus.OK)
    after = await project.seen("run-042")
    assert after == {**before, "updatedAt": after["updatedAt"]}
    assert assert_time(after["updatedAt"]) > assert_time(before["updatedAt"])
    body_of(await (project.upsert if method == "upsert" else project.patch)("run-042"), HTTPStatus.OK)
    last = await project.seen("run-042")
    assert assert_time(last["updatedAt"]) > assert_time(after["updatedAt"])


async def test_tags_are_kept_as_given(project: Project) -> None:
    tags = ["zebra", "alpha", "Ünïcode 🦓", "two words", "a/b"]
    await project.given("run-042", tags=tags)
    assert (await project.seen("run-042"))["tags"] == tags


async def test_a_reader_sees_what_the_writer_was_told(project: Project) -> None:
    told = await project.given("run-042", **FULL)
    seen = await project.seen("run-042")
    assert {key: seen[key] for key in UPSERTED} == told


# ---- the order of checks ---------------------------------------------------------------------------------------------


async def test_401_comes_before_400(http: Http, project: Project) -> None:
    bad = project.beside(token="not-a-token")
    assert_problem(await bad.post({}), HTTPStatus.UNAUTHORIZED)
    assert_problem(await bad.list(page=0), HTTPStatus.UNAUTHORIZED)


async def test_400_comes_before_403(project: Project, cluster: Cluster) -> None:
    await project.given("run-042")
    stranger = project.beside(token=cluster.token(unique("stranger")))
    assert_problem(await stranger.post({}), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await stranger.patch("run-042", status="finished"), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await stranger.list(page=0), HTTPStatus.BAD_REQUEST, "validation_error")


async def test_400_comes_before_404(project: Project, cluster: Cluster) -> None:
    ghost = unique("ghost")
    granted = project.beside(namespace=ghost, token=cluster.token(project.namespace, namespaces=[ghost]))
    for place in (project, granted):
        assert_problem(await place.patch("ghost", status="finished"), HTTPStatus.BAD_REQUEST, "validation_error")
        assert_problem(await place.list(page=0), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await granted.post({}), HTTPStatus.BAD_REQUEST, "validation_error")


async def test_400_comes_before_410_and_write_protected(project: Project) -> None:
    await project.given("gone")
    await project.delete("gone")
    await project.given("locked", writeProtected=True)
    for name in ("gone", "locked"):
        assert_problem(await project.upsert(name, tags=1), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.patch("locked", tags=1), HTTPStatus.BAD_REQUEST, "validation_error")


async def test_404_comes_before_409(project: Project) -> None:
    await project.given("taken")
    assert_problem(await project.patch("ghost", name="taken"), HTTPStatus.NOT_FOUND, "not_found")


async def test_write_protected_comes_before_409(project: Project) -> None:
    await project.given("taken")
    await project.given("locked", writeProtected=True)
    assert_problem(await project.patch("locked", name="taken"), HTTPStatus.FORBIDDEN, "write_protected")


async def test_a_refused_request_burns_no_event_id_and_makes_nothing(http: Http, cluster: Cluster) -> None:
    project = a_project(http, cluster)
    await project.given("gone")
    await project.given("locked", writeProtected=True)
    before = event_id_of(await project.delete("gone"))
    assert_problem(await project.upsert("gone", folder="/new"), HTTPStatus.GONE, "gone")
    assert_problem(await project.upsert("locked", folder="/new"), HTTPStatus.FORBIDDEN, "write_protected")
    assert_problem(await project.patch("locked", folder="/new"), HTTPStatus.FORBIDDEN, "write_protected")
    assert_problem(await project.patch("ghost", folder="/new"), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.upsert("new", folder="/new", status="finished"), HTTPStatus.BAD_REQUEST)
    # The folder is still to be made: two events, not one.
    assert event_id_of(await project.upsert("new", folder="/new")) == before + 2
