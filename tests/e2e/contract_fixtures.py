"""Fixtures of the tests over HTTP. A test module asks for them with `pytest_plugins`."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e.client import Call, Cluster, Http, Project, Tenant, a_project, a_tenant, open_http


@pytest.fixture(scope="module")
async def http(cluster: Cluster) -> AsyncIterator[Http]:
    async with open_http(cluster.url) as http:
        yield http


@pytest.fixture
def project(http: Http, cluster: Cluster) -> Project:
    """Return the project `robotics` of a caller who has not been seen before."""
    return a_project(http, cluster)


@pytest.fixture
def tenant(http: Http, cluster: Cluster) -> Tenant:
    """Return a tenant that has nothing recorded."""
    return a_tenant(http, cluster)


@pytest.fixture(params=["upsert", "patch", "batch"])
async def write_with_body(request: pytest.FixtureRequest, http: Http, project: Project, tenant: Tenant) -> Call:
    """Return one good write with a body, of each route that has one."""
    match request.param:
        case "upsert":
            return Call(http, "POST", project.target, project.authorization, {"name": "run-042"})
        case "patch":
            await project.given("run-042")
            target = project.episode_target("run-042")
            return Call(http, "PATCH", target, project.authorization, {"description": "Updated description"})
        case _:
            body = {"tenant_id": tenant.tenant_id, "episodes": [{"content": "First."}]}
            return Call(http, "POST", tenant.target, tenant.authorization, body)


@pytest.fixture(params=["upsert", "patch", "batch", "delete", "restore"])
async def write(request: pytest.FixtureRequest, http: Http, project: Project, tenant: Tenant) -> Call:
    """Return one good write of each route that writes."""
    if request.param != "batch":
        await project.given("run-042")
    match request.param:
        case "upsert":
            return Call(http, "POST", project.target, project.authorization, {"name": "run-042", "tags": ["a"]})
        case "patch":
            target = project.episode_target("run-042")
            return Call(http, "PATCH", target, project.authorization, {"description": "Updated description"})
        case "delete":
            return Call(http, "DELETE", project.episode_target("run-042"), project.authorization)
        case "restore":
            await project.delete("run-042")
            return Call(http, "POST", f"{project.episode_target('run-042')}/restore", project.authorization)
        case _:
            body = {"tenant_id": tenant.tenant_id, "episodes": [{"content": "First."}]}
            return Call(http, "POST", tenant.target, tenant.authorization, body)


@pytest.fixture(params=["list", "single", "batch episode"])
async def read(request: pytest.FixtureRequest, http: Http, project: Project, tenant: Tenant) -> Call:
    """Return one good read of each route that reads, of something that can be read already."""
    match request.param:
        case "list":
            await project.given("run-042")
            await project.list()
            return Call(http, "GET", project.target, project.authorization)
        case "single":
            await project.given("run-042")
            await project.seen("run-042")
            return Call(http, "GET", project.episode_target("run-042"), project.authorization)
        case _:
            episode = await tenant.recorded()
            return Call(http, "GET", tenant.episode_target(episode["id"]), tenant.authorization)
