"""What no answer may do, however hostile the request: name what is inside, or lack the headers for browsers."""

import re
from collections.abc import Mapping

INTERNAL = re.compile(
    r"""Traceback|\bFile\ "|\bline\ \d+,\ in\b|\.py\b|site-packages|/venv/|object\ at\ 0x
    |\b(?:gateway|ingestor|projector|shared)\.[a-z_]+
    |\b(?:pymongo|motor|bson|aiokafka|msgspec|starlette|uvicorn|httptools|pydantic|structlog|lmdb|asyncio|jwt)\.
    |\b(?:Key|Value|Type|Attribute|Index|Runtime|Unicode\w*|Recursion|Overflow|OS|Assertion)Error\b
    |\bepisodes_(?:meta|g\d)|127\.0\.0\.1""",
    re.VERBOSE,
)
"""Stack traces, modules, types of exceptions, databases, addresses."""

_FOR_BROWSERS = {
    "cache-control": "private, no-cache",
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_NEVER = ("server", "x-powered-by", "set-cookie")


def assert_tells_nothing_internal(answer: str, sent: str = "") -> None:
    """Check an answer's text. What the caller sent may come back: ``sent`` is all of it."""
    found = INTERNAL.search(answer)
    assert found is None or found[0] in sent, f"an answer says {found[0]!r}: {answer[:1000]}"


def assert_headers_are_safe(headers: Mapping[str, str]) -> None:
    """Check an answer's headers, given with lower-case names."""
    for name, value in _FOR_BROWSERS.items():
        assert headers.get(name) == value, f"{name} is {headers.get(name)!r}"
    for name in headers:
        assert name not in _NEVER, f"{name}: {headers[name]}"
        assert not name.startswith("access-control-"), f"CORS is off, and yet {name}: {headers[name]}"
