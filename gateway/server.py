"""uvicorn's HTTP server, with limits for how long a connection may take and how much it may hold."""

import asyncio
import contextlib
import resource
import socket
import time
from asyncio import TimerHandle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.problems import invalid, last_words, too_slow, unavailable

LARGEST_HEAD = 64 * 1024
BACKLOG = 2048
SEND_BUFFER = 256 * 1024
"""Bytes of an answer that the system holds for a connection. By itself it would hold megabytes for slow readers."""
KEEP_ALIVE = 75
"""Seconds that a connection may be idle, also before its first request."""
HEAD_SECONDS = 20
"""For the head of a request, from its first byte."""
UNREAD_SECONDS = 60
"""For a client to take what it asked for, or to begin to."""
_UNNOTICED = 16 * 1024
"""Bytes of answers that a connection may leave unread before that is counted."""
_FAIR_SECONDS = 1.0
"""So long a slow reader is not told from a fast one."""
_LOOK_AGAIN = 0.05
_ACCEPTED_AT_ONCE = 128
_ACCEPT_AGAIN = 1.0
_OTHER_FILES = 256

_log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """Serves until told to stop; `let_go` comes before that.

    It accepts by itself all who wait. uvloop would take in one at each turn of the loop (libuv/libuv#3696), so that
    newcomers wait for seconds when the turns take milliseconds.
    """

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener
        self._connecting: set[asyncio.Task[tuple[asyncio.Transport, asyncio.Protocol]]] = set()
        self._accepting: TimerHandle | None = None
        """Set while there are no files for new connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `run_process` handles them

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        await super().startup(sockets=[])
        self._listener.settimeout(0)
        self._accept_from_now_on()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accept_no_more()
        await super().shutdown(sockets)

    async def let_go(self, seconds: float) -> None:
        """Accept nobody new, and give those that are connected some time to hear that they must close.

        uvicorn alone would drop whoever waits to be accepted, and a request that has arrived but is not read yet.
        """
        while self._accept():
            pass
        self._accept_no_more()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._connecting or self.server_state.connections:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(_LOOK_AGAIN)

    def _accept_from_now_on(self) -> None:
        self._accepting = None
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept_no_more(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener.fileno() != -1:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()

    def _accept(self) -> bool:
        """Take in those that wait; whether there may be more."""
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return False
            except ConnectionAbortedError:
                continue
            except OSError as error:
                _log.error("no new connections for a second", reason=str(error))
                loop.remove_reader(self._listener.fileno())
                self._accepting = loop.call_later(_ACCEPT_AGAIN, self._accept_from_now_on)
                return False
            connecting = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)
        return True

    def _protocol(self) -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


class Connections:
    """What all connections share: how many there may be, and how many bytes of answers may wait for their readers."""

    def __init__(
        self,
        *,
        most: int,
        most_unread: int,
        head_seconds: float = HEAD_SECONDS,
        unread_seconds: float = UNREAD_SECONDS,
    ) -> None:
        self.most = min(most, _files() - _OTHER_FILES)
        if self.most < most:
            _log.warning("fewer connections than GATEWAY_MAX_CONNECTIONS: too few open files", most=self.most)
        self.head_seconds = head_seconds
        self.unread_seconds = unread_seconds
        self._most_unread = most_unread
        self._stalled: dict[Connection, Stall] = {}
        self.unread = 0
        """Bytes that stalled connections had not read when they stalled."""

    @property
    def stalled(self) -> int:
        """How many connections wait for their readers."""
        return len(self._stalled)

    def stalls(self, connection: "Connection", unread: int) -> None:
        """Note that a connection's reader has left so much of its answer."""
        self._stalled[connection] = Stall(unread, time.monotonic())
        self.unread += unread

    def goes_on(self, connection: "Connection") -> None:
        stall = self._stalled.pop(connection, None)
        if stall is not None:
            self.unread -= stall.unread

    async def wait_room(self, *, large: bool) -> None:
        """Wait until there is room for more answers; large ones leave half of it to others.

        Readers slower than others are cut, if that is what it takes.
        """
        most = self._most_unread // 2 if large else self._most_unread
        while self.unread > most:
            now = time.monotonic()
            settled = [one for one, stall in self._stalled.items() if now - stall.at > _FAIR_SECONDS]
            if settled:
                min(settled, key=self._bytes_per_second).cut("others wait, and it reads its answer slowly")
            await asyncio.sleep(_LOOK_AGAIN)

    def _bytes_per_second(self, connection: "Connection") -> float:
        stall = self._stalled[connection]
        read = stall.unread - connection.transport.get_write_buffer_size()
        return read / (time.monotonic() - stall.at)


class Stall(NamedTuple):
    """What a reader left, and when."""

    unread: int
    at: float


def _files() -> int:
    """How many files this process may have open, once it has asked for all that it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class Connection(HttpToolsProtocol):
    """One client. What follows a chunked body in the place of headers is dropped: uvicorn would keep all of it."""

    def __init__(self, *args: Any, connections: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shared = connections
        self._reads_head = False
        self._head_bytes = 0
        self._head_timer: TimerHandle | None = None
        self._unread_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_UNNOTICED)
        if len(self.connections) > self._shared.most:
            self._end_with(last_words(unavailable("Too many connections are open")))
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._stop_head_timer()
        self._reader_goes_on()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads_head = True
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reads_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._reads_head:
            self._head_bytes += len(data)
            if self._head_bytes > LARGEST_HEAD:
                self.send_400_response("The head of the request is too long")
                return
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._reads_head:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(self._shared.head_seconds, self._head_takes_too_long)
        elif self.timeout_keep_alive_task is None and self._answered:
            self._wait_for_request()

    def send_400_response(self, msg: str) -> None:
        self._end_with(last_words(invalid(msg)))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self._shared.unread_seconds, self.cut, "its answer was not read")
        self._shared.stalls(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_goes_on()

    def cut(self, why: str) -> None:
        """End the connection, with what its client has not read."""
        _log.warning("connection cut", reason=why)
        self.transport.abort()

    @property
    def _answered(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn does not say that there is none at first
        return cycle is None or cycle.response_complete

    def _wait_for_request(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _head_takes_too_long(self) -> None:
        if self._answered:
            self._end_with(
                last_words(too_slow(f"The head of the request did not arrive within {self._shared.head_seconds:g} s"))
            )
        else:
            self.cycle.keep_alive = False  # the request before it is answered first

    def _end_with(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _reader_goes_on(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        self._shared.goes_on(self)
