"""What both APIs read from a request in the same way, and how their answers are put together."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.limits import Limit
from gateway.problems import Problem, invalid, too_slow
from gateway.requests import NAME_RULE, is_idempotency_key, is_name

MAX_BODY_BYTES: Final = 8 * 1024 * 1024
LONGEST_PATIENCE: Final = 30

_VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(?:-[\x21-\x7e]{1,128})?")
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*([0-9]{1,6})\s*(?:$|[,;])", re.IGNORECASE)


Handler = Callable[[Request], Awaitable[Response]]
"""Answers a request, or raises what `Edge` makes an answer of."""


def route(path: str, handle: Handler, *, methods: Sequence[str] = ("GET",)) -> Route:
    """A route straight to its handler: with a function Starlette puts a layer for errors of its own before it."""
    return Route(path, _Endpoint(handle), methods=methods)


class _Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handle(Request(scope, receive, send))
        await response(scope, receive, send)


class WriteOptions(NamedTuple):
    """What a write says beside its body."""

    idempotency_key: str | None
    wait_projected: bool
    traceparent: str | None


class ReadOptions(NamedTuple):
    """How fresh a read's answer must be."""

    min_event_id: int | None
    patience: float


class Bodies:
    """Reads bodies: each of at most `MAX_BODY_BYTES`, within so many seconds, and together of at most so many bytes."""

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self._bytes = Limit(most_bytes, "bytes of bodies")
        self._seconds = seconds

    async def json(self, request: Request, caller: str) -> Any:
        """The body, parsed.

        Raises:
            Problem: 408, 413, 415, or 400 for what is no JSON.
            Unavailable: too much is being received.
            ShareExceeded: too much is being received from this caller.
        """
        _check_content(request)
        taken = 0
        try:
            chunks = []
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    if taken + len(chunk) > MAX_BODY_BYTES:
                        raise _too_large()
                    self._bytes.take(caller, len(chunk))
                    taken += len(chunk)
                    chunks.append(chunk)
            return _parsed(b"".join(chunks))
        except TimeoutError:
            raise too_slow(f"The body did not arrive within {self._seconds:g} s") from None
        finally:
            self._bytes.give_back(caller, taken)


def _check_content(request: Request) -> None:
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]*)", parameters, re.IGNORECASE)
    if media_type.strip().lower() != "application/json" or (charset and charset[1].lower() not in {"utf-8", "utf8"}):
        raise Problem("unsupported_media_type", "Content-Type must be application/json in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem("unsupported_media_type", "Content-Encoding is not supported")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()


def _too_large() -> Problem:
    return Problem("payload_too_large", f"The body must be at most {MAX_BODY_BYTES} bytes")


def _parsed(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise invalid("The body is not valid UTF-8") from error
    except RecursionError as error:
        raise invalid("The body nests too deeply") from error
    except msgspec.DecodeError as error:
        raise invalid(f"The body is not valid JSON: {error}") from error


def path_text(request: Request, parameter: str) -> str:
    """A part of the path, decoded.

    Raises:
        Problem: 400, it is not UTF-8.
    """
    raw: str = request.path_params[parameter]
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise invalid(f"Path parameter '{parameter}' is not valid UTF-8") from None


def path_name(request: Request, parameter: str) -> str:
    """A slug or a name in the path.

    Raises:
        Problem: 400, it is none.
    """
    name = path_text(request, parameter)
    if not is_name(name):
        raise invalid(f"Path parameter '{parameter}' {NAME_RULE}")
    return name


def write_options(request: Request) -> WriteOptions:
    """What a write says beside its body.

    Raises:
        Problem: 400, some of it is wrong.
    """
    key = request.headers.get("idempotency-key")
    if key is not None:
        key = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
        if not is_idempotency_key(key):
            raise invalid("Header 'Idempotency-Key' must be 1 to 255 visible ASCII characters")
    wait = request.query_params.get("wait") if request.scope["query_string"] else None
    if wait not in {None, "projected"}:
        raise invalid("Query parameter 'wait' must be 'projected'")
    traceparent = request.headers.get("traceparent", "")
    return WriteOptions(key, wait is not None, traceparent if _TRACEPARENT.fullmatch(traceparent) else None)


def read_options(request: Request, patience: float) -> ReadOptions:
    """How fresh the answer must be. ``patience`` holds where the caller says nothing.

    Raises:
        Problem: 400, some of it is wrong.
    """
    event_id = request.headers.get("x-min-event-id")
    if event_id is None:
        return ReadOptions(None, patience)
    if not re.fullmatch("[0-9]{1,18}", event_id):
        raise invalid("Header 'X-Min-Event-Id' must be a whole number")
    wait = _WAIT.search(request.headers.get("prefer", ""))
    return ReadOptions(int(event_id), min(int(wait[1]), LONGEST_PATIENCE) if wait else patience)


def request_hash(request: Request, body: Any) -> str:
    """What makes two requests the same: method, path and parsed body, whatever the order of its keys.

    Raises:
        Problem: 400, the body nests too deeply.
    """
    path = [unquote_to_bytes(segment).hex() for segment in request.scope["path"].split("/")]
    try:
        text = msgspec.json.encode((request.method, path, body), order="sorted")
    except RecursionError:
        raise invalid("The body nests too deeply") from None
    return blake2b(text, digest_size=16).hexdigest()


def header_text(text: str) -> str:
    """Percent-encoded, but for visible ASCII: what may stand in a header."""
    return quote(text, safe=_VISIBLE)


def json_answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, "application/json")
