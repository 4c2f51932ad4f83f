"""What every client asked and was answered, and when: one NDJSON line per call, and the same in memory."""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

Outcome = Literal["ok", "refused", "unknown"]
"""``refused`` is every answer that says that nothing happened; ``unknown`` is one that does not say, or none."""

_ANSWER_HEADERS = ("x-event-id", "x-stream", "idempotency-replayed", "x-projected", "x-request-id", "retry-after")


class Operation(Struct, kw_only=True):
    """One call of one client."""

    number: int
    """1, 2, 3 … in the whole history, in the order in which the calls began."""
    client: int
    kind: str
    """``upsert patch delete restore record get get_item list``; ``invalid`` and ``forbidden`` are asked on purpose."""
    stream: str
    """Whose state the answer depends on: ``namespace:<slug>`` or ``tenant:<tenant_id>``."""
    user: str
    """Whose token it was: his own namespace is the one with this slug. Empty on the batch API."""
    began: float
    """Monotonic seconds."""
    ended: float
    method: str
    url: str
    """Of the gateway that was asked."""
    path: str
    """With the query, percent-encoded."""
    headers: dict[str, str]
    """Those that matter, in lower case; never the Authorization."""
    body: Raw | UnsetType = UNSET
    status: int | None = None
    """None: there was no answer."""
    answer_headers: dict[str, str] = {}
    answer: Raw | UnsetType = UNSET
    """The answer's body, JSON; a JSON string if it was none."""
    outcome: Outcome = "unknown"
    connection: str = ""
    """Names the TCP connection: what came over one connection came from one process."""
    error: str = ""
    """What broke the call, if there was no answer."""

    @property
    def event_id(self) -> int | None:
        """X-Event-Id of the answer."""
        text = self.answer_headers.get("x-event-id")
        return None if text is None else int(text)

    @property
    def min_event_id(self) -> int | None:
        """X-Min-Event-Id of the request."""
        text = self.headers.get("x-min-event-id")
        return None if text is None else int(text)

    @property
    def asked(self) -> Any:
        """The request's body, decoded."""
        return None if self.body is UNSET else msgspec.json.decode(self.body)

    @property
    def answered(self) -> Any:
        """The answer's body, decoded."""
        return None if self.answer is UNSET else msgspec.json.decode(self.answer)


class History:
    """Appends finished calls to a file, and keeps them."""

    def __init__(self, path: Path) -> None:
        self.run = secrets.token_hex(16)
        """Names this history: it stands in every call's trace context, and so in the record of its command."""
        self.operations: list[Operation] = []
        self._numbers = itertools.count(1)
        self._connections = itertools.count(1)
        self._file = path.open("wb", buffering=0)

    def next_number(self) -> int:
        """The number of a call that begins."""
        return next(self._numbers)

    def next_connection(self) -> int:
        """A name for a connection that was not seen before."""
        return next(self._connections)

    def traceparent(self, number: int) -> str:
        """The trace context of a call, by which its command is found."""
        return f"00-{self.run}-{number:016x}-01"

    def append(self, operation: Operation) -> None:
        """Note a call that has ended, with or without an answer."""
        self._file.write(msgspec.json.encode(operation) + b"\n")
        self.operations.append(operation)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> Sequence[Operation]:
        """The calls in a file, in the order in which they ended. A last line that was cut off is left out."""
        decode = msgspec.json.Decoder(Operation).decode
        lines = path.read_bytes().split(b"\n")
        operations = [decode(line) for line in lines[:-1]]
        with suppress(msgspec.DecodeError):
            operations.append(decode(lines[-1]))
        return operations


def outcome_of(method: str, status: int | None, answer: Any) -> Outcome:
    """What an answer says about what happened."""
    if status is None:
        return "unknown"
    if status < 300:
        return "ok"
    if method != "GET" and (status in {500, 502, 504} or (isinstance(answer, dict) and "command_id" in answer)):
        return "unknown"
    return "refused"


def kept_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an answer that are noted."""
    return {name: headers[name] for name in _ANSWER_HEADERS if name in headers}


def as_raw(body: bytes) -> Raw:
    """The body as JSON, whatever it is."""
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Raw(msgspec.json.encode(body.decode(errors="replace")))
    return Raw(body)
