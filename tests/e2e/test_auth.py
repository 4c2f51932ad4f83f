"""Who may do what: tokens of the projects API, keys of the batch API."""

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import httpx
import pytest

from tests.e2e.client import Call, Cluster, Http, Project, Tenant, a_tenant, assert_problem, body_of, unique

pytest_plugins = ["tests.e2e.contract_fixtures"]

HOUR = 3600


def now() -> int:
    return int(datetime.now(UTC).timestamp())


def token_of(claims: dict[str, Any], secret: str, *, algorithm: str = "HS256") -> str:
    """Return a token made by hand, so that no library refuses to make a bad one."""

    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    header = {"alg": algorithm, "typ": "JWT"}
    text = f"{part(json.dumps(header).encode())}.{part(json.dumps(claims).encode())}"
    digests = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}
    if algorithm not in digests:
        return f"{text}."
    return f"{text}.{part(hmac.digest(secret.encode(), text.encode(), digests[algorithm]))}"


def signed(cluster: Cluster, **claims: Any) -> str:
    return token_of({"exp": now() + HOUR, **claims}, cluster.jwt_secret)


def assert_unauthorized(response: httpx.Response) -> None:
    assert_problem(response, HTTPStatus.UNAUTHORIZED)
    assert response.headers["www-authenticate"].lower().startswith("bearer")


# ---- both APIs -------------------------------------------------------------------------------------------------------

BAD_AUTHORIZATIONS = [
    None,
    "",
    "Bearer",
    "Bearer nonsense",
    "Bearer a.b.c",
    "Basic YWxpY2U6c2VjcmV0",
    "x" * 5000,
]


@pytest.mark.parametrize("authorization", BAD_AUTHORIZATIONS, ids=lambda value: str(value)[:20])
async def test_a_write_without_good_credentials_is_401(write: Call, authorization: str | None) -> None:
    assert_unauthorized(await write.send(authorization=authorization))
    assert (await write.send()).is_success


@pytest.mark.parametrize("authorization", BAD_AUTHORIZATIONS, ids=lambda value: str(value)[:20])
async def test_a_read_without_good_credentials_is_401(read: Call, authorization: str | None) -> None:
    assert_unauthorized(await read.send(authorization=authorization))
    response = await read.send(method="HEAD", authorization=authorization)
    assert response.status_code == HTTPStatus.UNAUTHORIZED


async def test_a_token_opens_no_tenant(tenant: Tenant, cluster: Cluster) -> None:
    token = cluster.token(tenant.tenant_id, namespaces=["*"])
    intruder = Tenant(tenant.http, tenant.tenant_id, token)
    assert_unauthorized(await intruder.record({"content": "A word."}))
    assert_unauthorized(await intruder.get("ep_0000000000000000"))


async def test_a_key_opens_no_namespace(project: Project, cluster: Cluster) -> None:
    await project.given("run-042")
    intruder = project.beside(token=cluster.api_key)
    assert_unauthorized(await intruder.upsert("run-043"))
    assert_unauthorized(await intruder.list())


# ---- tokens ----------------------------------------------------------------------------------------------------------


async def test_a_good_token_is_good(project: Project, cluster: Cluster) -> None:
    await project.beside(token=signed(cluster, username=project.namespace)).given("run-042")
    body_of(await project.patch("run-042", tags=["a"]), HTTPStatus.OK)


@pytest.mark.parametrize(
    "times",
    [{"exp": -HOUR}, {"nbf": HOUR}, {"exp": HOUR * 2, "nbf": HOUR}, {"exp": None}],
    ids=["expired", "not yet valid", "not yet valid, expires later", "never expires"],
)
async def test_a_token_out_of_its_time_is_401(project: Project, cluster: Cluster, times: dict[str, Any]) -> None:
    claims: dict[str, Any] = {"exp": now() + HOUR, "username": project.namespace}
    for claim, offset in times.items():
        if offset is None:
            del claims[claim]
        else:
            claims[claim] = now() + offset
    token = token_of(claims, cluster.jwt_secret)
    assert_unauthorized(await project.beside(token=token).upsert("run-042"))
    assert_unauthorized(await project.beside(token=token).list())


async def test_a_token_with_another_secret_is_401(project: Project) -> None:
    claims = {"exp": now() + HOUR, "username": project.namespace}
    token = token_of(claims, "another-secret-of-a-sufficient-length-0123456789")
    assert_unauthorized(await project.beside(token=token).upsert("run-042"))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "HS384", "HS512", "RS256"])
async def test_a_token_of_another_algorithm_is_401(project: Project, cluster: Cluster, algorithm: str) -> None:
    claims = {"exp": now() + HOUR, "username": project.namespace}
    token = token_of(claims, cluster.jwt_secret, algorithm=algorithm)
    assert_unauthorized(await project.beside(token=token).upsert("run-042"))
    assert_unauthorized(await project.beside(token=token).list())


async def test_a_token_that_was_changed_is_401(project: Project, cluster: Cluster) -> None:
    header, _, signature = signed(cluster, username=project.namespace).split(".")
    _, claims, _ = signed(cluster, username=project.namespace, namespaces=["*"]).split(".")
    assert_unauthorized(await project.beside(token=f"{header}.{claims}.{signature}").upsert("run-042"))


@pytest.mark.parametrize(
    "keys", [["username"], ["userName"], ["sub"], ["username", "userName", "sub"], ["userName", "sub"]]
)
async def test_the_own_namespace_is_the_first_claim_there_is(http: Http, cluster: Cluster, keys: list[str]) -> None:
    claims = {key: unique(key.lower()) for key in keys}
    own, *others = claims.values()
    place = Project(http, own, "robotics", signed(cluster, **claims))
    await place.given("run-042")
    for other in others:
        response = await place.beside(namespace=other).upsert("run-042")
        assert_problem(response, HTTPStatus.FORBIDDEN, "forbidden")


@pytest.mark.parametrize("grant", ["by name", "among others", "*"])
async def test_a_grant_opens_a_namespace(project: Project, cluster: Cluster, grant: str) -> None:
    await project.given("run-042")
    namespaces = {
        "by name": [project.namespace],
        "among others": ["x", project.namespace, "y"],
        "*": ["*"],
    }[grant]
    username = unique("carol")
    guest = project.beside(token=cluster.token(username, namespaces=namespaces))
    body_of(await guest.upsert("run-042", tags=["by the guest"]), HTTPStatus.OK)
    assert (await guest.seen("run-042"))["tags"] == ["by the guest"]
    assert await guest.names() == ["run-042"]
    body_of(await guest.delete("run-042"), HTTPStatus.OK)
    # The own namespace is open as well.
    await guest.beside(namespace=username).given("run-042")


@pytest.mark.parametrize("namespaces", [[], ["other"], ["alice"], ["alice-*"], ["**"], [""]])
async def test_another_grant_opens_nothing(project: Project, cluster: Cluster, namespaces: list[str]) -> None:
    await project.given("run-042")
    stranger = project.beside(token=cluster.token(unique("carol"), namespaces=namespaces))
    assert_problem(await stranger.upsert("run-042"), HTTPStatus.FORBIDDEN, "forbidden")
    assert_problem(await stranger.list(), HTTPStatus.FORBIDDEN, "forbidden")


# ---- keys ------------------------------------------------------------------------------------------------------------


async def test_a_key_for_all_tenants_opens_each(http: Http, cluster: Cluster) -> None:
    for _ in range(2):
        await a_tenant(http, cluster).recorded()
    await Tenant(http, "acme", cluster.api_key).recorded()


async def test_a_key_for_one_tenant_opens_it(http: Http, cluster: Cluster) -> None:
    acme = Tenant(http, "acme", cluster.api_key_for(["acme"]))
    episode = await acme.recorded(content="Of acme.")
    assert episode["content"] == "Of acme."


async def test_a_key_for_one_tenant_opens_no_other(http: Http, cluster: Cluster, tenant: Tenant) -> None:
    episode = await tenant.recorded()
    intruder = Tenant(http, tenant.tenant_id, cluster.api_key_for(["acme"]))
    assert_problem(await intruder.record({"content": "A word."}), HTTPStatus.FORBIDDEN, "forbidden")
    for episode_id in (episode["id"], "ep_0000000000000000"):
        assert_problem(await intruder.get(episode_id), HTTPStatus.FORBIDDEN, "forbidden")
    for tenant_id in ("Acme", "acme2", "acm", "*"):
        other = Tenant(http, tenant_id, intruder.api_key)
        assert_problem(await other.record({"content": "A word."}), HTTPStatus.FORBIDDEN, "forbidden")
    assert (await tenant.given({"content": "The second."}))["event_ids"] == [2]


async def test_a_tenants_id_is_not_a_key_to_another_tenants_episode(http: Http, cluster: Cluster) -> None:
    theirs = await a_tenant(http, cluster).recorded()
    acme = Tenant(http, "acme", cluster.api_key_for(["acme"]))
    assert_problem(await acme.get(theirs["id"]), HTTPStatus.NOT_FOUND, "not_found")


async def test_a_key_that_is_nearly_right_is_401(tenant: Tenant, cluster: Cluster) -> None:
    key = cluster.api_key
    for wrong in (key[:-1], f"{key}x", key.swapcase(), key[1:] + key[0]):
        if wrong != key:
            assert_unauthorized(await Tenant(tenant.http, tenant.tenant_id, wrong).record({"content": "A word."}))


async def test_400_comes_before_403_and_after_401(http: Http, cluster: Cluster, tenant: Tenant) -> None:
    intruder = Tenant(http, tenant.tenant_id, cluster.api_key_for(["acme"]))
    assert_problem(await intruder.record(), HTTPStatus.BAD_REQUEST, "validation_error")
    assert_unauthorized(await Tenant(http, tenant.tenant_id, "nonsense").record())
