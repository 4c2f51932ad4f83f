"""The application: its routes, its error answers, and the layer around all requests. No I/O.

Paths are matched raw, so that ``%2F`` is part of a name and no border between two. Endpoints decode their parts.
"""

import re
from collections.abc import Sequence
from urllib.parse import quote

import msgspec
import structlog
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import openapi
from gateway.auth import Authenticator
from gateway.dispatch import CommandTooLarge, Dispatcher, NoReply, OutcomeUnknown
from gateway.entities import EntityExtractor, WordListExtractor
from gateway.exchange import Bodies, json_answer, route
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

_TOO_LONG = invalid(f"The query must be at most {LONGEST_QUERY} bytes")

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
    routes = [*projects.routes(), *batches.routes(), *operations.routes(), *_pages()]
    return Edge(routes, lifecycle, Brake(settings.gateway_refusal_seconds))


def _pages() -> Sequence[Route]:
    """The OpenAPI document, and that for people."""
    document = msgspec.json.encode(openapi.document())
    page = get_swagger_ui_html(openapi_url=DOCUMENT, title="Episodes")

    async def for_programs(_: Request) -> Response:
        return json_answer(document)

    async def for_people(_: Request) -> Response:
        return Response(page.body, media_type="text/html")

    return [route(DOCUMENT, for_programs), route("/docs", for_people)]


class Edge:
    """Around every request: the raw path, an id, headers for browsers, answers to errors, and good-bye.

    The only layer between server and routes. Starlette's application has three, and each costs every request something.
    """

    def __init__(self, routes: Sequence[Route], lifecycle: Lifecycle, brake: Brake) -> None:
        self._routes = routes
        self._router = Router(routes, redirect_slashes=False)
        self._lifecycle = lifecycle
        self._brake = brake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        request_id = _request_id(scope)
        raw_path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        scope["path"] = raw_path.decode("latin-1")
        scope["app"] = self  # inside an application Starlette's routes raise what they cannot serve
        begun = False

        async def send_marked(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] += ((b"x-request-id", request_id.encode()), *ON_EVERY_ANSWER)
                if self._lifecycle.stopping:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            if len(scope["query_string"]) > LONGEST_QUERY:
                await render(_TOO_LONG, request_id)(scope, receive, send_marked)
                return
            await self._router(scope, receive, send_marked)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - a request ends here, and what is no answer is reported
            problem = None if begun else self._problem_of(error, scope)
            if problem is None:
                _log.exception("a bug", request_id=request_id, method=scope["method"], path=scope["path"])
                problem = Problem("internal_error", "Something went wrong here")
            error.__traceback__ = None  # its frames hold the body, and this one holds it
            if not begun:
                await self._brake_for(error, problem)
                await render(problem, request_id)(scope, receive, send_marked)

    async def _brake_for(self, error: Exception, problem: Problem) -> None:
        if problem.code == "rate_limited" or isinstance(error, TooMany):
            await self._brake.hold()

    def _problem_of(self, error: Exception, scope: Scope) -> Problem | None:
        """How an error is answered; None for a bug."""
        match error:
            case Problem():
                return error
            case EpisodesError():
                return problem_of(error)
            case HTTPException(status_code=404):
                return Problem("not_found", "There is nothing at this path")
            case HTTPException(status_code=405):
                allowed = ", ".join(sorted(self._allowed(scope)))
                return Problem("method_not_allowed", f"Only {allowed} can be done here", headers={"Allow": allowed})
            case _:
                return None

    def _allowed(self, scope: Scope) -> set[str]:
        """The methods of all routes at this path; each route knows its own only."""
        there = (route for route in self._routes if route.matches(scope)[0] is not Match.NONE)
        return {method for route in there for method in route.methods or ()}


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _SANE_REQUEST_ID.fullmatch(given):
                return given
    return new_request_id()


def problem_of(error: EpisodesError) -> Problem | None:
    """How an error of ours is answered: each type is one action. None for one that should not have come here."""
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
            return None
