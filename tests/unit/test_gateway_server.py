"""What a connection may take and hold, on real sockets."""

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from gateway.server import Connection, Connections, Server

LARGE = 8 * 1024 * 1024
REQUEST = b"GET /%d HTTP/1.1\r\nHost: gateway\r\n\r\n"
PATIENCE = 20


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """As many bytes as the path says; ``/stuck`` never answers."""
    if scope["path"] == "/stuck":
        await asyncio.Event().wait()
    await Response(b"x" * int(scope["path"][1:]))(scope, receive, send)


class Listening(NamedTuple):
    port: int
    server: Server
    connections: Connections


@asynccontextmanager
async def serving(*, keep_alive: int = 60, **limits: Any) -> AsyncIterator[Listening]:
    connections = Connections(**({"most": 100, "most_unread": 4 * LARGE} | limits))
    config = uvicorn.Config(
        answer,
        http=partial(Connection, connections=connections),  # type: ignore[arg-type]  # it is only called
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=keep_alive,
    )
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        server = Server(config, listener)
        running = asyncio.ensure_future(server.serve())
        yield Listening(listener.getsockname()[1], server, connections)
        server.should_exit = True
        await running


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # by itself the system may take in all of `LARGE`
    client.settimeout(0)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.close()


async def wait_closed(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes."""
    async with asyncio.timeout(PATIENCE):
        return await reader.read()


async def wait_until(found: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not found():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)


def problem(raw: bytes) -> Any:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert head.lower().count(b"connection: close") == 1
    status = int(head.split()[1])
    told = json.loads(body)
    assert told["status"] == status
    return told


async def test_all_who_wait_are_accepted_within_a_few_turns_of_the_loop() -> None:
    async with serving(most=1000) as it, AsyncExitStack() as stack:
        async with connected(it.port):  # it serves
            pass
        for _ in range(500):
            stack.enter_context(socket.create_connection(("127.0.0.1", it.port)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(it.server.server_state.connections) == 500


async def test_who_waits_to_be_accepted_when_the_server_lets_go_is_answered() -> None:
    async with serving() as it:
        async with connected(it.port):
            pass
        with socket.create_connection(("127.0.0.1", it.port)) as late:
            late.sendall(REQUEST % 3)
            await it.server.let_go(0.1)
            late.settimeout(PATIENCE)
            assert (await asyncio.to_thread(late.recv, 100)).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", it.port))


async def test_without_files_for_connections_it_accepts_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.server._ACCEPT_AGAIN", 0.05)
    async with serving() as it:
        async with connected(it.port):
            pass
        await wait_until(lambda: not it.server.server_state.connections)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.create_connection(("127.0.0.1", it.port)) as late:
            late.sendall(REQUEST % 3)
            with capture_logs() as logs:
                resource.setrlimit(resource.RLIMIT_NOFILE, (late.fileno() + 1, hard))
                try:
                    await wait_until(lambda: bool(logs))
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert "Too many open files" in logs[0]["reason"]
            late.settimeout(PATIENCE)
            assert (await asyncio.to_thread(late.recv, 100)).startswith(b"HTTP/1.1 200")


async def test_one_connection_too_many_is_told_so() -> None:
    async with serving(most=2) as it, connected(it.port) as first, connected(it.port):
        await wait_until(lambda: len(it.server.server_state.connections) == 2)
        async with connected(it.port) as (reader, _):
            raw = await wait_closed(reader)
            assert (problem(raw)["code"], raw.count(b"retry-after: 1")) == ("unavailable", 1)
        first[1].write(REQUEST % 3)
        assert (await first[0].readline()).startswith(b"HTTP/1.1 200")


async def test_a_head_that_does_not_arrive_ends_the_connection() -> None:
    async with serving(head_seconds=0.05) as it, connected(it.port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(3):
            await asyncio.sleep(0.01)
            writer.write(b"y")
        told = problem(await wait_closed(reader))
        assert told["code"] == "request_timeout"
        assert told["detail"] == "The head of the request did not arrive within 0.05 s"


async def test_a_head_that_arrives_in_parts_is_enough_in_time() -> None:
    async with serving(head_seconds=PATIENCE, keep_alive=1) as it, connected(it.port) as (reader, writer):
        writer.write(b"GET /3 HTTP/1.1\r\nHost:")
        await asyncio.sleep(0.02)
        writer.write(b" gateway\r\n\r\n")
        assert (await wait_closed(reader)).endswith(b"\r\n\r\nxxx")  # by the time-out for idle connections


async def test_a_late_head_waits_for_the_answer_before_it() -> None:
    async with serving(head_seconds=0.02) as it, connected(it.port) as (reader, writer):
        writer.write(b"GET /stuck HTTP/1.1\r\nHost: gateway\r\n\r\nGET / HTTP")
        await wait_until(lambda: bool(it.server.server_state.tasks))
        await asyncio.sleep(0.1)  # well past the time for the head: nothing may come
        assert not reader.at_eof()
        [running] = it.server.server_state.tasks
        running.cancel()
        assert b"408" not in (await wait_closed(reader)).partition(b"\r\n")[0]


async def test_a_connection_without_a_request_is_closed() -> None:
    async with serving(keep_alive=1) as it, connected(it.port) as (reader, _):
        assert await wait_closed(reader) == b""


async def test_a_connection_that_only_dribbles_behind_an_answer_is_closed() -> None:
    async with serving(keep_alive=1) as it, connected(it.port) as (reader, writer):
        writer.write(b"POST /0 HTTP/1.1\r\nHost: gateway\r\nContent-Length: 10\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.write(b"1")
        await wait_closed(reader)


async def test_an_answer_that_nobody_reads_ends_the_connection() -> None:
    async with serving(unread_seconds=0.1) as it, connected(it.port) as (_, writer):
        with capture_logs() as logs:
            writer.write(REQUEST % LARGE)
            await wait_until(lambda: bool(logs))
        assert logs[0]["reason"] == "its answer was not read"
        await wait_until(lambda: not it.server.server_state.connections)


async def test_an_answer_that_is_read_at_last_is_whole() -> None:
    async with serving(unread_seconds=PATIENCE) as it, connected(it.port) as (reader, writer):
        for _ in range(3):
            writer.write(REQUEST % LARGE)
            await wait_until(lambda: it.connections.stalled > 0)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: %d" % LARGE in head
            assert len(await reader.readexactly(LARGE)) == LARGE
            await wait_until(lambda: it.connections.stalled == 0)
        assert it.connections.unread == 0


async def test_who_reads_slowest_is_cut_when_others_wait_for_room() -> None:
    async with serving(most_unread=1) as it, connected(it.port) as slow, connected(it.port) as slower:
        with capture_logs() as logs:
            slow[1].write(REQUEST % LARGE)
            await wait_until(lambda: it.connections.stalled == 1)
            slower[1].write(REQUEST % LARGE)
            await wait_until(lambda: it.connections.stalled == 2)
            waiting = asyncio.ensure_future(it.connections.wait_room(large=False))
            reading = asyncio.ensure_future(_read_steadily(slow[0]))
            await wait_until(lambda: bool(logs))
            assert not waiting.done()
            reading.cancel()
            assert (await slow[0].read(1)) == b"x"
            with suppress(ConnectionError):
                while await slower[0].read(LARGE):
                    pass
            async with asyncio.timeout(PATIENCE):
                await waiting
        assert [log["reason"] for log in logs] == ["others wait, and it reads its answer slowly"] * 2
        assert it.connections.unread == 0


async def test_a_reader_who_is_fast_enough_is_not_cut() -> None:
    async with serving(most_unread=LARGE // 2) as it, connected(it.port) as (reader, writer):
        with capture_logs() as logs:
            writer.write(REQUEST % LARGE)
            await wait_until(lambda: it.connections.stalled == 1)
            waiting = asyncio.ensure_future(it.connections.wait_room(large=False))
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.readexactly(LARGE)) == LARGE
            async with asyncio.timeout(PATIENCE):
                await waiting
        assert logs == []


async def _read_steadily(reader: asyncio.StreamReader) -> None:
    for _ in range(10_000):
        await reader.readexactly(16 * 1024)
        await asyncio.sleep(0.01)


def test_no_more_connections_are_promised_than_files_can_be_open() -> None:
    with capture_logs() as logs:
        few = Connections(most=10**9, most_unread=1)
    assert 0 < few.most < 10**9
    assert logs[0]["event"] == "fewer connections than GATEWAY_MAX_CONNECTIONS: too few open files"
    assert Connections(most=10, most_unread=1).most == 10
