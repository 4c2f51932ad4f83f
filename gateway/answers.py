"""Receipts and documents → bodies, with exactly the keys of the API's documents.

Metadata is JSON text all the way and is spliced in unread.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, assert_never

import msgspec
from msgspec import Raw

from gateway.paging import Page
from shared.mongo import Document
from shared.receipts import (
    EpisodeDeleted,
    EpisodePatched,
    EpisodeRestored,
    EpisodeSnapshot,
    EpisodesRecorded,
    EpisodeUpserted,
    Outcome,
)

encode = msgspec.json.Encoder().encode


def instant(at: datetime) -> str:
    """ISO 8601 in UTC with milliseconds: ``2026-04-14T10:00:00.000Z``."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


@lru_cache(10_000)
def _stored_instant(at: datetime) -> str:
    """The same of a time in MongoDB: always UTC, whether it says so or not. Lists are read again and again."""
    return at.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def outcome(of: Outcome) -> tuple[int, bytes]:
    """Status and body of a write's answer."""
    match of:
        case EpisodeUpserted():
            return 201 if of.created else 200, encode(_upserted(of))
        case EpisodePatched():
            return 200, encode(_changed(of.episode))
        case EpisodeRestored():
            return 200, encode({**_changed(of.episode), "projectId": of.episode.project_id})
        case EpisodeDeleted():
            return 200, encode({"id": of.id, "deletedAt": instant(of.deleted_at)})
        case EpisodesRecorded():
            return 201, encode(
                {
                    "count": len(of.event_ids),
                    "event_ids": of.event_ids,
                    "errors": of.errors,
                    "episode_ids": of.episode_ids,
                }
            )
        case _:
            assert_never(of)


def _upserted(of: EpisodeUpserted) -> Mapping[str, Any]:
    episode = of.episode
    folder = episode.folder
    return {
        "episode": {
            "id": episode.id,
            "name": episode.name,
            "description": episode.description,
            "tags": episode.tags,
            "projectId": episode.project_id,
            "folderId": folder and folder.id,
            "writeProtected": episode.write_protected,
            "status": episode.status,
            "metadata": episode.metadata,
        },
        "workspace": {"id": of.project.id, "slug": of.project.slug},
        "folder": folder and {"id": folder.id, "name": folder.name, "path": folder.path},
        "namespace": {"id": of.namespace.id, "slug": of.namespace.slug},
    }


def _changed(episode: EpisodeSnapshot) -> Mapping[str, Any]:
    return {
        "id": episode.id,
        "name": episode.name,
        "description": episode.description,
        "tags": episode.tags,
        "status": episode.status,
        "writeProtected": episode.write_protected,
        "folderId": episode.folder and episode.folder.id,
        "metadata": episode.metadata,
        "createdAt": instant(episode.created_at),
        "updatedAt": instant(episode.updated_at),
    }


def project_episode(document: Document) -> bytes:
    """One episode of a project, from the read model."""
    listed = _listed(document)
    times = {key: listed.pop(key) for key in ("createdAt", "updatedAt")}
    metadata = Raw(document["metadata"].encode())
    return encode({**listed, "metadata": metadata, **times, "projectId": document["project_id"]})


def project_episodes(documents: Sequence[Document], page: Page, total: int) -> bytes:
    """One page of a project's list."""
    return encode(
        {
            "episodes": [_listed(document) for document in documents],
            "page": page.number,
            "pageSize": page.size,
            "total": total,
            "totalPages": page.of(total),
        }
    )


def _listed(document: Document) -> dict[str, Any]:
    folder, created, updated = document["folder"], document["created_at"], document["updated_at"]
    created_at = _stored_instant(created)
    return {
        "id": document["_id"],
        "name": document["name"],
        "description": document["description"],
        "tags": document["tags"],
        "status": document["status"],
        "writeProtected": document["write_protected"],
        "folderId": folder and folder["id"],
        "createdAt": created_at,
        "updatedAt": created_at if updated == created else _stored_instant(updated),
    }


def tenant_episode(document: Document) -> bytes:
    """One episode of a tenant, from the read model."""
    return encode(
        {
            "id": document["_id"],
            "event_id": document["event_id"],
            "type": document["type"],
            "content": document["content"],
            "source": document["source"],
            "author": document["author"],
            "timestamp": _stored_instant(document["timestamp"]),
            "metadata": Raw(document["metadata"].encode()),
            "entities": [{key: entity[key] for key in ("id", "name", "type")} for entity in document["entities"]],
            "status": document["status"],
            "created_at": _stored_instant(document["created_at"]),
        }
    )
