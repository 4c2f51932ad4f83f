"""Bodies → commands: what is required, what is allowed, and the sentence for what is not.

The first field that fails is the one that is told, in the order of the API's documents.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.entities import MAX_PER_ITEM, EntityExtractor, EntityFinder, Mention
from gateway.problems import invalid
from shared.commands import NO_METADATA, EpisodeFields, EpisodeItem, EpisodeStatus, ItemError

MAX_ITEMS: Final = 1_000
MAX_CONTENT_BYTES: Final = 102_400
MAX_NAME: Final = 255
MAX_FOLDERS: Final = 32
MAX_DEPTH: Final = 500
"""Levels of arrays and objects in metadata: well below what any JSON parser on the way stops at."""
STATUSES: Final[Mapping[str, EpisodeStatus]] = {
    "running": "running",
    "completed": "completed",
    "failed": "failed",
    "archived": "archived",
}

Body = Mapping[str, Any]
T = TypeVar("T")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_WORD = re.compile(r"[a-z0-9_-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_TIMESTAMP = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII | re.IGNORECASE
)

NAME_RULE: Final = "must be 1 to 255 characters, not blank, without control characters, and not '.' or '..'"
_LABEL_RULE: Final = "must be 1 to 255 characters, not blank, without control characters"
_FOLDER_RULE: Final = (
    "must be a path of at most 32 segments, each of at most 255 characters, "
    "not blank, not '.' or '..', without ',' and control characters"
)
_ENTITIES_RULE: Final = (
    f"must be a list of at most {MAX_PER_ITEM} objects with a name and a type, strings of 1 to 255 characters"
)
_TIMESTAMP_RULE: Final = "must be a date and time in ISO 8601"
_DEPTH_RULE: Final = f"must not nest deeper than {MAX_DEPTH} levels"


def is_label(text: str) -> bool:
    """Whether the text can name something: a tenant, an entity."""
    return 0 < len(text) <= MAX_NAME and not text.isspace() and not _CONTROL.search(text)


def is_name(text: str) -> bool:
    """Whether the text can be a slug or an episode's name, so also one segment of a URL."""
    return is_label(text) and text not in {".", ".."}


def is_idempotency_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def as_object(body: Any) -> Body:
    """The body as an object.

    Raises:
        Problem: 400, it is something else.
    """
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object")
    return body


# --- A: projects


def upsert_episode(body: Body) -> tuple[str, EpisodeFields]:
    """The episode's name and what is said about it.

    Raises:
        Problem: 400, the first field that is wrong.
    """
    if body.get("name") is None:
        raise invalid("Field 'name' is required")
    name = _name(body["name"])
    description = _take(body, "description", _description)
    tags = _take(body, "tags", _tags)
    folder = _take(body, "folder", _folder)
    write_protected = _take(body, "writeProtected", _write_protected)
    metadata = _take(body, "metadata", _metadata)
    status = _take(body, "status", _status)
    return name, EpisodeFields(
        description=description,
        tags=tags,
        folder=folder,
        write_protected=write_protected,
        status=status,
        metadata=metadata,
    )


def patch_episode(body: Body) -> tuple[str | UnsetType, EpisodeFields]:
    """The new name, if there is one, and the other changes.

    Raises:
        Problem: 400, the first field that is wrong.
    """
    name = _take(body, "name", _name)
    description = _take(body, "description", _description)
    tags = _take(body, "tags", _tags)
    status = _take(body, "status", _status)
    write_protected = _take(body, "writeProtected", _write_protected)
    folder = _take(body, "folder", _folder)
    metadata = _take(body, "metadata", _metadata)
    return name, EpisodeFields(
        description=description,
        tags=tags,
        folder=folder,
        write_protected=write_protected,
        status=status,
        metadata=metadata,
    )


def _take(body: Body, key: str, read: Callable[[Any], T]) -> T | UnsetType:
    return read(body[key]) if key in body else UNSET


def _name(value: Any) -> str:
    if isinstance(value, str) and is_name(value):
        return value
    raise invalid(f"Field 'name' {NAME_RULE}")


def _description(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise invalid("Field 'description' must be a string or null")


def _tags(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return tuple(value)
    raise invalid("Field 'tags' must be a list of strings")


def _folder(value: Any) -> str | None:
    """The path as ``/a/b``, or `None` for the root."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid("Field 'folder' must be a string or null")
    segments = [segment for segment in value.split("/") if segment]
    if len(segments) > MAX_FOLDERS or not all(is_name(segment) and "," not in segment for segment in segments):
        raise invalid(f"Field 'folder' {_FOLDER_RULE}")
    return "/" + "/".join(segments) if segments else None


def _write_protected(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise invalid("Field 'writeProtected' must be true or false")


def _status(value: Any) -> EpisodeStatus:
    if isinstance(value, str) and value in STATUSES:
        return STATUSES[value]
    raise invalid(f"Field 'status' must be one of {', '.join(STATUSES)}")


def _metadata(value: Any) -> Raw:
    if value is None:
        return NO_METADATA
    if not isinstance(value, dict):
        raise invalid("Field 'metadata' must be an object or null")
    text = _json(value)
    if text is None:
        raise invalid(f"Field 'metadata' {_DEPTH_RULE}")
    return text


def _json(value: Any) -> Raw | None:
    """JSON text, or `None` if it nests too deeply."""
    try:
        text = msgspec.json.encode(value)
    except RecursionError:
        return None
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        return None
    return Raw(text)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


# --- B: batches


class Batch(NamedTuple):
    """A batch, its items sorted into those that are recorded and those that are not."""

    tenant_id: str
    namespace: str | None
    items: tuple[EpisodeItem, ...]
    errors: tuple[ItemError, ...]


def record_episodes(body: Body, extractor: EntityExtractor) -> Batch:
    """The batch.

    Raises:
        Problem: 400, the envelope is wrong and nothing is recorded.
    """
    tenant_id = tenant(body.get("tenant_id"), "Field 'tenant_id'")
    namespace = body.get("namespace")
    if namespace is not None and not (isinstance(namespace, str) and len(namespace) <= MAX_NAME):
        raise invalid("Field 'namespace' must be a string of at most 255 characters")
    episodes = body.get("episodes")
    if episodes is None:
        raise invalid("Field 'episodes' is required")
    if not isinstance(episodes, list) or not 0 < len(episodes) <= MAX_ITEMS:
        raise invalid(f"Field 'episodes' must be a list of 1 to {MAX_ITEMS} objects")
    items: list[EpisodeItem] = []
    errors: list[ItemError] = []
    finder = EntityFinder(extractor, tenant_id, len(episodes))
    for index, episode in enumerate(episodes):
        try:
            items.append(_item(episode, finder))
        except _Unfit as unfit:
            code, message = unfit.args
            errors.append(ItemError(index, code, message))
    return Batch(tenant_id, namespace, tuple(items), tuple(errors))


def tenant(value: Any, what: str) -> str:
    """The tenant's id. ``what`` says where it was to be found.

    Raises:
        Problem: 400, it is missing or none.
    """
    if value is None:
        raise invalid(f"{what} is required")
    if isinstance(value, str) and is_label(value):
        return value
    raise invalid(f"{what} {_LABEL_RULE}")


class _Unfit(Exception):
    """Code and message of an item's error."""


def _unfit(field: str, rule: str) -> _Unfit:
    return _Unfit("validation_error", f"Field '{field}' {rule}")


def _item(episode: Any, finder: EntityFinder) -> EpisodeItem:
    if not isinstance(episode, dict):
        raise _Unfit("validation_error", "An episode must be an object")
    get = episode.get
    kind = get("type")
    if kind is None:
        kind = "message"
    elif not (isinstance(kind, str) and _WORD.fullmatch(kind)):
        raise _unfit("type", "must be a word of 1 to 64 characters out of a-z, 0-9, '_' and '-'")
    content = _content(get("content"))
    source, author, channel = (_short(get(field), field) for field in ("source", "author", "channel"))
    timestamp = get("timestamp")
    at: datetime | UnsetType = UNSET if timestamp is None else _timestamp(timestamp)
    metadata = get("metadata")
    if metadata is None:
        metadata = {}
    elif not isinstance(metadata, dict):
        raise _unfit("metadata", "must be an object")
    text = _json(metadata)
    if text is None:
        raise _unfit("metadata", _DEPTH_RULE)
    given = get("entities")
    mentions = () if given is None else _mentions(given)
    key = get("idempotency_key")
    if key is not None and not (isinstance(key, str) and is_idempotency_key(key)):
        raise _unfit("idempotency_key", "must be a string of 1 to 255 visible ASCII characters")
    return EpisodeItem(
        content=content,
        type=kind,
        source=source,
        author=author,
        channel=channel,
        timestamp=at,
        metadata=text,
        entities=finder.entities(mentions, content),
        idempotency_key=key,
    )


def _content(value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _unfit("content", "is required")
    if not isinstance(value, str):
        raise _unfit("content", "must be a string")
    if len(value) * 4 > MAX_CONTENT_BYTES and len(value.encode()) > MAX_CONTENT_BYTES:
        raise _Unfit("payload_too_large", f"Field 'content' must be at most {MAX_CONTENT_BYTES} bytes of UTF-8")
    return value


def _short(value: Any, field: str) -> str | None:
    if value is None or (isinstance(value, str) and len(value) <= MAX_NAME):
        return value
    raise _unfit(field, "must be a string of at most 255 characters")


def _timestamp(value: Any) -> datetime:
    """In UTC, cut to milliseconds."""
    if not (isinstance(value, str) and _TIMESTAMP.fullmatch(value)):
        raise _unfit("timestamp", _TIMESTAMP_RULE)
    try:
        at = datetime.fromisoformat(value.upper())
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise _unfit("timestamp", _TIMESTAMP_RULE) from None
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


def _mentions(value: Any) -> Sequence[Mention]:
    if not isinstance(value, list) or len(value) > MAX_PER_ITEM:
        raise _unfit("entities", _ENTITIES_RULE)
    mentions = []
    for entity in value:
        name, kind = (entity.get("name"), entity.get("type")) if isinstance(entity, dict) else (None, None)
        if not (isinstance(name, str) and is_label(name) and isinstance(kind, str) and is_label(kind)):
            raise _unfit("entities", _ENTITIES_RULE)
        mentions.append(Mention(kind, name))
    return mentions
