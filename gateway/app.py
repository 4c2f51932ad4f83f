"""The application: its routes, its error answers, and the layer around all requests. No I/O.

Paths are matched raw, so that ``%2F`` is part of a name and no border between two. Endpoints decode their parts.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import structlog
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import openapi
from gateway.auth import Authenticator
from gateway.dispatch import CommandTooLarge, Dispatcher, NoReply, OutcomeUnknown
from gateway.entities import EntityExtractor, WordListExtractor
from gateway.exchange import Bodies, json_answer
from gateway.limits import Brake, ShareExceeded, TooMany
from gateway.problems import ON_EVERY_ANSWER, Problem, invalid, new_request_id, rate_limited, render, unavailable
from gateway.queries import PageTooLarge, ReadModels
from gateway.rates import RateLimitedAuthenticator
from gateway.reads import Reads
from gateway.routes.batches import BatchRoutes
from gateway.routes.operations import Lifecycle, OperationRoutes
from gateway.routes.projects import ProjectRoutes
from gateway.settings import GatewaySettings
from gateway.writes import Writes
from shared.errors import EpisodesError, Unavailable

LONGEST_QUERY = 16 * 1024
"""Bytes: more than all parameters at their longest, and few enough to be parsed in no time."""

DOCUMENT = "/openapi.json"

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")

_log = structlog.get_logger(__name__)


def create_app(
    *,
    dispatcher: Dispatcher,
    read_models: ReadModels,
    project_callers: Authenticator,
    batch_callers: Authenticator,
    settings: GatewaySettings,
    lifecycle: Lifecycle,
    extractor: EntityExtractor | None = None,
) -> ASGIApp:
    """Both APIs, and what operators ask."""
    bodies = Bodies(settings.gateway_max_in_flight_bytes, settings.gateway_body_seconds)
    reads = Reads(read_models, most=settings.gateway_max_reads, remembered=settings.gateway_remembered_streams)
    writes = Writes(dispatcher, reads)
    patience = settings.gateway_min_event_wait
    if settings.gateway_rate_limit is not None:
        project_callers = RateLimitedAuthenticator(project_callers, settings.gateway_rate_limit)
        batch_callers = RateLimitedAuthenticator(batch_callers, settings.gateway_rate_limit)
    operations = OperationRoutes(lifecycle, kafka=dispatcher, mongodb=read_models)
    projects = ProjectRoutes(project_callers, bodies, writes, reads, patience=patience)
    extractor = extractor or WordListExtractor()
    batches = BatchRoutes(batch_callers, bodies, writes, reads, extractor=extractor, patience=patience)
    handlers: dict[Any, Any] = {
        EpisodesError: _answer_error,
        Problem: _answer_problem,
        HTTPException: _answer_http_exception,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_bug,
    }
    app = Starlette(
        routes=[*projects.routes(), *batches.routes(), *operations.routes(), *_pages()],
        exception_handlers=handlers,
    )
    app.router.redirect_slashes = False
    app.state.brake = Brake(settings.gateway_refusal_seconds)
    return Edge(app, lifecycle)


def _pages() -> Sequence[Route]:
    """The OpenAPI document, and that for people."""
    document = msgspec.json.encode(openapi.document())
    page = get_swagger_ui_html(openapi_url=DOCUMENT, title="Episodes")

    async def for_programs(_: Request) -> Response:
        return json_answer(document)

    async def for_people(_: Request) -> Response:
        return Response(page.body, media_type="text/html")

    return [Route(DOCUMENT, for_programs), Route("/docs", for_people)]


class Edge:
    """Around every request: the raw path, an id, headers for browsers, the one log line for a bug, and good-bye."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        raw_path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        scope["path"] = raw_path.decode("latin-1")

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += ((b"x-request-id", request_id.encode()), *ON_EVERY_ANSWER)
                if self._lifecycle.stopping:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        if len(scope["query_string"]) > LONGEST_QUERY:
            too_long = invalid(f"The query must be at most {LONGEST_QUERY} bytes")
            await render(too_long, request_id)(scope, receive, send_marked)
            return
        try:
            await self._app(scope, receive, send_marked)
        except Exception:  # noqa: BLE001 - answered by `_answer_bug` already; a request ends here, and that is reported
            _log.exception("a bug", request_id=request_id, method=scope["method"], path=scope["path"])


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _SANE_REQUEST_ID.fullmatch(given):
                return given
    return new_request_id()


def problem_of(error: EpisodesError) -> Problem:
    """How an error of ours is answered: each type is one action."""
    match error:
        case OutcomeUnknown():
            return unavailable(str(error), members={"command_id": error.command_id})
        case Unavailable():
            return unavailable(str(error))
        case ShareExceeded():
            return rate_limited(str(error))
        case NoReply():
            return Problem("timeout", str(error), members={"command_id": error.command_id})
        case CommandTooLarge() | PageTooLarge():
            return Problem("payload_too_large", str(error))
        case _:
            raise error


_Handler = Callable[[Request, Any], Awaitable[Response]]


async def _answer_error(request: Request, error: EpisodesError) -> Response:
    if isinstance(error, TooMany):
        await request.app.state.brake.hold()
    return await _answer_problem(request, problem_of(error))


async def _answer_problem(request: Request, problem: Problem) -> Response:
    if problem.code == "rate_limited":
        await request.app.state.brake.hold()
    return render(problem, request.state.request_id)


async def _answer_http_exception(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:  # noqa: PLR2004 - the status
        allowed = ", ".join(sorted(_allowed(request)))
        problem = Problem("method_not_allowed", f"Only {allowed} can be done here", headers={"Allow": allowed})
    elif error.status_code == 404:  # noqa: PLR2004 - the status
        problem = Problem("not_found", "There is nothing at this path")
    else:
        raise error
    return render(problem, request.state.request_id)


def _allowed(request: Request) -> set[str]:
    """The methods of all routes at this path; each route knows its own only."""
    methods: set[str] = set()
    for route in request.app.router.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods
    return methods


async def _answer_nobody(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # the client has gone: nobody gets this


async def _answer_bug(request: Request, _error: Exception) -> Response:
    return render(Problem("internal_error", "Something went wrong here"), request.state.request_id)
