"""Error answers: ``application/problem+json`` (RFC 9457), with the same sentence where other clients look for it."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
import uuid_utils
from starlette.responses import Response

from shared.receipts import CommandRefused

MEDIA_TYPE: Final = "application/problem+json"

ON_EVERY_ANSWER: Final = (
    (b"cache-control", b"private, no-cache"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)
"""Headers for browsers: what a body is, nobody guesses; nobody shows it in a frame, or uses it again without asking."""

CODES: Final[Mapping[int, tuple[str, ...]]] = {
    400: ("validation_error",),
    401: ("unauthorized",),
    403: ("forbidden", "write_protected"),
    404: ("not_found",),
    405: ("method_not_allowed",),
    408: ("request_timeout",),
    409: ("conflict",),
    410: ("gone",),
    413: ("payload_too_large",),
    415: ("unsupported_media_type",),
    422: ("idempotency_mismatch",),
    429: ("rate_limited",),
    500: ("internal_error",),
    503: ("unavailable",),
    504: ("timeout",),
}
"""The stable words that ``code`` can be, by HTTP status."""

_STATUS = {code: status for status, codes in CODES.items() for code in codes}


class Problem(Exception):
    """An error answer.

    Attributes:
        code: the stable word for programs; the status follows from it.
        detail: one sentence for the person who reads the answer.
        headers: what the answer needs beside its body.
        members: more keys of the body.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = _STATUS[code]
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = dict(members or {})


def invalid(detail: str) -> Problem:
    """The request is not one that this service understands."""
    return Problem("validation_error", detail)


def unauthorized(detail: str, *, error: str | None = None) -> Problem:
    """Nobody known asks. ``error`` is RFC 6750's word for what is wrong with the token, if there was one."""
    challenge = 'Bearer realm="episodes"' + (f', error="{error}"' if error else "")
    return Problem("unauthorized", detail, headers={"WWW-Authenticate": challenge})


def unavailable(
    detail: str, *, headers: Mapping[str, str] | None = None, members: Mapping[str, Any] | None = None
) -> Problem:
    """What is needed is away for now."""
    return Problem("unavailable", detail, headers={"Retry-After": "1", **(headers or {})}, members=members)


def rate_limited(detail: str, *, retry_after: int = 1) -> Problem:
    """This caller asks for too much. ``retry_after`` is in seconds."""
    return Problem("rate_limited", detail, headers={"Retry-After": str(retry_after)})


def too_slow(detail: str) -> Problem:
    """The request takes too long to arrive; the connection ends."""
    return Problem("request_timeout", detail, headers={"Connection": "close"})


def refusal(refused: CommandRefused) -> Problem:
    """The ingestor's no."""
    return Problem(refused.code, refused.detail)


def render(problem: Problem, request_id: str) -> Response:
    """The answer."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "error": problem.detail,
        "message": problem.detail,
        "code": problem.code,
        "request_id": request_id,
        **problem.members,
    }
    return Response(msgspec.json.encode(body), problem.status, problem.headers, MEDIA_TYPE)


def last_words(problem: Problem) -> bytes:
    """The whole answer on a connection that no application answers on; the connection ends with it."""
    answer = render(problem, new_request_id())
    status = HTTPStatus(problem.status)
    headers = [*answer.raw_headers, *ON_EVERY_ANSWER]
    if "Connection" not in problem.headers:
        headers.append((b"connection", b"close"))
    head = b"".join(b"%s: %s\r\n" % header for header in headers)
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() + head + b"\r\n" + bytes(answer.body)


def new_request_id() -> str:
    """An id for a request that came without one."""
    return str(uuid_utils.uuid7())
