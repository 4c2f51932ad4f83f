"""The rules of both APIs as their documents give them: what a request comes to at its place in the stream."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import msgspec
from msgspec import Struct

from tests.chaos.history import Operation
from tests.chaos.log_reader import instant
from tests.chaos.model import Document, Event, Namespace, State


class Verdict(Struct):
    """What must come of a command."""

    code: str = ""
    """Why it makes no event; empty if it does."""
    status: int = 200
    events: list[tuple[str, dict[str, Any]]] = []
    """Type and data of each."""
    errors: list[tuple[int, str, str]] = []
    """Index, code and begin of the message, of each item of a batch that is not recorded."""


STATUS = {
    "write_protected": 403,
    "not_found": 404,
    "conflict": 409,
    "gone": 410,
    "idempotency_mismatch": 422,
}
"""Code of a refusal that only the ingestor can give → status."""


def target(path: str) -> tuple[str, str, str, str]:
    """Namespace, project, episode and what follows in a path of the projects API; the last two may be empty."""
    _, _, namespace, _, project, _, *rest = path.partition("?")[0].split("/")
    name, action = [*rest, "", ""][:2]
    return unquote(namespace), unquote(project), unquote(name), action


def fingerprint(operation: Operation) -> bytes:
    """What makes two requests under one Idempotency-Key the same."""
    path = [unquote(part) for part in operation.path.partition("?")[0].split("/")]
    return msgspec.json.encode([operation.method, path, operation.asked], order="sorted")


def decide(state: State, operation: Operation, made: Sequence[Event]) -> Verdict:
    """What the write must come to, on the state before it. ``made`` are its events, for the ids that they chose."""
    if operation.kind == "record":
        return _record(state, operation, made)
    return _Decision(state, operation, made).verdict()


class _Refused(Exception):
    """The rules say no."""


class _Decision:
    """One write on the projects API."""

    def __init__(self, state: State, operation: Operation, made: Sequence[Event]) -> None:
        self._namespace = state.namespace(operation.stream)
        self._operation = operation
        self._body: Mapping[str, Any] = operation.asked or {}
        self._slug, self._project, self._name, _ = target(operation.path)
        self._ids = iter([str(event.data.get("id")) for event in made])
        self._events: list[tuple[str, dict[str, Any]]] = []

    def verdict(self) -> Verdict:
        try:
            match self._operation.kind:
                case "upsert":
                    self._name = self._body["name"]
                    created = self._upsert()
                    return Verdict(status=201 if created else 200, events=self._events)
                case "patch":
                    self._patch()
                case "delete":
                    self._say("ProjectEpisodeDeleted", self._changeable())
                case "restore":
                    episode = self._known()
                    if not episode["deleted"]:
                        return Verdict("unchanged")
                    self._say("ProjectEpisodeRestored", episode)
                case other:
                    raise ValueError(other)
        except _Refused as refused:
            code = str(refused)
            return Verdict(code, STATUS[code])
        return Verdict(events=self._events)

    def _say(self, kind: str, episode: Document) -> None:
        self._add(kind, episode["_id"], project_id=episode["project_id"], project=self._project, name=self._name)

    def _add(self, kind: str, identity: str, **data: Any) -> None:
        self._events.append((kind, {"id": identity, **data}))
        next(self._ids, None)

    def _new_id(self) -> str:
        """The id that the next event gives."""
        ids = list(self._ids)
        self._ids = iter(ids)
        return ids[0] if ids else "(none)"

    def _upsert(self) -> bool:
        if self._namespace.id is None:
            if self._operation.user != self._slug:
                raise _Refused("not_found")
            self._add("NamespaceCreated", self._new_id(), slug=self._slug)
        project = self._namespace.projects.get(self._project)
        if project is None:
            identity = self._new_id()
            self._add("ProjectCreated", identity, slug=self._project, name=self._project)
        else:
            identity = project["_id"]
        episode = self._namespace.episodes.get((self._project, self._name))
        if episode is not None:
            _refuse_unless_changeable(episode)
            self._revise(episode, self._wished(identity))
            return False
        wished = self._wished(identity)
        self._add(
            "ProjectEpisodeCreated",
            self._new_id(),
            project_id=identity,
            project=self._project,
            ordinal=self._namespace.ordinals.get(self._project, 0) + 1,
            name=self._name,
            **{**_NEW, **wished},
        )
        return True

    def _patch(self) -> None:
        episode = self._changeable()
        new_name = self._body.get("name", self._name)
        if new_name != self._name and (self._project, new_name) in self._namespace.episodes:
            raise _Refused("conflict")
        wished = self._wished(episode["project_id"])
        if new_name != self._name:
            wished["name"] = new_name
        self._revise(episode, wished)

    def _revise(self, episode: Document, wished: Mapping[str, Any]) -> None:
        before = {**episode, "metadata": msgspec.json.decode(episode["metadata"])}
        changes = {key: value for key, value in wished.items() if before[key] != value}
        self._add(
            "ProjectEpisodeRevised",
            episode["_id"],
            project_id=episode["project_id"],
            project=self._project,
            name=self._name,
            changes=changes,
        )

    def _wished(self, project_id: str) -> dict[str, Any]:
        """The fields in the body, by their names in events. Folders that are missing are made."""
        body = self._body
        wished = {key: body[key] for key in ("description", "metadata", "status") if key in body}
        if "tags" in body:
            wished["tags"] = body["tags"] or []
        if "writeProtected" in body:
            wished["write_protected"] = body["writeProtected"]
        if "folder" in body:
            wished["folder"] = self._folder(project_id, body["folder"])
        return wished

    def _folder(self, project_id: str, path: str | None) -> dict[str, str] | None:
        at, parent = "", None
        for segment in filter(None, (path or "").split("/")):
            at = f"{at}/{segment}"
            identity = self._namespace.folders.get((self._project, at))
            if identity is None:
                identity = self._new_id()
                self._add(
                    "FolderCreated",
                    identity,
                    project_id=project_id,
                    project=self._project,
                    parent_id=parent,
                    path=at,
                    name=segment,
                )
            parent = identity
        return None if parent is None else {"id": parent, "path": at}

    def _known(self) -> Document:
        episode = self._namespace.episodes.get((self._project, self._name))
        if episode is None:
            raise _Refused("not_found")
        return episode

    def _changeable(self) -> Document:
        episode = self._known()
        if episode["deleted"]:
            raise _Refused("not_found")
        _refuse_unless_changeable(episode)
        return episode


_NEW: Mapping[str, Any] = {
    "description": None,
    "tags": [],
    "folder": None,
    "write_protected": False,
    "status": "running",
    "metadata": None,
}


def _refuse_unless_changeable(episode: Document) -> None:
    if episode["deleted"]:
        raise _Refused("gone")
    if episode["write_protected"]:
        raise _Refused("write_protected")


def _record(state: State, operation: Operation, made: Sequence[Event]) -> Verdict:
    body = operation.asked
    known = state.tenant(operation.stream).items
    verdict = Verdict(status=201)
    seen: set[str] = set()
    for index, item in enumerate(body["episodes"]):
        if (error := _item_error(item)) is not None:
            verdict.errors.append((index, *error))
            continue
        key = item.get("idempotency_key")
        if key is not None and (key in known or key in seen):
            continue
        seen |= {key} - {None}
        event = made[len(verdict.events)] if len(verdict.events) < len(made) else None
        verdict.events.append(("TenantEpisodeRecorded", _recorded(body, item, event)))
    if not verdict.events:
        verdict.code = "unchanged"
    return verdict


def _recorded(body: Mapping[str, Any], item: Mapping[str, Any], event: Event | None) -> dict[str, Any]:
    found = event.data.get("entities", []) if event else []
    given = [(entity["name"], entity["type"]) for entity in item.get("entities") or ()]
    if [(entity["name"], entity["type"]) for entity in found[: len(given)]] != given:
        found = given
    at = item.get("timestamp")
    return {
        "id": event.data["id"] if event else "(none)",
        "namespace": body.get("namespace"),
        "type": item.get("type") or "message",
        **{key: item.get(key) for key in ("content", "source", "author", "channel", "idempotency_key")},
        "timestamp": (event.time if event else None) if at is None else _utc(at),
        "metadata": item.get("metadata") or {},
        "entities": found,
    }


def comparable(event: Event) -> tuple[str, dict[str, Any]]:
    """The event's type and data, in the form of a `Verdict`."""
    if event.type != "TenantEpisodeRecorded":
        return event.type, event.data
    optional = dict.fromkeys(("namespace", "source", "author", "channel", "idempotency_key"))
    data = {**optional, "metadata": {}, "entities": [], **event.data}
    return event.type, {**data, "timestamp": datetime.fromisoformat(data["timestamp"])}


def _utc(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _item_error(item: Any) -> tuple[str, str] | None:
    """Code and begin of the message."""
    if not isinstance(item, dict):
        return "validation_error", "An episode must be"
    content = item.get("content")
    kind = item.get("type")
    if kind is not None and not all(letter.islower() or letter in "0123456789_-" for letter in kind):
        return "validation_error", "Field 'type' "
    if content is None or (isinstance(content, str) and not content.strip()):
        return "validation_error", "Field 'content' is required"
    if not isinstance(content, str):
        return "validation_error", "Field 'content' "
    for field in ("source", "author", "channel"):
        if not isinstance(item.get(field), str | None):
            return "validation_error", f"Field '{field}' "
    if item.get("timestamp") is not None:
        try:
            _utc(item["timestamp"])
        except ValueError:
            return "validation_error", "Field 'timestamp' "
    if not isinstance(item.get("metadata"), dict | None):
        return "validation_error", "Field 'metadata' "
    return None


# ---- answers ---------------------------------------------------------------------------------------------------------


def answer(state: State, operation: Operation, verdict: Verdict, made: Sequence[Event]) -> Any:
    """The body of the write's answer; ``state`` is that after it. The messages of errors are begins only."""
    if operation.kind == "record":
        return _batch_answer(state, operation, verdict, made)
    namespace = state.namespace(operation.stream)
    _, project, name, _ = target(operation.path)
    body: Mapping[str, Any] = operation.asked or {}
    if operation.kind != "restore":
        name = body.get("name", name)
    episode = namespace.episodes[project, name]
    match operation.kind:
        case "delete":
            return {"id": episode["_id"], "deletedAt": instant(episode["deleted_at"])}
        case "patch":
            return {**described(episode), "metadata": msgspec.json.decode(episode["metadata"])}
        case "restore":
            return whole(episode)
        case _:
            return _upserted(namespace, episode)


def _upserted(namespace: Namespace, episode: Document) -> Any:
    folder = episode["folder"]
    same = ("id", "name", "description", "tags", "folderId", "writeProtected", "status")
    return {
        "episode": {
            **{key: described(episode)[key] for key in same},
            "projectId": episode["project_id"],
            "metadata": msgspec.json.decode(episode["metadata"]),
        },
        "workspace": {"id": episode["project_id"], "slug": episode["project"]},
        "folder": folder and {**folder, "name": folder["path"].rpartition("/")[2]},
        "namespace": {"id": namespace.id, "slug": episode["namespace"]},
    }


def _batch_answer(state: State, operation: Operation, verdict: Verdict, made: Sequence[Event]) -> Any:
    known = state.tenant(operation.stream).items
    bad = {index for index, _, _ in verdict.errors}
    new = iter(made)
    told: list[tuple[int, str]] = []
    for index, item in enumerate(operation.asked["episodes"]):
        if index in bad:
            continue
        key = item.get("idempotency_key")
        first = known.get(key) if key is not None else None
        if first is not None and (first in told or first[0] not in {event.event_id for event in made}):
            told.append(first)
        else:
            event = next(new)
            told.append((event.event_id, event.data["id"]))
    return {
        "count": len(told),
        "event_ids": [event_id for event_id, _ in told],
        "errors": [{"index": index, "code": code, "message": text} for index, code, text in verdict.errors],
        "episode_ids": [identity for _, identity in told],
    }


def same_answer(wanted: Any, told: Any) -> bool:
    """Whether the bodies are the same, but for the end of items' error messages."""
    if isinstance(wanted, dict) and isinstance(told, dict) and wanted.get("errors") and told.get("errors"):
        pairs = list(zip(wanted["errors"], told["errors"], strict=False))
        begins = all(str(second.get("message", "")).startswith(first["message"]) for first, second in pairs)
        codes = [
            [{"index": error.get("index"), "code": error.get("code")} for error in body["errors"]]
            for body in (wanted, told)
        ]
        return begins and codes[0] == codes[1] and {**wanted, "errors": 0} == {**told, "errors": 0}
    return bool(wanted == told)


def described(episode: Document) -> dict[str, Any]:
    """An episode of a project as lists show it."""
    return {
        "id": episode["_id"],
        "name": episode["name"],
        "description": episode["description"],
        "tags": episode["tags"],
        "status": episode["status"],
        "writeProtected": episode["write_protected"],
        "folderId": episode["folder"] and episode["folder"]["id"],
        "createdAt": instant(episode["created_at"]),
        "updatedAt": instant(episode["updated_at"]),
    }


def whole(episode: Document) -> dict[str, Any]:
    """An episode of a project as GET shows it."""
    metadata = msgspec.json.decode(episode["metadata"])
    return {**described(episode), "metadata": metadata, "projectId": episode["project_id"]}


def whole_item(item: Document) -> dict[str, Any]:
    """An episode of a tenant as GET shows it."""
    same = ("event_id", "type", "content", "source", "author", "entities", "status")
    return {
        "id": item["_id"],
        **{key: item[key] for key in same},
        "timestamp": instant(item["timestamp"]),
        "metadata": msgspec.json.decode(item["metadata"]),
        "created_at": instant(item["created_at"]),
    }
