"""One asks for far too much: they are told so, others are served, and it passes."""

import asyncio
import contextlib
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import httpx
import psutil
import pytest

from local.services import api_keys_setting
from tests.cluster import Cluster, throw_away_cluster, wait_until

GREEDY, MODEST = "key-of-greedy", "key-of-modest"
IN_FLIGHT = 16
EPISODE_BYTES = 4 * 1024 * 1024
UNREAD_MIB = 16
SLOW_READERS = 60
MANY = 3_000
PATIENCE = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """On servers of its own: no other ingestor must answer while this one is frozen."""
    settings = {
        "API_KEYS": api_keys_setting({GREEDY: ["greedy"], MODEST: ["modest"]}),
        "GATEWAY_MAX_IN_FLIGHT": str(IN_FLIGHT),
        "GATEWAY_MAX_UNREAD_BYTES": str(UNREAD_MIB * 2**20),
        "GATEWAY_REPLY_TIMEOUT": str(PATIENCE),
        "GATEWAY_REFUSAL_SECONDS": "0.05",
    }
    with throw_away_cluster(settings=settings) as running:
        yield running


@pytest.fixture
async def http(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE, limits=limits) as client:
        yield client


async def write(http: httpx.AsyncClient, key: str, *, text: str = "", query: str = "") -> httpx.Response:
    body = {"tenant_id": key.removeprefix("key-of-"), "episodes": [{"content": "c", "metadata": {"text": text}}]}
    return await http.post(f"/v1/episodes{query}", json=body, headers={"Authorization": f"Bearer {key}"})


def gateway(cluster: Cluster) -> psutil.Process:
    pid = cluster.processes["gateway"].pid
    assert pid is not None
    return psutil.Process(pid)


async def test_who_has_too_much_under_way_is_told_to_come_again_and_others_are_served(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    ingestor = cluster.processes["ingestor"]
    ingestor.pause()
    try:
        greedy = [asyncio.ensure_future(write(http, GREEDY)) for _ in range(4 * IN_FLIGHT)]
        refused, waiting = await asyncio.wait(greedy, return_when=asyncio.ALL_COMPLETED, timeout=3)
        assert len(waiting) == IN_FLIGHT // 2
        modest = [asyncio.ensure_future(write(http, MODEST)) for _ in range(IN_FLIGHT // 4)]
        await asyncio.wait(modest, timeout=1)
        assert not any(one.done() for one in modest)
    finally:
        ingestor.resume()
    for one in refused:
        answer = one.result()
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (429, "rate_limited", "1")
    assert {(await one).status_code for one in [*waiting, *modest]} == {201}
    assert (await write(http, GREEDY)).status_code == 201  # at once, now that it is over


@contextlib.asynccontextmanager
async def connections(cluster: Cluster, number: int, first: bytes) -> AsyncIterator[list[socket.socket]]:
    """So many connections that send this and never read."""
    loop = asyncio.get_running_loop()
    port = cluster.processes["gateway"].port
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(number):
            one = stack.enter_context(socket.socket())
            one.settimeout(0)
            await loop.sock_connect(one, ("127.0.0.1", port))
            if first:
                await loop.sock_sendall(one, first)
            made.append(one)
        yield made


async def test_readers_who_do_not_read_cost_no_memory_and_nobody_else_an_answer(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    large = await write(http, GREEDY, text="x" * EPISODE_BYTES, query="?wait=projected")
    small = await write(http, MODEST, query="?wait=projected")
    before = gateway(cluster).memory_info().rss
    ask = (
        f"GET /v1/episodes/{large.json()['episode_ids'][0]}?tenant_id=greedy HTTP/1.1\r\nHost: gateway\r\n"
        f"Authorization: Bearer {GREEDY}\r\n\r\n"
    )
    most, answers = 0, Counter[int]()
    async with connections(cluster, SLOW_READERS, ask.encode()):
        for _ in range(100):
            answer = await http.get(
                f"/v1/episodes/{small.json()['episode_ids'][0]}?tenant_id=modest",
                headers={"Authorization": f"Bearer {MODEST}"},
            )
            answers[answer.status_code] += 1
            most = max(most, gateway(cluster).memory_info().rss)
            await asyncio.sleep(0.02)
    assert answers == {200: 100}
    assert (most - before) / 2**20 < UNREAD_MIB + 100 < SLOW_READERS * EPISODE_BYTES / 2**20


async def test_thousands_of_connections_and_slow_heads_keep_nobody_out(
    cluster: Cluster, http: httpx.AsyncClient
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    number = min(MANY, (hard - 1000) // 2)
    before = gateway(cluster).memory_info().rss
    try:
        async with (
            connections(cluster, number, b""),
            connections(cluster, number // 10, b"POST /v1/episodes HTTP/1.1\r\nX-Slow: "),
        ):
            wait_until(lambda: len(gateway(cluster).net_connections("tcp")) > number)
            for _ in range(20):
                assert (await write(http, MODEST)).status_code == 201
            assert gateway(cluster).memory_info().rss - before < 100 * 2**20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_gateway_may_open_all_the_files_that_it_can(cluster: Cluster) -> None:
    soft, hard = gateway(cluster).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard
