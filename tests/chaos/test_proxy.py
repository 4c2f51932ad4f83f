"""Each toxic of the proxy, against a real server that sends back what it gets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from local.servers import HOST
from tests.chaos.proxy import Delay, Direction, Drip, Hold, Proxy, Reset, Swallow

SOON = 10
SILENCE = 0.3
"""Seconds that are long enough to see that nothing comes."""


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, HOST, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with echo_server() as port, Proxy(port) as proxy:
        yield proxy


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self, size: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(size), SOON)

    async def hears_nothing(self) -> bool:
        try:
            await asyncio.wait_for(self.reader.read(1), SILENCE)
        except TimeoutError:
            return True
        return False

    async def received_before_reset(self) -> int:
        """Read until RST comes, and say how many bytes came before it."""
        received = 0
        try:
            while chunk := await asyncio.wait_for(self.reader.read(65536), SOON):
                received += len(chunk)
        except ConnectionResetError:
            return received
        raise AssertionError("it ended, and not by a reset")


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(HOST, proxy.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def test_it_passes_everything_both_ways(proxy: Proxy) -> None:
    data = bytes(range(256)) * 8192
    async with connected(proxy) as client:
        client.send(data)
        assert await client.receive(len(data)) == data


async def test_an_end_is_passed_on_and_the_answer_still_comes(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        client.send(b"last")
        client.writer.write_eof()
        assert await asyncio.wait_for(client.reader.read(), SOON) == b"last"


async def test_nobody_behind_it_is_a_reset(proxy: Proxy) -> None:
    async with Proxy(1) as nowhere, connected(nowhere) as client:
        assert await client.received_before_reset() == 0


async def test_delayed_bytes_come_later(proxy: Proxy) -> None:
    delay = proxy.add(Delay(0.2, jitter=0.1), Direction.DOWN)
    loop = asyncio.get_running_loop()
    async with connected(proxy) as client:
        began = loop.time()
        client.send(b"x")
        assert await client.receive(1) == b"x"
        assert loop.time() - began >= 0.2
        proxy.remove(delay)
        client.send(b"y")
        assert await client.receive(1) == b"y"


async def test_dripping_bytes_come_at_most_at_their_rate(proxy: Proxy) -> None:
    drip = proxy.add(Drip(1_000), Direction.UP)
    loop = asyncio.get_running_loop()
    async with connected(proxy) as client:
        began = loop.time()
        client.send(b"x" * 400)
        await client.receive(300)
        assert loop.time() - began >= 0.2
        proxy.remove(drip)
        await client.receive(100)


async def test_held_bytes_come_late_but_come(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        hold = proxy.add(Hold())
        client.send(b"late")
        assert await client.hears_nothing()
        proxy.remove(hold)
        assert await client.receive(4) == b"late"


async def test_swallowed_bytes_never_come_and_the_connection_ends_in_a_reset(proxy: Proxy) -> None:
    async with connected(proxy) as client, connected(proxy) as idle:
        idle.send(b"x")
        assert await idle.receive(1) == b"x"
        swallow = proxy.add(Swallow(), Direction.UP)
        client.send(b"lost")
        assert await client.hears_nothing()
        proxy.remove(swallow)
        assert await client.received_before_reset() == 0
        idle.send(b"y")
        assert await idle.receive(1) == b"y", "one that lost nothing goes on"


async def test_a_reset_comes_after_as_many_bytes_of_the_answer(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        proxy.add(Reset(after_bytes=3), Direction.DOWN)
        client.send(b"abc")
        client.send(b"d" * 1000)
        assert await client.received_before_reset() <= 3


async def test_a_cut_ends_all_connections_and_lets_new_ones_in(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        client.send(b"x")
        assert await client.receive(1) == b"x"
        proxy.cut()
        assert await asyncio.wait_for(client.reader.read(), SOON) == b""
    async with connected(proxy) as client:
        client.send(b"y")
        assert await client.receive(1) == b"y"


async def test_refused_connections_leave_open_ones_alone_until_it_accepts_again(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        client.send(b"x")
        assert await client.receive(1) == b"x"
        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, proxy.port)
        client.send(b"y")
        assert await client.receive(1) == b"y"
    await proxy.accept()
    async with connected(proxy) as client:
        client.send(b"z")
        assert await client.receive(1) == b"z"


async def test_one_way_can_be_hit_alone() -> None:
    heard = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(5)
        heard.set()
        writer.write(b"answer")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, HOST, 0)
    async with server, Proxy(server.sockets[0].getsockname()[1]) as proxy, connected(proxy) as client:
        hold = proxy.add(Hold(), Direction.DOWN)
        client.send(b"asked")
        await asyncio.wait_for(heard.wait(), SOON)
        assert await client.hears_nothing()
        proxy.remove(hold)
        assert await client.receive(6) == b"answer"


async def test_a_share_of_the_connections_is_hit_and_stays_the_same(proxy: Proxy) -> None:
    proxy.add(Swallow(), share=0.5, seed="fixed")
    heard: set[int] = set()

    async def listen(number: int, client: Client) -> None:
        if await client.reader.read(1):
            heard.add(number)

    async with asyncio.timeout(SOON):
        clients = [Client(*await asyncio.open_connection(HOST, proxy.port)) for _ in range(20)]
        for client in clients:
            client.send(b"x")
        listening = [asyncio.ensure_future(listen(*each)) for each in enumerate(clients)]
        await asyncio.wait(listening, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(listening, timeout=SILENCE)
        assert 0 < len(heard) < 20
        for client in clients:
            client.writer.transport.abort()


async def test_healing_takes_everything_back(proxy: Proxy) -> None:
    proxy.add(Hold())
    proxy.add(Drip(1))
    await proxy.refuse()
    await proxy.heal()
    async with connected(proxy) as client:
        client.send(b"x" * 1000)
        await client.receive(1000)
