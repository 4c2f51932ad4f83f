"""A TCP proxy that can be told, while it runs, to delay, hold, swallow, drip, reset, cut or refuse.

`Toxic` is what a proxy can be given; `Proxy.add` gives it, `Proxy.remove` takes it back. "Up" is the way from the
client to the server, "down" the way back. TCP never loses a byte of a stream that goes on, and neither does this proxy:
a connection that lost bytes passes none ever after.
"""

import asyncio
import enum
import itertools
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Self

from local.servers import HOST, free_port

_CHUNK = 64 * 1024
_SLICE = 0.05
"""Seconds between two pieces of a slow drip."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: the kernel sends RST instead of FIN."""


class Direction(enum.Flag):
    """Which way bytes go."""

    UP = enum.auto()
    DOWN = enum.auto()
    BOTH = UP | DOWN


@dataclass(frozen=True)
class Delay:
    """Bytes arrive `seconds` later, and up to `jitter` seconds more."""

    seconds: float
    jitter: float = 0.0


@dataclass(frozen=True)
class Drip:
    """Bytes trickle."""

    bytes_per_second: float


@dataclass(frozen=True)
class Hold:
    """No byte passes. What was sent meanwhile arrives late, when the toxic is taken back: a partition that heals."""


@dataclass(frozen=True)
class Swallow:
    """Bytes are taken and never arrive: the other end is gone, and nobody is told. In the end comes a reset."""


@dataclass(frozen=True)
class Reset:
    """After so many more bytes of a connection both its ends hear RST, in the midst of whatever it was."""

    after_bytes: int


Toxic = Delay | Drip | Hold | Swallow | Reset


class _Given:
    """A toxic as given to a proxy: one object, so that the same toxic can be given twice."""

    def __init__(self, toxic: Toxic, direction: Direction, share: float, seed: str) -> None:
        self.toxic = toxic
        self.direction = direction
        self._share = share
        self._seed = seed

    def hits(self, connection: "_Connection", direction: Direction) -> bool:
        """Say whether it is for this connection; always the same for the same one."""
        if direction not in self.direction:
            return False
        return self._share >= 1 or random.Random(f"{self._seed}/{connection.number}").random() < self._share  # noqa: S311 - no secret


class Proxy:
    """Listens on `port` and passes bytes to and from a server, as an `async with` block."""

    def __init__(self, target_port: int, *, name: str = "proxy", port: int | None = None) -> None:
        self.name = name
        self.port = free_port() if port is None else port
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._numbers = itertools.count(1)
        self._given: list[_Given] = []
        self._change = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End it with all its connections."""
        await self.refuse()
        self.cut()
        while self._connections:
            await asyncio.wait([connection.task for connection in self._connections])

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def add(self, toxic: Toxic, direction: Direction = Direction.BOTH, *, share: float = 1.0, seed: str = "") -> _Given:
        """Give it a toxic, for this share of the connections, old and new ones; return what `remove` takes."""
        given = _Given(toxic, direction, share, seed)
        self._given.append(given)
        self._changed()
        return given

    def remove(self, given: _Given) -> None:
        """Take a toxic back. Nothing happens if it is gone already."""
        if given in self._given:
            self._given.remove(given)
            self._changed()
        if isinstance(given.toxic, Swallow):
            for connection in [*self._connections]:
                if connection.lost_bytes:
                    connection.reset()

    async def heal(self) -> None:
        """Take back all toxics, and accept connections."""
        for given in [*self._given]:
            self.remove(given)
        await self.accept()

    def cut(self) -> None:
        """Close all connections, both ways."""
        for connection in [*self._connections]:
            connection.abort()

    async def refuse(self) -> None:
        """Refuse new connections, as a machine does on which nobody listens. Those that are open stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Accept new connections again."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accepted, HOST, self.port, backlog=512)

    def toxics(self, connection: "_Connection", direction: Direction) -> list[_Given]:
        """Give what is on for a connection and a way."""
        return [given for given in self._given if given.hits(connection, direction)]

    async def wait_change(self) -> None:
        """Wait until a toxic is given or taken back."""
        await self._change.wait()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, next(self._numbers), task, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run(self._target_port)
        finally:
            self._connections.discard(connection)


class _Connection:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(
        self,
        proxy: Proxy,
        number: int,
        task: "asyncio.Task[None]",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.number = number
        self.task = task
        self.lost_bytes = False
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]
        self._passed: Counter[_Given] = Counter()
        """How many bytes have gone since a `Reset` was given."""

    async def run(self, target_port: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(HOST, target_port)
        except OSError:
            self.reset()
            return
        self._writers.append(writer)
        pumps = [
            asyncio.ensure_future(self._pump(self._reader, writer, Direction.UP)),
            asyncio.ensure_future(self._pump(reader, self._writers[0], Direction.DOWN)),
        ]
        try:
            await asyncio.gather(*pumps)
        except (OSError, _Ended):
            self.abort()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for each in self._writers:
                each.close()

    def abort(self) -> None:
        """Close both ends."""
        for writer in self._writers:
            writer.transport.abort()

    def reset(self) -> None:
        """Let both ends hear RST."""
        for writer in self._writers:
            if not writer.transport.is_closing():
                peer: socket.socket = writer.get_extra_info("socket")
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: Direction) -> None:
        while chunk := await source.read(_CHUNK):
            await self._pass(chunk, sink, direction)
        if sink.transport.is_closing():
            raise _Ended
        while self._has(Hold, direction):
            await self._proxy.wait_change()
        if not self.lost_bytes:
            sink.write_eof()

    async def _pass(self, chunk: bytes, sink: asyncio.StreamWriter, direction: Direction) -> None:
        delays = [given.toxic for given in self._proxy.toxics(self, direction) if isinstance(given.toxic, Delay)]
        if delays:
            await asyncio.sleep(sum(delay.seconds + random.uniform(0, delay.jitter) for delay in delays))  # noqa: S311 - no secret
        while chunk:
            while self._has(Hold, direction):
                await self._proxy.wait_change()
            if sink.transport.is_closing():
                raise _Ended
            self.lost_bytes = self.lost_bytes or self._has(Swallow, direction)
            if self.lost_bytes:
                return
            piece = await self._write_some(chunk, sink, direction)
            chunk = chunk[len(piece) :]

    async def _write_some(self, chunk: bytes, sink: asyncio.StreamWriter, direction: Direction) -> bytes:
        """Write as much of the chunk as may go now, and give that."""
        given = self._proxy.toxics(self, direction)
        rates = [each.toxic.bytes_per_second for each in given if isinstance(each.toxic, Drip)]
        piece = chunk[: max(1, int(min(rates) * _SLICE))] if rates else chunk
        left = {each: each.toxic.after_bytes - self._passed[each] for each in given if isinstance(each.toxic, Reset)}
        piece = piece[: max(0, min(left.values(), default=len(piece)))]
        sink.write(piece)
        await sink.drain()
        for each, rest in left.items():
            self._passed[each] += len(piece)
            if rest <= len(piece):
                self.reset()
                raise _Ended
        if rates:
            await asyncio.sleep(len(piece) / min(rates))
        return piece

    def _has(self, kind: type[Toxic], direction: Direction) -> bool:
        return any(isinstance(given.toxic, kind) for given in self._proxy.toxics(self, direction))


class _Ended(Exception):
    """The connection is over."""
