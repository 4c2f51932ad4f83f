"""The projects API: episodes of a project in a namespace."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import answers
from gateway.auth import Authenticator, Caller
from gateway.exchange import Bodies, WriteOptions, path_name, read_options, request_hash, route, write_options
from gateway.paging import locate, parse_page
from gateway.problems import Problem
from gateway.queries import ReadModel
from gateway.reads import Reads
from gateway.requests import as_object, patch_episode, upsert_episode
from gateway.writes import Writes
from shared.commands import DeleteEpisode, PatchEpisode, RestoreEpisode, UpsertEpisode
from shared.ids import CommandId, namespace_stream, new_command_id

EPISODES = "/namespaces/{slug}/projects/{projectSlug}/episodes"
EPISODE = EPISODES + "/{episodeName}"
RESTORE = EPISODE + "/restore"


class ProjectRoutes:
    """Requests of the projects API → commands and queries."""

    def __init__(
        self, authenticator: Authenticator, bodies: Bodies, writes: Writes, reads: Reads, *, patience: float
    ) -> None:
        self._authenticator = authenticator
        self._bodies = bodies
        self._writes = writes
        self._reads = reads
        self._patience = patience

    def routes(self) -> Sequence[Route]:
        return [
            route(EPISODES, self.upsert, methods=["POST"]),
            route(EPISODES, self.list, methods=["GET"]),
            route(EPISODE, self.get, methods=["GET"]),
            route(EPISODE, self.patch, methods=["PATCH"]),
            route(EPISODE, self.delete, methods=["DELETE"]),
            route(RESTORE, self.restore, methods=["POST"]),
        ]

    async def upsert(self, request: Request) -> Response:
        caller = await self._caller(request)
        namespace, project = _project(request)
        options = write_options(request)
        self._writes.check(caller.actor)
        body = as_object(await self._bodies.json(request, caller.actor))
        name, fields = upsert_episode(body)
        origin = _origin(request, caller, options, _Target(namespace, project, name), body)
        del body
        return await self._writes.answer(UpsertEpisode(fields=fields, **origin), options)

    async def patch(self, request: Request) -> Response:
        caller = await self._caller(request)
        target = _target(request)
        options = write_options(request)
        self._writes.check(caller.actor)
        body = as_object(await self._bodies.json(request, caller.actor))
        new_name, fields = patch_episode(body)
        origin = _origin(request, caller, options, target, body)
        del body
        return await self._writes.answer(PatchEpisode(fields=fields, new_name=new_name, **origin), options)

    async def delete(self, request: Request) -> Response:
        caller = await self._caller(request)
        target = _target(request)
        options = write_options(request)
        return await self._writes.answer(DeleteEpisode(**_origin(request, caller, options, target)), options)

    async def restore(self, request: Request) -> Response:
        caller = await self._caller(request)
        target = _target(request)
        options = write_options(request)
        return await self._writes.answer(RestoreEpisode(**_origin(request, caller, options, target)), options)

    async def get(self, request: Request) -> Response:
        caller = await self._caller(request)
        target = _target(request)
        options = read_options(request, self._patience)
        _check_open(caller, target.namespace)

        async def ask(model: ReadModel) -> bytes | None:
            document = await model.project_episode(*target)
            return None if document is None else answers.project_episode(document)

        return await self._reads.answer(
            caller.actor, namespace_stream(target.namespace), options, ask, f"Episode '{target.name}' was not found"
        )

    async def list(self, request: Request) -> Response:
        caller = await self._caller(request)
        namespace, slug = _project(request)
        page = parse_page(request.query_params.get("page"), request.query_params.get("pageSize"))
        options = read_options(request, self._patience)
        _check_open(caller, namespace)

        async def ask(model: ReadModel) -> bytes | None:
            project = await model.project(namespace, slug)
            if project is None:
                return None
            where = locate(page, project["total"], project["blocks"])
            episodes = await model.project_episodes(project["_id"], where) if where else []
            return answers.project_episodes(episodes, page, project["total"])

        return await self._reads.answer(
            caller.actor,
            namespace_stream(namespace),
            options,
            ask,
            f"Project '{slug}' was not found in namespace '{namespace}'",
        )

    async def _caller(self, request: Request) -> Caller:
        return await self._authenticator.caller(request.headers.get("authorization"))


class _Target(NamedTuple):
    namespace: str
    project: str
    name: str


def _project(request: Request) -> tuple[str, str]:
    return path_name(request, "slug"), path_name(request, "projectSlug")


def _target(request: Request) -> _Target:
    return _Target(*_project(request), path_name(request, "episodeName"))


class _Origin(TypedDict):
    """What all commands of this API have."""

    command_id: CommandId
    actor: str
    request_hash: str
    idempotency_key: str | None
    namespace: str
    project: str
    name: str
    owner: bool


def _origin(request: Request, caller: Caller, options: WriteOptions, target: _Target, body: Any = None) -> _Origin:
    _check_open(caller, target.namespace)
    return {
        "command_id": new_command_id(),
        "actor": caller.actor,
        "request_hash": request_hash(request, body) if options.idempotency_key is not None else "",
        "idempotency_key": options.idempotency_key,
        "namespace": target.namespace,
        "project": target.project,
        "name": target.name,
        "owner": caller.owns(target.namespace),
    }


def _check_open(caller: Caller, namespace: str) -> None:
    if not caller.may_use(namespace):
        raise Problem("forbidden", f"Namespace '{namespace}' is not open to you")
