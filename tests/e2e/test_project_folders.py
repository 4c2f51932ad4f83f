"""Folders of the projects API: how a path is read, which ids it has, what a segment may be."""

from http import HTTPStatus
from typing import Any

import pytest

from tests.e2e.client import Cluster, Http, Project, a_project, assert_problem, assert_project_id, body_of, event_id_of

pytest_plugins = ["tests.e2e.contract_fixtures"]

BAD_PATHS = [
    ".",
    "..",
    "/a/./b",
    "/a/../b",
    "a,b",
    "/a/,",
    " ",
    "/a/ /b",
    "/a/   ",
    "/a\x00b",
    "/a/b\n",
    "/\x7f",
    "/a/\x85",
    "/" + "x" * 256,
    "/a/" + "ü" * 256,
    "/" + "/".join(["s"] * 33),
]


async def test_a_folder_answers_with_its_last_segment(project: Project) -> None:
    answer = body_of(await project.upsert("run-042", folder="/experiments/batch-1"), HTTPStatus.CREATED)
    folder = answer["folder"]
    assert folder == {"id": answer["episode"]["folderId"], "name": "batch-1", "path": "/experiments/batch-1"}
    assert_project_id(folder["id"])


@pytest.mark.parametrize(
    "path",
    ["experiments/batch-1", "/experiments/batch-1/", "//experiments///batch-1//", "experiments//batch-1"],
)
async def test_empty_segments_are_dropped(project: Project, path: str) -> None:
    plain = body_of(await project.upsert("one", folder="/experiments/batch-1"), HTTPStatus.CREATED)["folder"]
    other = body_of(await project.upsert("two", folder=path), HTTPStatus.CREATED)["folder"]
    assert other == plain


@pytest.mark.parametrize("path", ["/", "", "//", None])
@pytest.mark.parametrize("method", ["upsert", "patch"])
async def test_the_root_is_no_folder(project: Project, path: str | None, method: str) -> None:
    created = body_of(await project.upsert("one", folder=path), HTTPStatus.CREATED)
    assert created["folder"] is None
    assert created["episode"]["folderId"] is None
    # An episode that is in a folder leaves it.
    await project.given("two", folder="/experiments")
    if method == "upsert":
        answer = body_of(await project.upsert("two", folder=path), HTTPStatus.OK)
        assert answer["folder"] is None
        assert answer["episode"]["folderId"] is None
    else:
        assert body_of(await project.patch("two", folder=path), HTTPStatus.OK)["folderId"] is None
    assert (await project.seen("two"))["folderId"] is None


async def test_a_path_keeps_its_id_for_ever(project: Project) -> None:
    folder_id = (await project.given("one", folder="/a/b"))["folderId"]
    await project.patch("one", folder=None)
    await project.delete("one")
    assert (await project.given("two", folder="/a/b"))["folderId"] == folder_id
    assert body_of(await project.patch("two", folder="a//b"), HTTPStatus.OK)["folderId"] == folder_id


async def test_another_project_has_other_folders(project: Project) -> None:
    ours = await project.given("one", folder="/a")
    theirs = await project.beside(slug="kitchen").given("one", folder="/a")
    assert ours["folderId"] != theirs["folderId"]


async def test_paths_that_differ_are_folders_that_differ(project: Project) -> None:
    paths = ["/a", "/a/b", "/b", "/a/b/a", "/b/a", "/A", "/a b", "/ab"]
    ids = [(await project.given(f"in {path}", folder=path))["folderId"] for path in paths]
    assert len(set(ids)) == len(paths)


async def test_a_folder_is_made_once_per_new_segment(project: Project) -> None:
    last = event_id_of(await project.upsert("one"))
    for name, path, made in [("two", "/a/b/c", 3), ("three", "/a/b/c", 0), ("four", "/a/b/d/e", 2), ("five", "/a", 0)]:
        response = await project.upsert(name, folder=path)
        assert event_id_of(response) == last + made + 1, path
        last = event_id_of(response)
    assert event_id_of(await project.patch("one", folder="/x/y")) == last + 3


async def test_a_patch_moves(project: Project) -> None:
    here = await project.given("one", folder="/here")
    there = await project.given("two", folder="/there")
    moved = body_of(await project.patch("one", folder="/there"), HTTPStatus.OK)
    assert moved["folderId"] == there["folderId"] != here["folderId"]
    (listed, _) = body_of(await project.list(), HTTPStatus.OK)["episodes"]
    assert listed["folderId"] == there["folderId"]


async def test_an_upsert_without_folder_stays_where_it_is(project: Project) -> None:
    folder_id = (await project.given("one", folder="/here"))["folderId"]
    assert body_of(await project.upsert("one", tags=["a"]), HTTPStatus.OK)["episode"]["folderId"] == folder_id
    assert body_of(await project.patch("one", tags=["b"]), HTTPStatus.OK)["folderId"] == folder_id


@pytest.mark.parametrize("path", BAD_PATHS, ids=ascii)
async def test_a_bad_path_is_400(project: Project, path: str) -> None:
    last = event_id_of(await project.upsert("one"))
    assert_problem(await project.upsert("one", folder=path), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.upsert("two", folder=path), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.patch("one", folder=path), HTTPStatus.BAD_REQUEST, "validation_error")
    assert event_id_of(await project.upsert("one")) == last + 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/" + "x" * 255, "x" * 255),
        ("/" + "🦾" * 255, "🦾" * 255),
        ("/" + "/".join(f"s{number}" for number in range(32)), "s31"),
        ("/" + "//".join(f"s{number}" for number in range(32)) + "/", "s31"),
        ("/two words/ around ", " around "),
        ("/Ünïcode/机器人", "机器人"),
        ("/.../.hidden/a.b", "a.b"),
        ("/$set/%2F", "%2F"),
    ],
    ids=lambda value: ascii(value)[:30],
)
async def test_a_good_path_is_taken_as_given(project: Project, path: str, name: str) -> None:
    answer = body_of(await project.upsert("one", folder=path), HTTPStatus.CREATED)
    assert answer["folder"]["name"] == name
    assert (await project.seen("one"))["folderId"] == answer["folder"]["id"]


async def test_a_path_of_32_long_segments_works(http: Http, cluster: Cluster) -> None:
    project = a_project(http, cluster)
    path = "".join(f"/{'🦾' * 253}{number:02}" for number in range(32))
    answer: dict[str, Any] = body_of(await project.upsert("one", folder=path), HTTPStatus.CREATED)
    assert answer["folder"]["path"] == path
    assert (await project.seen("one"))["folderId"] == answer["folder"]["id"]
