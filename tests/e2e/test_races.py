"""Many callers at once: one name, one folder, one number each."""

import asyncio
from collections import Counter
from http import HTTPStatus

from tests.e2e.client import Project, Tenant, assert_problem, body_of, event_id_of

pytest_plugins = ["tests.e2e.contract_fixtures"]


async def test_100_upserts_of_one_name_make_one_episode(project: Project) -> None:
    responses = await asyncio.gather(*(project.upsert("run-042", description=str(number)) for number in range(100)))
    assert Counter(response.status_code for response in responses) == {201: 1, 200: 99}
    answers = [response.json() for response in responses]
    assert len({answer["episode"]["id"] for answer in answers}) == 1
    assert len({answer["workspace"]["id"] for answer in answers}) == 1
    assert len({answer["namespace"]["id"] for answer in answers}) == 1
    # The namespace, the project, and one event for each upsert.
    assert sorted(event_id_of(response) for response in responses) == list(range(3, 103))
    assert body_of(await project.list(), HTTPStatus.OK)["total"] == 1
    (last,) = [response for response in responses if event_id_of(response) == 102]
    assert (await project.seen("run-042"))["description"] == last.json()["episode"]["description"]


async def test_upserts_in_many_new_projects_make_one_namespace(project: Project) -> None:
    places = [project.beside(slug=f"project-{number % 10}") for number in range(50)]
    responses = await asyncio.gather(*(place.upsert("run-042") for place in places))
    assert Counter(response.status_code for response in responses) == {201: 10, 200: 40}
    assert len({response.json()["namespace"]["id"] for response in responses}) == 1
    assert len({response.json()["workspace"]["id"] for response in responses}) == 10
    assert max(event_id_of(response) for response in responses) == 1 + 10 + 50


async def test_of_two_renames_to_one_name_one_happens(project: Project) -> None:
    for number in range(10):
        ids = {name: (await project.given(f"{name}-{number}"))["id"] for name in ("one", "other")}
        target = f"target-{number}"
        first, second = await asyncio.gather(
            project.patch(f"one-{number}", name=target), project.patch(f"other-{number}", name=target)
        )
        assert sorted([first.status_code, second.status_code]) == [HTTPStatus.OK, HTTPStatus.CONFLICT]
        winner, loser = ("one", "other") if first.is_success else ("other", "one")
        assert_problem(second if first.is_success else first, HTTPStatus.CONFLICT, "conflict")
        assert (await project.seen(target))["id"] == ids[winner]
        assert (await project.seen(f"{loser}-{number}"))["id"] == ids[loser]
        assert_problem(await project.get(f"{winner}-{number}"), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_rename_and_an_upsert_to_one_name_agree(project: Project) -> None:
    for number in range(10):
        await project.given(f"run-{number}")
        target = f"target-{number}"
        renamed, upserted = await asyncio.gather(
            project.patch(f"run-{number}", name=target), project.upsert(target, tags=["upserted"])
        )
        outcome = (renamed.status_code, upserted.status_code)
        assert outcome in {(HTTPStatus.OK, HTTPStatus.OK), (HTTPStatus.CONFLICT, HTTPStatus.CREATED)}
        assert (await project.seen(target))["tags"] == ["upserted"]
    names = await project.names()
    assert len(names) == len(set(names))


async def test_of_many_deletions_one_happens(project: Project) -> None:
    await project.given("run-042")
    responses = await asyncio.gather(*(project.delete("run-042") for _ in range(10)))
    assert Counter(response.status_code for response in responses) == {200: 1, 404: 9}
    assert_problem(await project.upsert("run-042"), HTTPStatus.GONE, "gone")


async def test_after_the_protection_nothing_happens(project: Project) -> None:
    before = event_id_of(await project.upsert("run-042"))
    responses = await asyncio.gather(
        *(
            project.patch("run-042", writeProtected=True)
            if number == 10
            else project.patch("run-042", tags=[str(number)])
            for number in range(20)
        )
    )
    protection = responses[10]
    body_of(protection, HTTPStatus.OK)
    for response in responses:
        if response.is_success:
            assert event_id_of(response) <= event_id_of(protection)
        else:
            assert_problem(response, HTTPStatus.FORBIDDEN, "write_protected")
    done = sum(response.is_success for response in responses)
    assert event_id_of(protection) == before + done
    assert event_id_of(await project.upsert("run-043")) == before + done + 1


async def test_batches_to_one_tenant_have_ranges_of_their_own(tenant: Tenant) -> None:
    sizes = [1 + number * 7 % 50 for number in range(40)]
    responses = await asyncio.gather(
        *(
            tenant.record(*({"content": f"Batch {batch}, item {item}."} for item in range(size)))
            for batch, size in enumerate(sizes)
        )
    )
    answers = [body_of(response, HTTPStatus.CREATED) for response in responses]
    for answer, size in zip(answers, sizes, strict=True):
        first = answer["event_ids"][0]
        assert answer["event_ids"] == list(range(first, first + size))
    every = sorted(event_id for answer in answers for event_id in answer["event_ids"])
    assert every == list(range(1, sum(sizes) + 1))
    for batch, answer in enumerate(answers):
        episode = await tenant.seen(answer["episode_ids"][-1])
        assert episode["content"] == f"Batch {batch}, item {sizes[batch] - 1}."
        assert episode["event_id"] == answer["event_ids"][-1]


async def test_one_item_key_in_many_batches_is_recorded_once(tenant: Tenant) -> None:
    responses = await asyncio.gather(
        *(
            tenant.record({"content": f"Of batch {batch}."}, {"content": "The same.", "idempotency_key": "k"})
            for batch in range(20)
        )
    )
    answers = [body_of(response, HTTPStatus.CREATED) for response in responses]
    assert len({answer["event_ids"][1] for answer in answers}) == 1
    assert len({answer["episode_ids"][1] for answer in answers}) == 1
    assert len({answer["event_ids"][0] for answer in answers}) == 20
    assert (await tenant.given({"content": "The next."}))["event_ids"] == [22]


async def test_upserts_in_one_new_folder_make_one_folder(project: Project) -> None:
    responses = await asyncio.gather(*(project.upsert(f"run-{number}", folder="/a/new/folder") for number in range(50)))
    answers = [body_of(response, HTTPStatus.CREATED) for response in responses]
    assert len({answer["folder"]["id"] for answer in answers}) == 1
    assert len({answer["episode"]["folderId"] for answer in answers}) == 1
    assert len({answer["episode"]["id"] for answer in answers}) == 50
    # The namespace, the project, three folders, fifty episodes.
    assert max(event_id_of(response) for response in responses) == 1 + 1 + 3 + 50


async def test_writers_in_many_streams_do_not_mix(project: Project, tenant: Tenant) -> None:
    async def of_the_project(number: int) -> int:
        return event_id_of(await project.upsert(f"run-{number}"))

    async def of_the_tenant(number: int) -> int:
        return event_id_of(await tenant.record({"content": f"Word {number}."}))

    projects, tenants = await asyncio.gather(
        asyncio.gather(*(of_the_project(number) for number in range(30))),
        asyncio.gather(*(of_the_tenant(number) for number in range(30))),
    )
    assert sorted(projects) == list(range(3, 33))
    assert sorted(tenants) == list(range(1, 31))
    assert body_of(await project.list(), HTTPStatus.OK)["total"] == 30
