"""No order of start-up matters: each process waits for what it needs, says what that is, and goes on by itself."""

import asyncio
import functools
from collections.abc import Iterator
from http import HTTPStatus

import httpx
import pytest

from local.process import Managed, ManagedProcess
from local.services import SERVICES
from tests.cluster import RUNNING, Cluster, ThrowAwayServers, _folder
from tests.e2e.client import a_project, a_tenant, open_http
from tests.e2e.load import assert_accounts_agree, eventually

NEEDS = {
    "gateway": {"kafka", "topic", "mongo"},
    "ingestor": {"kafka", "topic"},
    "projector": {"kafka", "topic", "mongo"},
}
"""Words for what it waits for."""


@pytest.fixture
def nothing_runs() -> Iterator[Cluster]:
    """Return a cluster of which nothing is started, no server either."""
    with _folder() as folder:
        servers = ThrowAwayServers(folder)
        cluster = Cluster(servers, folder, {})
        for kind in SERVICES:
            cluster.add_process(kind, kind)
        RUNNING.extend([servers.kafka, servers.mongodb])
        try:
            yield cluster
        finally:
            cluster.stop()
            for server in (servers.kafka, servers.mongodb):
                RUNNING.remove(server)
                server.kill()


@pytest.mark.parametrize("order", [("kafka", "topics", "mongodb"), ("mongodb", "kafka", "topics")], ids="-".join)
async def test_processes_wait_for_what_they_need_and_say_so(nothing_runs: Cluster, order: tuple[str, ...]) -> None:
    missing = {"kafka", "mongo"}
    for process in nothing_runs.processes.values():
        process.start()
    await assert_processes_wait_for(nothing_runs, missing)
    for step in order:
        match step:
            case "kafka":
                await asyncio.to_thread(start, nothing_runs.servers.kafka)
                missing = missing - {"kafka"} | {"topic"}
            case "topics":
                await asyncio.to_thread(nothing_runs.run_topics)
                missing -= {"topic"}
            case _:
                await asyncio.to_thread(start, nothing_runs.servers.mongodb)
                missing -= {"mongo"}
        await assert_processes_wait_for(nothing_runs, missing)
    async with open_http(nothing_runs.url) as http:
        project, tenant = a_project(http, nothing_runs), a_tenant(http, nothing_runs)
        await project.given("run-042")
        await project.seen("run-042")
        await tenant.recorded()
    await assert_accounts_agree(nothing_runs, [])


@pytest.mark.parametrize("first", SERVICES)
async def test_no_process_waits_for_another(cluster: Cluster, first: str) -> None:
    for process in cluster.processes.values():
        process.kill()
    try:
        cluster.processes[first].start()
        await asyncio.to_thread(cluster.processes[first].wait_ready)
    finally:
        for process in cluster.processes.values():
            process.start()
        for process in cluster.processes.values():
            await asyncio.to_thread(process.wait_ready)


def start(server: Managed) -> None:
    server.start()
    server.wait_ready()


async def assert_processes_wait_for(cluster: Cluster, missing: set[str]) -> None:
    """Wait until each process names on /readyz something of what it needs and what is missing, or else is ready."""
    for kind, process in cluster.processes.items():
        wanted = NEEDS[kind] & missing
        said = functools.partial(says, process, wanted)
        what = f"{kind} says that it waits for one of {wanted}" if wanted else f"{kind} is ready"
        await eventually(said, what=what)


async def says(process: ManagedProcess, wanted: set[str]) -> bool:
    assert process.running, f"{process.name} must wait, and ended with {process.exit_code}"
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            response = await client.get(f"http://127.0.0.1:{process.port}/readyz")
        except httpx.TransportError:
            return False
    if not wanted:
        return response.status_code == HTTPStatus.OK
    said = response.text.lower()
    return response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and any(word in said for word in wanted)
