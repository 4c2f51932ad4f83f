"""The OpenAPI document, by hand: the hot routes have no models from which it could be made.

Tests hold every answer of the gateway against it.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from gateway import problems
from gateway.dispatch import OutcomeUnknown
from gateway.entities import MAX_PER_ITEM
from gateway.paging import DEFAULT_SIZE, MAX_SIZE
from gateway.requests import MAX_CONTENT_BYTES, MAX_ITEMS, MAX_NAME, STATUSES
from gateway.routes import batches, operations, projects

Json = dict[str, Any]

_JSON = "application/json"


@cache
def document() -> Json:
    """The document that /openapi.json serves."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Episodes",
            "version": "1",
            "description": (
                "Streams of episodes. A write that is answered with 2xx is in the event log for ever. "
                "Reads come from a read model that follows the log: `X-Event-Id` says how far it is.\n\n"
                "Every path that is not listed answers 404, every method that is not listed 405, both with a problem. "
                "HEAD works where GET does. Keys of a request's body that are not listed are ignored. In a path, "
                "names are percent-encoded, `/` as `%2F`."
            ),
        },
        "tags": [
            {"name": "projects", "description": "Episodes of a project in a namespace"},
            {"name": "batches", "description": "Episodes of a tenant"},
            {"name": "operations", "description": "For operators; no authentication"},
        ],
        "paths": {
            projects.EPISODES: {
                "parameters": [_path("slug"), _path("projectSlug")],
                "post": _upsert(),
                "get": _list(),
            },
            projects.EPISODE: {
                "parameters": [_path("slug"), _path("projectSlug"), _path("episodeName")],
                "get": _get(),
                "patch": _patch(),
                "delete": _delete(),
            },
            projects.RESTORE: {
                "parameters": [_path("slug"), _path("projectSlug"), _path("episodeName")],
                "post": _restore(),
            },
            batches.EPISODES: {"post": _record()},
            batches.EPISODE: {"get": _get_recorded()},
            operations.HEALTHZ: {"get": _healthz()},
            operations.READYZ: {"get": _readyz()},
            "/docs": {"get": _static("docs", "This document, for people", "text/html", {"type": "string"})},
            "/openapi.json": {"get": _static("openapi", "This document", _JSON, {"type": "object"})},
        },
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _problem(status) for status in problems.CODES},
            "headers": _headers(),
            "parameters": _parameters(),
            "securitySchemes": {
                "jwt": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": (
                        "`username` (else `userName`, else `sub`) is the caller's own namespace; "
                        "`namespaces` opens more, `*` all."
                    ),
                },
                "apiKey": {"type": "http", "scheme": "bearer", "description": "A key that is good for some tenants."},
            },
        },
    }


# --- operations


def _upsert() -> Json:
    return _write(
        "upsertEpisode",
        "Create an episode, or change the one of that name",
        "jwt",
        {
            "201": _answer("Created", "UpsertedEpisode", "write"),
            "200": _answer("Changed", "UpsertedEpisode", "write"),
        },
        (400, 401, 403, 404, 410, 413, 422),
        body="UpsertEpisode",
        description=(
            "Only the keys that are present are changed; `null` clears description, tags, folder and metadata. "
            "A project that is missing is created, and so is the caller's own namespace."
        ),
    )


def _patch() -> Json:
    return _write(
        "patchEpisode",
        "Change an episode",
        "jwt",
        {"200": _answer("Changed", "PatchedEpisode", "write")},
        (400, 401, 403, 404, 409, 413, 422),
        body="PatchEpisode",
    )


def _delete() -> Json:
    return _write(
        "deleteEpisode",
        "Delete an episode; it can be restored",
        "jwt",
        {"200": _answer("Deleted", "DeletedEpisode", "write")},
        (400, 401, 403, 404, 422),
    )


def _restore() -> Json:
    return _write(
        "restoreEpisode",
        "Restore a deleted episode",
        "jwt",
        {"200": _answer("It lives: restored now, or never deleted", "Episode", "write")},
        (400, 401, 403, 404, 422),
    )


def _record() -> Json:
    return _write(
        "recordEpisodes",
        f"Record up to {MAX_ITEMS} episodes",
        "apiKey",
        {"201": _answer("The valid ones are recorded, all of them", "RecordedEpisodes", "write")},
        (400, 401, 403, 413, 422),
        body="RecordEpisodes",
        tag="batches",
        description="Items that are not valid are listed in `errors` and recorded nowhere; the others are recorded.",
    )


def _list() -> Json:
    return _read(
        "listEpisodes",
        "List a project's episodes, oldest first",
        "jwt",
        _answer("One page; past the end an empty one", "EpisodeList", "read"),
        errors={413},
        parameters=[
            _query("page", {"type": "integer", "minimum": 1, "default": 1}, "Which page"),
            _query(
                "pageSize",
                {"type": "integer", "minimum": 1, "default": DEFAULT_SIZE},
                f"Items per page; more than {MAX_SIZE} is taken as {MAX_SIZE}",
            ),
        ],
    )


def _get() -> Json:
    return _read("getEpisode", "One episode", "jwt", _answer("The episode", "Episode", "read"))


def _get_recorded() -> Json:
    return _read(
        "getRecordedEpisode",
        "One recorded episode",
        "apiKey",
        _answer("The episode", "RecordedEpisode", "read"),
        parameters=[
            {
                "name": "id",
                "in": "path",
                "required": True,
                "schema": {"type": "string"},
                "description": "As in `episode_ids`",
            },
            _query("tenant_id", _text(), "The tenant; required, here or in X-Tenant-Id"),
            _header("X-Tenant-Id", _text(), "The tenant, if it is not in the query"),
        ],
        tag="batches",
    )


def _healthz() -> Json:
    return {
        "operationId": "healthz",
        "summary": "Is the process alive",
        "tags": ["operations"],
        "security": [],
        "responses": {"200": _answer("It is", "Alive", "any"), "500": _ref("responses", "500")},
    }


def _readyz() -> Json:
    not_ready = {
        **_problem(503),
        "description": "Not ready; `waiting_for` says for what it waits",
        "content": {problems.MEDIA_TYPE: {"schema": _ref("schemas", "NotReady")}},
    }
    return {
        "operationId": "readyz",
        "summary": "Can it take requests",
        "tags": ["operations"],
        "security": [],
        "parameters": [
            _query("for", {"enum": ["writes", "reads"]}, "Only what writes need, or only what reads need"),
        ],
        "responses": {
            "200": _answer("It can", "Ready", "any"),
            "400": _ref("responses", "400"),
            "500": _ref("responses", "500"),
            "503": not_ready,
        },
    }


def _static(name: str, summary: str, media_type: str, schema: Json) -> Json:
    return {
        "operationId": name,
        "summary": summary,
        "tags": ["operations"],
        "security": [],
        "responses": {
            "200": {
                "description": summary,
                "headers": _header_refs("any"),
                "content": {media_type: {"schema": schema}},
            },
            "500": _ref("responses", "500"),
        },
    }


def _write(
    name: str,
    summary: str,
    security: str,
    answers: Json,
    errors: Sequence[int],
    *,
    body: str | None = None,
    tag: str = "projects",
    description: str | None = None,
) -> Json:
    operation: Json = {
        "operationId": name,
        "summary": summary,
        "tags": [tag],
        "security": [{security: []}],
        "parameters": [
            _ref("parameters", each) for each in ("IdempotencyKey", "WaitProjected", "Traceparent", "RequestId")
        ],
        "responses": answers | _errors({*errors, 413, 429, 500, 503, 504}),
    }
    if description is not None:
        operation["description"] = description
    if body is not None:
        operation["responses"] |= _errors({408, 415})
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": _ref("schemas", body)}}}
    return operation


def _read(
    name: str,
    summary: str,
    security: str,
    answer: Json,
    *,
    parameters: Sequence[Json] = (),
    errors: Iterable[int] = (),
    tag: str = "projects",
) -> Json:
    return {
        "operationId": name,
        "summary": summary,
        "tags": [tag],
        "security": [{security: []}],
        "parameters": [*parameters, *(_ref("parameters", each) for each in ("MinEventId", "Prefer", "RequestId"))],
        "responses": {"200": answer, **_errors({400, 401, 403, 404, *errors, 429, 500, 503})},
    }


def _errors(statuses: set[int]) -> Json:
    return {str(status): _ref("responses", str(status)) for status in sorted(statuses)}


def _answer(description: str, schema: str, kind: str) -> Json:
    return {
        "description": description,
        "headers": _header_refs(kind),
        "content": {_JSON: {"schema": _ref("schemas", schema)}},
    }


def _problem(status: int) -> Json:
    title, names = _PROBLEMS[status]
    return {
        "description": title,
        "headers": _header_refs("any") | {name: _ref("headers", name) for name in names},
        "content": {
            problems.MEDIA_TYPE: {
                "schema": {
                    "allOf": [
                        _ref("schemas", "Problem"),
                        {"properties": {"status": {"const": status}, "code": {"enum": [*problems.CODES[status]]}}},
                    ]
                }
            }
        },
    }


_OF_STREAM = ("X-Event-Id", "X-Stream")
_PROBLEMS: Mapping[int, tuple[str, Sequence[str]]] = {
    400: ("The request is not valid; `detail` says what is wrong", _OF_STREAM),
    401: ("Nobody known asks", ("WWW-Authenticate",)),
    403: ("Not open to the caller, or the episode is write-protected", _OF_STREAM),
    404: ("Not found; after a read, `X-Event-Id` says how far the read model is", _OF_STREAM),
    405: ("Not a method of this path", ("Allow",)),
    408: ("The body does not arrive; the connection ends", ()),
    409: ("The new name is taken", _OF_STREAM),
    410: ("An episode of that name was deleted", _OF_STREAM),
    413: ("Too large", _OF_STREAM),
    415: ("The body is not `application/json`", ()),
    422: ("The Idempotency-Key was used for another request", _OF_STREAM),
    429: ("This caller has too much under way, or sends too much a second", ("Retry-After",)),
    500: ("A bug; `request_id` finds it in the log", ()),
    503: (
        "Not now. With `command_id`: " + str(OutcomeUnknown.__doc__) + " It may still happen; "
        "a retry with the same Idempotency-Key is safe",
        ("Retry-After", "X-Event-Id"),
    ),
    504: (
        "No reply in time. The write may still happen; a retry with the same Idempotency-Key is safe",
        (),
    ),
}


# --- parameters and headers


def _path(name: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": _text(),
        "description": {
            "slug": "Slug of the namespace",
            "projectSlug": "Slug of the project",
            "episodeName": "Name of the episode",
        }[name]
        + ", percent-encoded; not `.` or `..`",
    }


def _query(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def _header(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


def _parameters() -> Json:
    return {
        "IdempotencyKey": _header(
            "Idempotency-Key",
            {"type": "string", "pattern": '^"?[!-~]{1,255}"?$'},
            "The same key with the same request gets the first answer again; kept for 7 days, per stream",
        ),
        "WaitProjected": _query(
            "wait", {"const": "projected"}, "Answer when the write can be read, at most 10 s later"
        ),
        "Traceparent": _header("traceparent", {"type": "string"}, "W3C trace context, passed on with the command"),
        "RequestId": _header("X-Request-Id", {"type": "string"}, "Comes back, if it is a sane one"),
        "MinEventId": _header(
            "X-Min-Event-Id",
            {"type": "integer", "minimum": 0},
            "Wait until the read model is that far, 2 s unless Prefer says otherwise; then 503",
        ),
        "Prefer": _header("Prefer", {"type": "string"}, "`wait=N`: seconds to wait for X-Min-Event-Id, at most 30"),
    }


_FOR_BROWSERS = {
    "-".join(word.capitalize() for word in name.decode().split("-")): value.decode()
    for name, value in problems.ON_EVERY_ANSWER
}


def _headers() -> Json:
    whole = {"type": "integer", "minimum": 0}
    return {
        "X-Request-Id": {"schema": {"type": "string"}, "description": "Finds the request in the log", "required": True},
        "X-Event-Id": {
            "schema": whole,
            "description": "After a write: its last event_id. After a read: how far the read model is in the stream",
        },
        "X-Stream": {"schema": {"type": "string"}, "description": "The stream of X-Event-Id, percent-encoded"},
        "X-Projected": {
            "schema": {"enum": ["true", "false"]},
            "description": "With `wait=projected`: whether the write can be read now",
        },
        "Idempotency-Replayed": {"schema": {"const": "true"}, "description": "This answer is an earlier one's"},
        "WWW-Authenticate": {"schema": {"type": "string"}, "required": True},
        "Allow": {"schema": {"type": "string"}, "required": True},
        "Retry-After": {"schema": whole, "description": "Seconds", "required": True},
        **{name: {"schema": {"const": value}, "required": True} for name, value in _FOR_BROWSERS.items()},
    }


def _header_refs(kind: str) -> Json:
    names: tuple[str, ...] = {
        "write": ("X-Event-Id", "X-Stream", "X-Projected", "Idempotency-Replayed"),
        "read": ("X-Event-Id",),
        "any": (),
    }[kind]
    return {name: _ref("headers", name) for name in ("X-Request-Id", *names, *_FOR_BROWSERS)}


# --- schemas


def _schemas() -> Json:
    return {
        "UpsertEpisode": _asked({"name": _text("Unique within the project"), **_FIELDS}, required=["name"]),
        "PatchEpisode": _asked({"name": _text("The new name"), **_FIELDS}),
        "UpsertedEpisode": _shape(
            {
                "episode": _shape(
                    {
                        "id": _ID,
                        "name": _STRING,
                        "description": _STRING_OR_NULL,
                        "tags": _STRINGS,
                        "projectId": _ID,
                        "folderId": _ID_OR_NULL,
                        "writeProtected": _BOOLEAN,
                        "status": _STATUS,
                        "metadata": _OBJECT_OR_NULL,
                    }
                ),
                "workspace": _shape({"id": _ID, "slug": _STRING}),
                "folder": {"anyOf": [_shape({"id": _ID, "name": _STRING, "path": _STRING}), {"type": "null"}]},
                "namespace": _shape({"id": _ID, "slug": _STRING}),
            }
        ),
        "PatchedEpisode": _shape({**_DESCRIBED, "metadata": _OBJECT_OR_NULL, **_TIMES}),
        "Episode": _shape({**_DESCRIBED, "metadata": _OBJECT_OR_NULL, **_TIMES, "projectId": _ID}),
        "DeletedEpisode": _shape({"id": _ID, "deletedAt": _INSTANT}),
        "EpisodeList": _shape(
            {
                "episodes": {"type": "array", "maxItems": MAX_SIZE, "items": _shape({**_DESCRIBED, **_TIMES})},
                "page": {"type": "integer", "minimum": 1},
                "pageSize": {"type": "integer", "minimum": 1, "maximum": MAX_SIZE},
                "total": _WHOLE,
                "totalPages": _WHOLE,
            }
        ),
        "RecordEpisodes": _asked(
            {
                "tenant_id": _text("Tenant identifier"),
                "namespace": {"type": ["string", "null"], "maxLength": MAX_NAME, "description": "A free label"},
                "episodes": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_ITEMS,
                    "items": {"type": "object", "description": "See RecordedItem; what is not one is told in `errors`"},
                },
            },
            required=["tenant_id", "episodes"],
        ),
        "RecordedItem": _asked(
            {
                "type": {"type": ["string", "null"], "pattern": "^[a-z0-9_-]{1,64}$", "default": "message"},
                "content": {
                    "type": "string",
                    "minLength": 1,
                    "description": f"At most {MAX_CONTENT_BYTES} bytes of UTF-8, not blank",
                },
                "source": _SHORT_OR_NULL,
                "author": _SHORT_OR_NULL,
                "channel": _SHORT_OR_NULL,
                "timestamp": {
                    "type": ["string", "null"],
                    "description": "ISO 8601, UTC unless it says otherwise; by default the time of recording",
                },
                "metadata": {"type": ["object", "null"], "default": {}},
                "entities": {
                    "type": ["array", "null"],
                    "maxItems": MAX_PER_ITEM,
                    "items": _asked({"name": _text(), "type": _text()}, required=["name", "type"]),
                },
                "idempotency_key": {
                    "type": ["string", "null"],
                    "pattern": "^[!-~]{1,255}$",
                    "description": "An item whose key this tenant has seen is not recorded again",
                },
            },
            required=["content"],
        ),
        "RecordedEpisodes": _shape(
            {
                "count": {"type": "integer", "minimum": 0, "maximum": MAX_ITEMS},
                "event_ids": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                "errors": {
                    "type": "array",
                    "items": _shape(
                        {
                            "index": {"type": "integer", "minimum": 0, "maximum": MAX_ITEMS - 1},
                            "code": {"enum": ["validation_error", "payload_too_large"]},
                            "message": _STRING,
                        }
                    ),
                },
                "episode_ids": {"type": "array", "items": _EPISODE_ID},
            }
        ),
        "RecordedEpisode": _shape(
            {
                "id": _EPISODE_ID,
                "event_id": {"type": "integer", "minimum": 1},
                "type": _STRING,
                "content": _STRING,
                "source": _STRING_OR_NULL,
                "author": _STRING_OR_NULL,
                "timestamp": _INSTANT,
                "metadata": {"type": "object"},
                "entities": {
                    "type": "array",
                    "items": _shape(
                        {"id": {"type": "string", "pattern": "^ent_[0-9a-f]{24}$"}, "name": _STRING, "type": _STRING}
                    ),
                },
                "status": {"const": "active"},
                "created_at": _INSTANT,
            }
        ),
        "Alive": _shape({"status": {"const": "alive"}}),
        "Ready": _shape({"ready": {"const": True}, "waiting_for": {"type": "object", "maxProperties": 0}}),
        "NotReady": _shape(
            {
                **_PROBLEM,
                "ready": {"const": False},
                "waiting_for": {"type": "object", "additionalProperties": _STRING, "minProperties": 1},
            }
        ),
        "Problem": _shape(
            {
                **_PROBLEM,
                "command_id": {"type": "string", "format": "uuid", "description": "Of a write that may still happen"},
            },
            optional=("command_id",),
        ),
    }


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _text(description: str | None = None) -> Json:
    schema: Json = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
    return schema if description is None else schema | {"description": description}


def _shape(properties: Json, optional: Sequence[str] = ()) -> Json:
    """An object of ours: these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _asked(properties: Json, required: Sequence[str] = ()) -> Json:
    """An object of a caller's: other keys are ignored."""
    return {"type": "object", "properties": properties, "required": [*required]}


_STRING: Json = {"type": "string"}
_STRING_OR_NULL: Json = {"type": ["string", "null"]}
_SHORT_OR_NULL: Json = {"type": ["string", "null"], "maxLength": MAX_NAME}
_STRINGS: Json = {"type": "array", "items": _STRING}
_BOOLEAN: Json = {"type": "boolean"}
_WHOLE: Json = {"type": "integer", "minimum": 0}
_OBJECT_OR_NULL: Json = {"type": ["object", "null"]}
_ID: Json = {"type": "string", "pattern": "^[0-9a-f]{24}$"}
_ID_OR_NULL: Json = {"type": ["string", "null"], "pattern": "^[0-9a-f]{24}$"}
_EPISODE_ID: Json = {"type": "string", "pattern": "^ep_[0-9a-f]{24}$"}
_STATUS: Json = {"enum": [*STATUSES]}
_INSTANT: Json = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$",
}
_FIELDS: Json = {
    "description": _STRING_OR_NULL,
    "tags": {"type": ["array", "null"], "items": _STRING},
    "folder": {"type": ["string", "null"], "description": "A path like /experiments/batch-1; missing folders are made"},
    "writeProtected": {"type": "boolean", "description": "True locks the episode for ever"},
    "status": _STATUS,
    "metadata": _OBJECT_OR_NULL,
}
_DESCRIBED: Json = {
    "id": _ID,
    "name": _STRING,
    "description": _STRING_OR_NULL,
    "tags": _STRINGS,
    "status": _STATUS,
    "writeProtected": _BOOLEAN,
    "folderId": _ID_OR_NULL,
}
_TIMES: Json = {"createdAt": _INSTANT, "updatedAt": _INSTANT}
_PROBLEM: Json = {
    "type": {"type": "string", "format": "uri-reference"},
    "title": _STRING,
    "status": {"type": "integer"},
    "detail": {"type": "string", "description": "One sentence for people"},
    "error": {"type": "string", "description": "The same as `detail`"},
    "message": {"type": "string", "description": "The same as `detail`"},
    "code": {"enum": [code for codes in problems.CODES.values() for code in codes]},
    "request_id": _STRING,
}
