"""Write protection, deletion, renaming and status in the projects API."""

from http import HTTPStatus
from itertools import permutations

import pytest

from tests.e2e.client import Project, assert_problem, assert_time, body_of, event_id_of

pytest_plugins = ["tests.e2e.contract_fixtures"]

STATUSES = ["running", "completed", "failed", "archived"]


# ---- write protection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["at creation", "by upsert", "by patch"])
async def test_a_write_protected_episode_stays_as_it_is_for_ever(project: Project, how: str) -> None:
    if how == "at creation":
        await project.given("run-042", description="Final", writeProtected=True)
    else:
        await project.given("run-042")
        change = project.upsert if how == "by upsert" else project.patch
        body_of(await change("run-042", description="Final", writeProtected=True), HTTPStatus.OK)
    before = await project.seen("run-042")
    assert before["writeProtected"] is True
    assert before["description"] == "Final"

    for response in (
        await project.upsert("run-042"),
        await project.upsert("run-042", description="Other"),
        await project.upsert("run-042", writeProtected=False),
        await project.patch("run-042"),
        await project.patch("run-042", description="Other"),
        await project.patch("run-042", writeProtected=False),
        await project.patch("run-042", writeProtected=True),
        await project.patch("run-042", name="run-043"),
        await project.patch("run-042", status="archived"),
        await project.delete("run-042"),
    ):
        assert_problem(response, HTTPStatus.FORBIDDEN, "write_protected")

    assert await project.seen("run-042") == before
    assert await project.names() == ["run-042"]


async def test_the_write_that_protects_may_change_everything_else_too(project: Project) -> None:
    await project.given("run-042")
    response = await project.patch(
        "run-042", name="run-043", description="Final", tags=["a"], status="completed", folder="/b", writeProtected=True
    )
    answer = body_of(response, HTTPStatus.OK)
    assert answer["name"] == "run-043"
    assert answer["status"] == "completed"
    assert answer["writeProtected"] is True
    assert_problem(await project.patch("run-043", tags=["b"]), HTTPStatus.FORBIDDEN, "write_protected")


async def test_protection_set_to_false_does_not_protect(project: Project) -> None:
    await project.given("run-042", writeProtected=False)
    assert body_of(await project.patch("run-042", writeProtected=False), HTTPStatus.OK)["writeProtected"] is False
    body_of(await project.upsert("run-042", tags=["a"]), HTTPStatus.OK)


async def test_a_protected_episode_does_not_protect_its_neighbours(project: Project) -> None:
    await project.given("locked", writeProtected=True, folder="/a")
    await project.given("open", folder="/a")
    body_of(await project.patch("open", tags=["a"]), HTTPStatus.OK)
    body_of(await project.delete("open"), HTTPStatus.OK)


async def test_a_protected_name_cannot_be_taken_by_renaming(project: Project) -> None:
    await project.given("locked", writeProtected=True)
    await project.given("open")
    assert_problem(await project.patch("open", name="locked"), HTTPStatus.CONFLICT, "conflict")


# ---- deletion --------------------------------------------------------------------------------------------------------


async def test_a_deleted_episode_is_out_of_lists_and_totals(project: Project) -> None:
    for name in ("one", "two", "three"):
        await project.given(name)
    await project.delete("two")
    answer = body_of(await project.list(), HTTPStatus.OK)
    assert [episode["name"] for episode in answer["episodes"]] == ["one", "three"]
    assert answer["total"] == 2


async def test_a_deleted_episode_cannot_be_read_or_changed(project: Project) -> None:
    await project.given("run-042")
    await project.delete("run-042")
    assert_problem(await project.get("run-042"), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.patch("run-042", tags=["a"]), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.delete("run-042"), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_deleted_name_stays_gone(project: Project) -> None:
    await project.given("run-042")
    deleted = event_id_of(await project.delete("run-042"))
    for fields in ({}, {"description": "New"}, {"writeProtected": True}):
        assert_problem(await project.upsert("run-042", **fields), HTTPStatus.GONE, "gone")
    await project.given("run-043")
    assert_problem(await project.upsert("run-042"), HTTPStatus.GONE, "gone")
    assert event_id_of(await project.patch("run-043", tags=["a"])) == deleted + 2


async def test_a_deleted_name_is_gone_in_its_own_project_only(project: Project) -> None:
    await project.given("run-042")
    await project.delete("run-042")
    await project.beside(slug="kitchen").given("run-042")


async def test_a_restored_episode_is_as_it_was(project: Project) -> None:
    await project.given("run-042", description="Kept", tags=["a"], folder="/b", metadata={"c": 1})
    await project.patch("run-042", status="failed")
    before = await project.seen("run-042")
    await project.delete("run-042")
    restored = body_of(await project.restore("run-042"), HTTPStatus.OK)
    assert restored == {**before, "updatedAt": restored["updatedAt"]}
    assert await project.seen("run-042") == restored
    body_of(await project.upsert("run-042", tags=["d"]), HTTPStatus.OK)
    assert (await project.seen("run-042"))["tags"] == ["d"]


async def test_a_restored_episode_is_back_in_its_place(project: Project) -> None:
    for name in ("one", "two", "three"):
        await project.given(name)
    await project.delete("two")
    assert await project.names() == ["one", "three"]
    await project.restore("two")
    answer = body_of(await project.list(), HTTPStatus.OK)
    assert [episode["name"] for episode in answer["episodes"]] == ["one", "two", "three"]
    assert answer["total"] == 3


async def test_a_restore_of_a_living_episode_records_nothing(project: Project) -> None:
    last = event_id_of(await project.upsert("run-042"))
    before = await project.seen("run-042")
    assert body_of(await project.restore("run-042"), HTTPStatus.OK) == before
    assert event_id_of(await project.upsert("run-042")) == last + 1


async def test_delete_and_restore_may_be_repeated(project: Project) -> None:
    episode = await project.given("run-042")
    for _ in range(3):
        assert body_of(await project.delete("run-042"), HTTPStatus.OK)["id"] == episode["id"]
        assert_problem(await project.upsert("run-042"), HTTPStatus.GONE, "gone")
        assert body_of(await project.restore("run-042"), HTTPStatus.OK)["id"] == episode["id"]
    assert body_of(await project.list(), HTTPStatus.OK)["total"] == 1


async def test_a_delete_happens_after_the_last_write(project: Project) -> None:
    await project.given("run-042")
    updated = assert_time((await project.seen("run-042"))["updatedAt"])
    deleted = assert_time(body_of(await project.delete("run-042"), HTTPStatus.OK)["deletedAt"])
    assert deleted >= updated


# ---- renaming --------------------------------------------------------------------------------------------------------


async def test_a_rename_keeps_the_id_and_moves_the_url(project: Project) -> None:
    episode = await project.given("old", description="Kept")
    renamed = body_of(await project.patch("old", name="new"), HTTPStatus.OK)
    assert (renamed["id"], renamed["name"], renamed["description"]) == (episode["id"], "new", "Kept")
    assert_problem(await project.get("old"), HTTPStatus.NOT_FOUND, "not_found")
    assert_problem(await project.patch("old", tags=[]), HTTPStatus.NOT_FOUND, "not_found")
    assert (await project.seen("new"))["id"] == episode["id"]
    assert await project.names() == ["new"]


async def test_a_name_left_behind_is_free(project: Project) -> None:
    first = await project.given("old")
    await project.patch("old", name="new")
    second = await project.given("old")
    assert second["id"] != first["id"]
    assert await project.names() == ["new", "old"]


async def test_a_name_left_behind_can_be_taken_by_renaming(project: Project) -> None:
    first, second = await project.given("a"), await project.given("b")
    body_of(await project.patch("a", name="c"), HTTPStatus.OK)
    body_of(await project.patch("b", name="a"), HTTPStatus.OK)
    body_of(await project.patch("c", name="b"), HTTPStatus.OK)
    assert (await project.seen("a"))["id"] == second["id"]
    assert (await project.seen("b"))["id"] == first["id"]
    assert await project.names() == ["b", "a"]


@pytest.mark.parametrize("taken_by", ["a living episode", "a deleted episode"])
async def test_a_rename_to_a_taken_name_is_409_and_nothing_else_happens(project: Project, taken_by: str) -> None:
    await project.given("taken")
    await project.given("run-042", description="Before", tags=["before"])
    if taken_by == "a deleted episode":
        await project.delete("taken")
    before = await project.seen("run-042")
    last = event_id_of(await project.upsert("other"))

    response = await project.patch(
        "run-042",
        name="taken",
        description="After",
        tags=["after"],
        status="completed",
        folder="/after",
        writeProtected=True,
    )
    assert_problem(response, HTTPStatus.CONFLICT, "conflict")
    assert await project.seen("run-042") == before
    # No event_id is burnt, and the folder was not made: it takes two events now.
    assert event_id_of(await project.patch("run-042", folder="/after")) == last + 2


async def test_a_rename_to_its_own_name_is_200(project: Project) -> None:
    episode = await project.given("run-042")
    answer = body_of(await project.patch("run-042", name="run-042", tags=["a"]), HTTPStatus.OK)
    assert (answer["id"], answer["name"], answer["tags"]) == (episode["id"], "run-042", ["a"])
    assert (await project.seen("run-042"))["id"] == episode["id"]


async def test_a_rename_may_change_the_case_only(project: Project) -> None:
    episode = await project.given("run-042")
    assert body_of(await project.patch("run-042", name="RUN-042"), HTTPStatus.OK)["id"] == episode["id"]
    assert_problem(await project.get("run-042"), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_rename_keeps_the_place_in_the_list(project: Project) -> None:
    for name in ("one", "two", "three"):
        await project.given(name)
    await project.patch("one", name="zzz")
    assert await project.names() == ["zzz", "two", "three"]


async def test_a_deleted_episode_that_was_renamed_holds_its_last_name(project: Project) -> None:
    await project.given("old")
    await project.patch("old", name="new")
    await project.delete("new")
    assert_problem(await project.upsert("new"), HTTPStatus.GONE, "gone")
    await project.given("old")


# ---- status ----------------------------------------------------------------------------------------------------------


async def test_a_new_episode_is_running(project: Project) -> None:
    assert (await project.given("run-042"))["status"] == "running"


async def test_any_change_of_status_is_allowed(project: Project) -> None:
    await project.given("run-042")
    for before, after in permutations(STATUSES, 2):
        assert body_of(await project.patch("run-042", status=before), HTTPStatus.OK)["status"] == before
        assert body_of(await project.patch("run-042", status=after), HTTPStatus.OK)["status"] == after
    assert (await project.seen("run-042"))["status"] == after


@pytest.mark.parametrize("status", ["", "done", "Running", "running ", "deleted", "active"])
async def test_any_other_status_is_400(project: Project, status: str) -> None:
    await project.given("run-042")
    assert_problem(await project.patch("run-042", status=status), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.upsert("run-042", status=status), HTTPStatus.BAD_REQUEST, "validation_error")
    assert (await project.seen("run-042"))["status"] == "running"
