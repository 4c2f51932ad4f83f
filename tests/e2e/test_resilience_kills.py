"""Processes that die by kill -9, or are asked to go, while writers are at work: nothing is lost, nothing is twice."""

import asyncio
import json
import signal
from collections.abc import Iterator
from http import HTTPStatus
from typing import Self

import pytest

from tests.cluster import Cluster, throw_away_cluster
from tests.e2e.client import a_tenant, open_http, unique
from tests.e2e.ledger import COMMANDS, Acknowledged, Fact, read_topic
from tests.e2e.load import assert_accounts_agree, eventually, left_running, running_load

KILLS = 5


@pytest.fixture(scope="module")
def breakable() -> Iterator[Cluster]:
    with throw_away_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def all_run(request: pytest.FixtureRequest, breakable: Cluster) -> Iterator[None]:
    with left_running(request, breakable):
        yield


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gateway", "ingestor", "projector"])
async def test_a_killed_process_loses_nothing_and_repeats_nothing(breakable: Cluster, name: str) -> None:
    process = breakable.processes[name]
    async with running_load(breakable) as load:
        for _ in range(KILLS):
            process.kill()
            assert process.exit_code == -signal.SIGKILL
            process.start()
            await load.progress()
            await load.visible()
    await assert_accounts_agree(breakable, load.acknowledged)
    if name == "projector":
        assert load.outcomes.keys() <= {200, 201}, f"writers noticed: {load.outcomes}"


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ingestor", "projector"])
async def test_writers_do_not_notice_a_restart_in_good_order(breakable: Cluster, name: str) -> None:
    process = breakable.processes[name]
    async with running_load(breakable) as load:
        for _ in range(4):
            assert await asyncio.to_thread(process.stop) == 0
            process.start()
            await load.progress(1)
            await asyncio.to_thread(process.wait_ready)
        await load.visible()
    await assert_accounts_agree(breakable, load.acknowledged)
    assert load.outcomes.keys() <= {200, 201}, f"writers noticed: {load.outcomes}, {load.timed_out}"


async def test_a_gateway_that_is_asked_to_go_answers_all_that_it_accepted(breakable: Cluster) -> None:
    gateway, ingestor = breakable.processes["gateway"], breakable.processes["ingestor"]
    async with open_http(breakable.url) as http:
        await http.document()
        tenants = [a_tenant(http, breakable) for _ in range(20)]
        ingestor.pause()
        try:
            attempts = [asyncio.ensure_future(tenant.record({"content": "First."})) for tenant in tenants]

            async def all_published() -> bool:
                partitions = await read_topic(breakable.servers.kafka_bootstrap, COMMANDS)
                keys = {record.key for records in partitions.values() for record in records}
                return keys >= {tenant.stream.encode() for tenant in tenants}

            await eventually(all_published, what="all 20 requests are under way")
            gateway.signal(signal.SIGTERM)

            async def refuses_connections() -> bool:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                except ConnectionRefusedError:
                    return True
                writer.close()
                return False

            await eventually(refuses_connections, what="the gateway takes no more connections")
            assert not any(attempt.done() for attempt in attempts)
        finally:
            ingestor.resume()
        responses = await asyncio.gather(*attempts)
    assert {response.status_code for response in responses} == {HTTPStatus.CREATED}
    assert await asyncio.to_thread(gateway.wait, 30) == 0
    gateway.start()
    await asyncio.to_thread(gateway.wait_ready)


async def test_no_connection_is_torn_by_a_gateway_that_is_asked_to_go(breakable: Cluster) -> None:
    gateway = breakable.processes["gateway"]
    callers = [Caller(breakable) for _ in range(12)]
    async with asyncio.TaskGroup() as tasks:
        for caller in callers:
            tasks.create_task(caller.call_until_refused())
        await eventually(lambda: all_have_answers(callers), what="every caller has answers")
        gateway.signal(signal.SIGTERM)
        for caller in callers:
            caller.under_way_at_stop = caller.under_way
    assert await asyncio.to_thread(gateway.wait, 30) == 0
    gateway.start()
    await asyncio.to_thread(gateway.wait_ready)
    torn = [problem for caller in callers for problem in caller.problems]
    assert not torn, torn
    await assert_accounts_agree(breakable, [answer for caller in callers for answer in caller.acknowledged])


async def all_have_answers(callers: list["Caller"]) -> bool:
    return all(len(caller.acknowledged) >= 5 for caller in callers)


class Caller:
    """Sends one write after the other on one connection, and knows exactly when it had sent what.

    HTTP lets a server close a connection that has no request under way at any time. So a request that was sent after
    the server had been asked to go may find the door closed, before the first byte of an answer; no other may.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.acknowledged: list[Acknowledged] = []
        self.problems: list[str] = []
        self.under_way: str | None = None
        """Content of the request that is sent and not answered."""
        self.under_way_at_stop: str | None = None
        self._cluster = cluster
        self._tenant_id = unique("my-app")

    async def call_until_refused(self) -> None:
        while True:
            try:
                connection = await Connection.open(self._cluster.processes["gateway"].port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                continue  # it was in the kernel's queue when the door was closed, and has sent nothing
            try:
                while await self._call(connection):
                    pass
            finally:
                connection.close()

    async def _call(self, connection: "Connection") -> bool:
        """Send one write; whether the connection can be used again."""
        content, key = unique("line"), unique("key")
        body = {"tenant_id": self._tenant_id, "episodes": [{"content": content}]}
        headers = {"Authorization": f"Bearer {self._cluster.api_key}", "Idempotency-Key": key}
        connection.send("POST", "/v1/episodes", headers, json.dumps(body).encode())
        self.under_way = content
        try:
            status, answered, text = await connection.receive()
        except ConnectionAbortedError as error:
            self.problems.append(f"{content}: {error}")
            return False
        except ConnectionError as error:
            if content == self.under_way_at_stop:
                self.problems.append(f"{content} was sent before the stop: {error!r}")
            return False
        finally:
            self.under_way = None
        if status != HTTPStatus.CREATED:
            self.problems.append(f"{content}: {status} {text!r}")
            return False
        answer = json.loads(text)
        fact = Fact(answer["event_ids"][0], "TenantEpisodeRecorded", answer["episode_ids"][0], content)
        stream, last = f"tenant:{self._tenant_id}", int(answered["x-event-id"])
        self.acknowledged.append(Acknowledged(stream, key, last, (fact,)))
        return answered.get("connection", "").lower() != "close"


class Connection:
    """HTTP/1.1 on one socket: what is sent is in the server's kernel when `send` returns."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int | None) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        all_headers = {
            "Host": "localhost",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in all_headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def receive(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body.

        Raises:
            ConnectionAbortedError: the answer breaks off.
            ConnectionError: the connection was closed before the first byte of an answer.
        """
        first = await self._reader.read(1)
        if not first:
            raise ConnectionResetError("closed without an answer")
        try:
            head = (first + await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(self._header(line) for line in head[1:] if line)
            body = await self._reader.readexactly(int(headers["content-length"]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ConnectionAbortedError(f"torn: {error}") from error
        return int(head[0].split()[1]), headers, body

    def close(self) -> None:
        self._writer.close()

    @staticmethod
    def _header(line: str) -> tuple[str, str]:
        name, _, value = line.partition(":")
        return name.strip().lower(), value.strip()
