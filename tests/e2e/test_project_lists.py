"""Lists of the projects API: order, pages, totals."""

import asyncio
from http import HTTPStatus
from typing import Any

import pytest

from tests.e2e.client import Project, assert_problem, body_of

pytest_plugins = ["tests.e2e.contract_fixtures"]

# Neither the order of the alphabet nor its reverse.
NAMES = ["mike", "alpha", "zulu", "bravo", "yankee"]


async def given_episodes(project: Project, names: list[str]) -> None:
    for name in names:
        await project.given(name)


async def page(project: Project, **query: Any) -> dict[str, Any]:
    return body_of(await project.list(**query), HTTPStatus.OK)


async def walked(project: Project, page_size: int) -> list[str]:
    """Return the names on all pages, one after the other."""
    names: list[str] = []
    number, total_pages = 0, 1
    while number < total_pages:
        number += 1
        answer = await page(project, page=number, pageSize=page_size)
        total_pages = answer["totalPages"]
        names += [episode["name"] for episode in answer["episodes"]]
    return names


async def test_a_list_is_in_order_of_creation(project: Project) -> None:
    await given_episodes(project, NAMES)
    assert await project.names() == NAMES


async def test_writes_do_not_move_what_is_listed(project: Project) -> None:
    await given_episodes(project, NAMES)
    await project.upsert("mike", description="Touched")
    await project.patch("zulu", name="aaa", folder="/b", status="archived")
    await project.given("new")
    assert await project.names() == ["mike", "alpha", "aaa", "bravo", "yankee", "new"]


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 6, 200])
async def test_pages_put_together_are_the_list(project: Project, page_size: int) -> None:
    await given_episodes(project, NAMES)
    assert await walked(project, page_size) == NAMES


async def test_pages_have_the_size_asked_for(project: Project) -> None:
    await given_episodes(project, NAMES)
    for number, names in enumerate([NAMES[:2], NAMES[2:4], NAMES[4:]], start=1):
        answer = await page(project, page=number, pageSize=2)
        assert [episode["name"] for episode in answer["episodes"]] == names
        counts = {key: answer[key] for key in ("page", "pageSize", "total", "totalPages")}
        assert counts == {"page": number, "pageSize": 2, "total": 5, "totalPages": 3}


async def test_past_the_end_is_an_empty_page(project: Project) -> None:
    await given_episodes(project, NAMES)
    for number in (4, 5, 1_000_000):
        answer = await page(project, page=number, pageSize=2)
        assert answer == {"episodes": [], "page": number, "pageSize": 2, "total": 5, "totalPages": 3}


@pytest.mark.parametrize("number", ["9223372036854775807", "1" + "0" * 30])
async def test_a_page_beyond_all_numbers_breaks_nothing(project: Project, number: str) -> None:
    await project.given("run-042")
    response = await project.list(page=number)
    assert response.status_code in {HTTPStatus.OK, HTTPStatus.BAD_REQUEST}


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "", " ", "1e3", "NaN"])
async def test_a_page_that_is_no_page_is_400(project: Project, value: str) -> None:
    await project.given("run-042")
    assert_problem(await project.list(page=value), HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
async def test_a_page_size_that_is_no_size_is_400(project: Project, value: str) -> None:
    await project.given("run-042")
    assert_problem(await project.list(pageSize=value), HTTPStatus.BAD_REQUEST, "validation_error")


async def test_unknown_query_parameters_are_ignored(project: Project) -> None:
    await project.given("run-042")
    assert (await page(project, sort="name", limit="1"))["total"] == 1


async def test_a_page_holds_50_unless_asked_and_200_at_most(project: Project) -> None:
    names = [f"run-{number:03}" for number in range(205)]
    await project.given(names[0])
    for start in range(1, len(names), 34):
        await asyncio.gather(*(project.given(name) for name in names[start : start + 34]))

    answer = await page(project)
    assert len(answer["episodes"]) == answer["pageSize"] == 50
    assert (answer["total"], answer["totalPages"]) == (205, 5)

    answer = await page(project, pageSize=200)
    assert len(answer["episodes"]) == answer["pageSize"] == 200
    assert answer["totalPages"] == 2

    for above in (201, 1_000, 10_000_000):
        assert await page(project, pageSize=above) == answer

    rest = await page(project, page=2, pageSize=201)
    assert len(rest["episodes"]) == 5
    listed = [episode["name"] for episode in answer["episodes"] + rest["episodes"]]
    assert listed[0] == names[0]
    assert sorted(listed) == names
    assert await walked(project, 7) == listed


async def test_a_project_without_living_episodes_is_an_empty_list(project: Project) -> None:
    await project.given("run-042")
    await project.delete("run-042")
    assert await page(project) == {"episodes": [], "page": 1, "pageSize": 50, "total": 0, "totalPages": 0}


async def test_pages_have_no_holes_where_episodes_were_deleted(project: Project) -> None:
    names = [f"run-{number:02}" for number in range(20)]
    await given_episodes(project, names)
    for name in names[1:12:2]:
        await project.delete(name)
    living = [name for name in names if name not in names[1:12:2]]
    for page_size in (1, 3, 5, 14, 50):
        assert await walked(project, page_size) == living
    await project.restore(names[5])
    living = sorted([*living, names[5]])
    for page_size in (1, 4, 5):
        assert await walked(project, page_size) == living
    assert (await page(project, pageSize=4))["total"] == 15


async def test_pages_are_stable_while_writes_go_on(project: Project) -> None:
    names = [f"run-{number:02}" for number in range(30)]
    await given_episodes(project, names)
    walking = True

    async def keep_writing() -> int:
        written = 0
        while walking:
            await project.upsert(f"more-{written}")
            await project.patch(names[written % 30], description=str(written))
            written += 1
        return written

    async def walk() -> list[list[str]]:
        nonlocal walking
        try:
            return [await walked(project, page_size) for page_size in (5, 7, 10)]
        finally:
            walking = False

    written, walks = await asyncio.gather(keep_writing(), walk())
    assert written > 0
    for walked_names in walks:
        assert walked_names[:30] == names
        assert walked_names[30:] == [f"more-{number}" for number in range(len(walked_names) - 30)]


async def test_a_list_belongs_to_one_project(project: Project) -> None:
    await project.given("one")
    await project.beside(slug="kitchen").given("two")
    assert await project.names() == ["one"]
    assert await project.beside(slug="kitchen").names() == ["two"]
