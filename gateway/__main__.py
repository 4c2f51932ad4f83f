"""The gateway process: settings → connections → application → server. ``python -m gateway``."""

import asyncio
import socket
from functools import partial

import structlog
import uvicorn
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from gateway.app import create_app
from gateway.auth import Authenticator, batch_authenticator, project_authenticator
from gateway.dispatch import KafkaDispatcher
from gateway.queries import MongoReadModels
from gateway.routes.operations import Lifecycle
from gateway.server import BACKLOG, KEEP_ALIVE, SEND_BUFFER, Connection, Connections, Server
from gateway.settings import GatewaySettings
from shared.mongo import open_mongo
from shared.process import configure_logging, run_process
from shared.settings import KafkaSettings, MongoSettings

_log = structlog.get_logger("gateway")


async def main(
    settings: GatewaySettings, project_callers: Authenticator, batch_callers: Authenticator, listener: socket.socket
) -> None:
    """Serve until cancelled; then end what runs, and only then let go of Kafka and MongoDB."""
    lifecycle = Lifecycle()
    connections = Connections(most=settings.gateway_max_connections, most_unread=settings.gateway_max_unread_bytes)
    async with open_mongo(MongoSettings()) as mongo, asyncio.TaskGroup() as tasks:
        read_models = MongoReadModels(mongo, connections.wait_room)
        dispatcher = KafkaDispatcher(
            KafkaSettings(),
            max_in_flight=settings.gateway_max_in_flight,
            max_in_flight_bytes=settings.gateway_max_in_flight_bytes,
            latency_target=settings.gateway_write_latency,
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
        server = Server(
            uvicorn.Config(
                app,
                http=partial(Connection, connections=connections),  # type: ignore[arg-type]  # it is only called
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=settings.gateway_stop_seconds,
            ),
            listener,
        )
        tasks.create_task(read_models.run())
        tasks.create_task(dispatcher.run())
        serving = tasks.create_task(server.serve())
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            _log.info("stopping")
            lifecycle.stopping = True
            await server.let_go(settings.gateway_drain_seconds)
            server.should_exit = True
            await serving
            raise


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
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    _log.info("listening", host=host, port=listener.getsockname()[1])
    return listener


if __name__ == "__main__":
    configure_logging("gateway")
    told = _told()
    if told[0].auth_disabled:
        _log.warning("AUTH_DISABLED: EVERYBODY MAY READ AND WRITE EVERYTHING. Never run this where others can reach it")
    run_process(lambda: main(*told))
