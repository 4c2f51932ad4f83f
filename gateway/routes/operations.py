"""Is it alive, is it ready."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.exchange import json_answer, route
from gateway.problems import invalid, unavailable

HEALTHZ = "/healthz"
READYZ = "/readyz"


class Dependency(Protocol):
    """Something that may be away."""

    @property
    def missing(self) -> str | None:
        """How that shows, or `None` when it is there."""


@dataclass
class Lifecycle:
    """Where the process is in its life."""

    stopping: bool = False


class OperationRoutes:
    """What a supervisor or a load balancer asks."""

    def __init__(self, lifecycle: Lifecycle, *, kafka: Dependency, mongodb: Dependency) -> None:
        self._lifecycle = lifecycle
        self._needed_for: dict[str | None, dict[str, Dependency]] = {
            None: {"kafka": kafka, "mongodb": mongodb},
            "writes": {"kafka": kafka},
            "reads": {"mongodb": mongodb},
        }

    def routes(self) -> Sequence[Route]:
        return [route(HEALTHZ, self.healthz), route(READYZ, self.readyz)]

    async def healthz(self, _: Request) -> Response:
        return json_answer(msgspec.json.encode({"status": "alive"}))

    async def readyz(self, request: Request) -> Response:
        needed = self._needed_for.get(request.query_params.get("for"))
        if needed is None:
            raise invalid("Query parameter 'for' must be 'writes' or 'reads'")
        waiting_for = {name: missing for name, it in needed.items() if (missing := it.missing) is not None}
        if self._lifecycle.stopping:
            waiting_for["gateway"] = "stopping"
        if waiting_for:
            detail = "; ".join(f"{name}: {missing}" for name, missing in waiting_for.items())
            raise unavailable(detail, members={"ready": False, "waiting_for": waiting_for})
        return json_answer(msgspec.json.encode({"ready": True, "waiting_for": waiting_for}))
