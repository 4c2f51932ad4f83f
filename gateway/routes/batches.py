"""The batch API: episodes of a tenant."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import answers
from gateway.auth import Authenticator, Caller
from gateway.entities import EntityExtractor
from gateway.exchange import Bodies, path_text, read_options, request_hash, route, write_options
from gateway.problems import Problem, invalid
from gateway.queries import ReadModel
from gateway.reads import Reads
from gateway.requests import as_object, record_episodes, tenant
from gateway.writes import Writes
from shared.commands import RecordEpisodes
from shared.ids import new_command_id, tenant_stream

EPISODES = "/v1/episodes"
EPISODE = EPISODES + "/{id}"


class BatchRoutes:
    """Requests of the batch API → commands and queries."""

    def __init__(
        self,
        authenticator: Authenticator,
        bodies: Bodies,
        writes: Writes,
        reads: Reads,
        *,
        extractor: EntityExtractor,
        patience: float,
    ) -> None:
        self._authenticator = authenticator
        self._bodies = bodies
        self._writes = writes
        self._reads = reads
        self._extractor = extractor
        self._patience = patience

    def routes(self) -> Sequence[Route]:
        return [
            route(EPISODES, self.record, methods=["POST"]),
            route(EPISODE, self.get, methods=["GET"]),
        ]

    async def record(self, request: Request) -> Response:
        caller = await self._caller(request)
        options = write_options(request)
        self._writes.check(caller.actor)
        body = as_object(await self._bodies.json(request, caller.actor))
        batch = record_episodes(body, self._extractor)
        _check_open(caller, batch.tenant_id)
        digest = request_hash(request, body) if options.idempotency_key is not None else ""
        del body
        command = RecordEpisodes(
            command_id=new_command_id(),
            actor=caller.actor,
            request_hash=digest,
            idempotency_key=options.idempotency_key,
            tenant_id=batch.tenant_id,
            namespace=batch.namespace,
            items=batch.items,
            errors=batch.errors,
        )
        return await self._writes.answer(command, options)

    async def get(self, request: Request) -> Response:
        caller = await self._caller(request)
        episode_id = path_text(request, "id")
        tenant_id = _tenant(request)
        options = read_options(request, self._patience)
        _check_open(caller, tenant_id)

        async def ask(model: ReadModel) -> bytes | None:
            document = await model.tenant_episode(tenant_id, episode_id)
            return None if document is None else answers.tenant_episode(document)

        return await self._reads.answer(
            caller.actor, tenant_stream(tenant_id), options, ask, f"Episode '{episode_id}' was not found"
        )

    async def _caller(self, request: Request) -> Caller:
        return await self._authenticator.caller(request.headers.get("authorization"))


def _tenant(request: Request) -> str:
    given = request.query_params.get("tenant_id")
    if given is None and (header := request.headers.get("x-tenant-id")) is not None:
        try:
            given = header.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise invalid("Header 'X-Tenant-Id' is not valid UTF-8") from None
    return tenant(given, "Query parameter 'tenant_id'")


def _check_open(caller: Caller, tenant_id: str) -> None:
    if not caller.may_use(tenant_id):
        raise Problem("forbidden", f"Tenant '{tenant_id}' is not open to you")
