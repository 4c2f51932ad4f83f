"""The gateway process: settings → connections → application → server. ``python -m gateway``."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import structlog
import uvicorn
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.app import create_app
from gateway.auth import Authenticator, batch_authenticator, project_authenticator
from gateway.dispatch import KafkaDispatcher
from gateway.problems import malformed_http
from gateway.queries import MongoReadModels
from gateway.routes.operations import Lifecycle
from gateway.settings import GatewaySettings
from shared.mongo import open_mongo
from shared.process import configure_logging, run_process
from shared.settings import KafkaSettings, MongoSettings

_LARGEST_HEAD = 64 * 1024
_BACKLOG = 2048
_KEEP_ALIVE = 75
_LOOK_AGAIN = 0.05

_log = structlog.get_logger("gateway")


async def main(
    settings: GatewaySettings, project_callers: Authenticator, batch_callers: Authenticator, listener: socket.socket
) -> None:
    """Serve until cancelled; then end what runs, and only then let go of Kafka and MongoDB."""
    lifecycle = Lifecycle()
    async with open_mongo(MongoSettings()) as mongo, asyncio.TaskGroup() as tasks:
        read_models = MongoReadModels(mongo)
        dispatcher = KafkaDispatcher(
            KafkaSettings(),
            max_in_flight=settings.gateway_max_in_flight,
            max_in_flight_bytes=settings.gateway_max_in_flight_bytes,
            reply_timeout=settings.gateway_reply_timeout,
        )
        app = create_app(
            dispatcher=dispatcher,
            read_models=read_models,
            project_callers=project_callers,
            batch_callers=batch_callers,
            settings=settings,
            lifecycle=lifecycle,
        )
        server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=settings.gateway_stop_seconds,
            )
        )
        tasks.create_task(read_models.run())
        tasks.create_task(dispatcher.run())
        serving = tasks.create_task(server.serve([listener]))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            _log.info("stopping")
            lifecycle.stopping = True
            await server.let_go(listener, settings.gateway_drain_seconds)
            server.should_exit = True
            await serving
            raise


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `run_process` handles them

    async def let_go(self, listener: socket.socket, seconds: float) -> None:
        """Accept nobody new, and give those that are connected some time to hear that they must close.

        uvicorn alone would drop whoever waits to be accepted, and a request that has arrived but is not read yet.
        """
        loop = asyncio.get_running_loop()
        listener = listener.dup()
        for server in self.servers:
            server.close()
        with listener, contextlib.suppress(BlockingIOError):
            listener.settimeout(0)
            while True:
                connection, _ = listener.accept()
                await loop.connect_accepted_socket(self._protocol, connection)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.server_state.connections:  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(_LOOK_AGAIN)

    def _protocol(self) -> asyncio.Protocol:
        return _Protocol(self.config, self.server_state, self.lifespan.state)


class _Protocol(HttpToolsProtocol):
    """uvicorn's own, with a limit for the head of a request and our shape for the answer to what is no HTTP.

    What follows a chunked body in the place of headers is dropped: uvicorn would keep it, however much it is.
    """

    _reads_head = False
    _head_bytes = 0

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reads_head = True
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reads_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reads_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._reads_head:
            self._head_bytes += len(data)
            if self._head_bytes > _LARGEST_HEAD:
                self.send_400_response("The head of the request is too long")
                return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(malformed_http(msg))
        self.transport.close()


def _told() -> tuple[GatewaySettings, Authenticator, Authenticator, socket.socket]:
    """The settings and what follows from them, or the end of the process with one sentence that says what is wrong."""
    try:
        settings = GatewaySettings()
        return settings, project_authenticator(settings), batch_authenticator(settings), _listen(settings)
    except ValidationError as error:
        reason = "; ".join(map(_sentence, error.errors()))
    except (SettingsError, OSError, ValueError) as error:
        reason = str(error)
    raise SystemExit(f"python -m gateway: {reason}")


def _sentence(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"])).upper()
    return (f"{where}: " if where else "") + error["msg"].removeprefix("Value error, ")


def _listen(settings: GatewaySettings) -> socket.socket:
    host, port = settings.gateway_host, settings.gateway_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    _log.info("listening", host=host, port=listener.getsockname()[1])
    return listener


if __name__ == "__main__":
    configure_logging("gateway")
    told = _told()
    if told[0].auth_disabled:
        _log.warning("AUTH_DISABLED: EVERYBODY MAY READ AND WRITE EVERYTHING. Never run this where others can reach it")
    run_process(lambda: main(*told))
