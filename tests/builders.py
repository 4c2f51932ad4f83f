"""Commands with sensible defaults, so that a test names only what it is about."""

from itertools import count
from typing import Any

from msgspec import Raw

from shared.commands import (
    DeleteEpisode,
    EpisodeFields,
    EpisodeItem,
    PatchEpisode,
    RecordEpisodes,
    RestoreEpisode,
    UpsertEpisode,
)
from shared.ids import CommandId

_numbers = count(1)


def command_id() -> CommandId:
    return CommandId(f"00000000-0000-7000-8000-{next(_numbers):012d}")


def _common(named: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "command_id": command_id(),
        "actor": "alice",
        "request_hash": "hash",
        "namespace": "alice",
        "project": "robotics",
        "name": name,
        "owner": True,
    } | named


def upsert(name: str = "run-1", fields: EpisodeFields | None = None, **named: Any) -> UpsertEpisode:
    return UpsertEpisode(fields=fields or EpisodeFields(), **_common(named, name))


def patch(name: str = "run-1", fields: EpisodeFields | None = None, **named: Any) -> PatchEpisode:
    return PatchEpisode(fields=fields or EpisodeFields(), **_common(named, name))


def delete(name: str = "run-1", **named: Any) -> DeleteEpisode:
    return DeleteEpisode(**_common(named, name))


def restore(name: str = "run-1", **named: Any) -> RestoreEpisode:
    return RestoreEpisode(**_common(named, name))


def item(content: str = "Something happened.", **named: Any) -> EpisodeItem:
    return EpisodeItem(content=content, metadata=named.pop("metadata", Raw(b"{}")), **named)


def batch(*items: EpisodeItem, **named: Any) -> RecordEpisodes:
    defaults = {"command_id": command_id(), "actor": "key-1", "request_hash": "hash", "tenant_id": "acme"}
    return RecordEpisodes(items=items or (item(),), **(defaults | named))
