"""/healthz and /readyz for the processes that have no API of their own."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


@dataclass
class Status:
    """What a process says of itself. Ready means: nothing is waited for, and every partition of ours runs."""

    waiting_for: dict[str, str] = field(default_factory=dict)
    """What is not there yet → how that shows."""
    partitions: dict[int, str] = field(default_factory=dict)
    """Partition of ours → ``running``, or what it is doing instead."""

    details: dict[str, object] = field(default_factory=dict)
    """What else a person may want to know, whether ready or not."""

    RUNNING = "running"

    @property
    def ready(self) -> bool:
        return not self.waiting_for and all(state == self.RUNNING for state in self.partitions.values())

    def report(self) -> dict[str, object]:
        """The body of /readyz."""
        return {
            "ready": self.ready,
            "waiting_for": self.waiting_for,
            "partitions": {str(number): state for number, state in sorted(self.partitions.items())},
            **self.details,
        }


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process handles its signals


async def serve_probes(status: Status, *, host: str, port: int) -> None:
    """Answer /healthz (alive) and /readyz (200 when ready, else 503 with what is missing) until cancelled."""

    async def healthz(_: Request) -> JSONResponse:
        return JSONResponse({"status": "alive"})

    async def readyz(_: Request) -> JSONResponse:
        return JSONResponse(status.report(), 200 if status.ready else 503)

    app = Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz)])
    await _Server(uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False, lifespan="off")).serve()
