"""Names and slugs of the projects API: what is legal, how it travels in a URL, that it is stored as given."""

from http import HTTPStatus

import pytest

from tests.e2e.client import (
    Cluster,
    Http,
    Project,
    a_project,
    assert_problem,
    assert_project_id,
    body_of,
    unique,
)

pytest_plugins = ["tests.e2e.contract_fixtures"]

LEGAL = [
    "a/b",
    "/",
    "//",
    "a/",
    "/a",
    "two words",
    " spaces around ",
    "Ünïcode",
    "机器人 🦾",
    "مرحبا",
    "100%",
    "a%2Fb",
    "%",
    "a+b",
    "a?b=c&d",
    "a#b",
    "a;b,c:d@e",
    "a\\b",
    '"quoted"',
    "{curly}",
    "$where",
    "a.b",
    "...",
    ".hidden",
    "..a",
    "../../etc",
    "restore",
    "run/restore",
    "null",
    "0",
    "a\u2028b",
    "a\u200bb",
    "x" * 255,
    "ü" * 255,
    "🦾" * 255,
    "/" * 255,
]
CONTROL = ["\x00", "\x01", "\t", "\n", "\r", "\x1b", "\x1f", "\x7f", "\x80", "\x85", "\x9f"]
ILLEGAL = [*(f"a{character}b" for character in CONTROL), ".", "..", "x" * 256, "🦾" * 256]


@pytest.mark.parametrize("name", LEGAL, ids=ascii)
async def test_a_legal_name_works_everywhere(project: Project, name: str) -> None:
    created = await project.given(name)
    assert created["name"] == name
    assert body_of(await project.upsert(name, tags=["a"]), HTTPStatus.OK)["episode"]["id"] == created["id"]
    assert body_of(await project.patch(name, description="b"), HTTPStatus.OK)["name"] == name
    seen = await project.seen(name)
    assert (seen["id"], seen["name"], seen["tags"], seen["description"]) == (created["id"], name, ["a"], "b")
    assert await project.names() == [name]
    body_of(await project.delete(name), HTTPStatus.OK)
    assert body_of(await project.restore(name), HTTPStatus.OK)["name"] == name


@pytest.mark.parametrize("slug", LEGAL, ids=ascii)
async def test_a_legal_project_slug_works_everywhere(project: Project, slug: str) -> None:
    place = project.beside(slug=slug)
    answer = body_of(await place.upsert("run-042"), HTTPStatus.CREATED)
    assert answer["workspace"]["slug"] == slug
    assert_project_id(answer["workspace"]["id"])
    assert (await place.seen("run-042"))["projectId"] == answer["workspace"]["id"]
    assert await place.names() == ["run-042"]
    assert_problem(await project.list(), HTTPStatus.NOT_FOUND, "not_found")


@pytest.mark.parametrize(
    "slug", ["a/b", "/", "two words", "Ünïcode", "机器人 🦾", "a%2Fb", "a+b", "a?b#c", "..."], ids=ascii
)
async def test_a_legal_namespace_slug_works_everywhere(http: Http, cluster: Cluster, slug: str) -> None:
    namespace = f"{slug}{unique('')}"
    place = Project(http, namespace, "robotics", cluster.token(namespace))
    answer = body_of(await place.upsert("run-042"), HTTPStatus.CREATED)
    assert answer["namespace"]["slug"] == namespace
    assert_project_id(answer["namespace"]["id"])
    assert await place.names() == ["run-042"]
    body_of(await place.patch("run-042", tags=["a"]), HTTPStatus.OK)
    assert (await place.seen("run-042"))["tags"] == ["a"]


@pytest.mark.parametrize("character", ["x", "ü", "🦾"])
async def test_a_namespace_slug_of_255_characters_works(http: Http, cluster: Cluster, character: str) -> None:
    start = unique("a")
    namespace = start + character * (255 - len(start))
    place = Project(http, namespace, "robotics", cluster.token(namespace))
    assert body_of(await place.upsert("run-042"), HTTPStatus.CREATED)["namespace"]["slug"] == namespace
    assert await place.names() == ["run-042"]


@pytest.mark.parametrize("name", ILLEGAL, ids=ascii)
async def test_an_illegal_name_is_400(project: Project, name: str) -> None:
    await project.given("run-042")
    assert_problem(await project.upsert(name), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.patch("run-042", name=name), HTTPStatus.BAD_REQUEST, "validation_error")
    assert await project.names() == ["run-042"]


@pytest.mark.parametrize("name", [*(f"a{character}b" for character in CONTROL), ".", ".."], ids=ascii)
async def test_an_illegal_name_in_a_url_is_400(project: Project, name: str) -> None:
    await project.given("run-042")
    assert_problem(await project.get(name), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.patch(name, tags=[]), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.delete(name), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await project.restore(name), HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("slug", [*(f"a{character}b" for character in CONTROL), ".", ".."], ids=ascii)
async def test_an_illegal_project_slug_is_400(project: Project, slug: str) -> None:
    place = project.beside(slug=slug)
    assert_problem(await place.upsert("run-042"), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await place.list(), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await place.get("run-042"), HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("slug", [*(f"a{character}b" for character in CONTROL), ".", ".."], ids=ascii)
async def test_an_illegal_namespace_slug_is_400(project: Project, cluster: Cluster, slug: str) -> None:
    place = project.beside(namespace=slug, token=cluster.token(unique("carol"), namespaces=["*"]))
    assert_problem(await place.upsert("run-042"), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_problem(await place.list(), HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize("name", ["", " ", "   "])
async def test_a_blank_new_name_is_400(project: Project, name: str) -> None:
    await project.given("run-042")
    assert_problem(await project.patch("run-042", name=name), HTTPStatus.BAD_REQUEST, "validation_error")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Run", "run"),
        ("run", " run"),
        ("run", "run "),
        ("caf\u00e9", "cafe\u0301"),
        ("a/b", "a%2Fb"),
        ("a+b", "a b"),
        ("a%20b", "a b"),
        ("\u212b", "\u00c5"),
        ("1", "01"),
    ],
    ids=ascii,
)
async def test_names_that_look_alike_are_two_names(project: Project, one: str, other: str) -> None:
    first, second = await project.given(one), await project.given(other)
    assert first["id"] != second["id"]
    assert (await project.seen(one))["id"] == first["id"]
    assert (await project.seen(other))["id"] == second["id"]


async def test_slugs_are_case_sensitive(project: Project) -> None:
    await project.given("run-042")
    assert_problem(await project.beside(slug="Robotics").list(), HTTPStatus.NOT_FOUND, "not_found")
    upper = project.beside(namespace=project.namespace.upper())
    assert_problem(await upper.list(), HTTPStatus.FORBIDDEN, "forbidden")


async def test_percent_encoding_may_be_written_in_either_case(http: Http, project: Project) -> None:
    await project.given("a/ü")
    for encoded in ("a%2F%C3%BC", "a%2f%c3%bc", "%61%2F%C3%BC"):
        response = await http.send("GET", f"{project.target}/{encoded}", authorization=project.authorization)
        assert body_of(response, HTTPStatus.OK)["name"] == "a/ü"


async def test_a_plain_slash_is_not_part_of_a_name(http: Http, project: Project) -> None:
    await project.given("a/b")
    response = await http.send("GET", f"{project.target}/a/b", authorization=project.authorization)
    assert_problem(response, HTTPStatus.NOT_FOUND)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_name_that_is_not_utf8_is_refused(http: Http, project: Project, method: str) -> None:
    await project.given("run-042")
    response = await http.send(method, f"{project.target}/%FF%FE", authorization=project.authorization)
    assert response.status_code in {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND}


async def test_a_name_with_a_slash_is_not_the_restore_of_another(http: Http, cluster: Cluster) -> None:
    project = a_project(http, cluster)
    await project.given("run")
    await project.given("run/restore")
    body_of(await project.delete("run"), HTTPStatus.OK)
    body_of(await project.delete("run/restore"), HTTPStatus.OK)
    body_of(await project.restore("run/restore"), HTTPStatus.OK)
    assert await project.names() == ["run/restore"]
    body_of(await project.restore("run"), HTTPStatus.OK)
    assert await project.names() == ["run", "run/restore"]
