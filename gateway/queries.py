"""Reading what the projector wrote: the port `ReadModels`, and MongoDB behind it. All that the gateway asks MongoDB.

A `ReadModel` is one generation, so an answer that is made from one never mixes two.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import pymongo
import structlog

from gateway.paging import Slice
from shared.errors import Unavailable
from shared.ids import EventId, StreamId
from shared.mongo import META, Client, Collection, Database, Document, generation_database, translated
from shared.read_models import (
    POINTER_ID,
    POINTERS,
    PROJECT_EPISODES,
    PROJECTS,
    STREAMS,
    TENANT_EPISODES,
)

QUERY_SECONDS = 2.0
_POINTER_SECONDS = 0.5
_MERGED = 200
_MERGED_AT_ONCE = 4
_NOT_BUILT = "The read model is not built yet"
_AWAY = "MongoDB does not answer"

K = TypeVar("K")
V = TypeVar("V")

_log = structlog.get_logger(__name__)


class ReadModel(Protocol):
    """One generation of the read models. Its documents are those of `shared.read_models`.

    Every method raises `Unavailable` when MongoDB does not answer.
    """

    async def event_id(self, stream: StreamId) -> EventId:
        """The last event of the stream that is in it, 0 for none."""

    async def project(self, namespace: str, slug: str) -> Document | None:
        """The project, with its counts."""

    async def project_episode(self, namespace: str, project: str, name: str) -> Document | None:
        """The living episode of that name."""

    async def project_episodes(self, project_id: str, where: Slice) -> Sequence[Document]:
        """Living episodes in the order of their making, without metadata."""

    async def tenant_episode(self, tenant_id: str, episode_id: str) -> Document | None:
        """The tenant's episode of that id."""


class ReadModels(Protocol):
    """Knows the generation in use."""

    def current(self) -> ReadModel:
        """The generation in use.

        Raises:
            Unavailable: MongoDB is away, or nothing is built yet.
        """

    @property
    def missing(self) -> str | None:
        """Why nothing can be read now."""


class MongoReadModels:
    """Looks at the pointer to the generation in use twice a second, and so also whether MongoDB answers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._current: tuple[int, MongoReadModel] | None = None
        self._missing: str | None = "MongoDB was not reached yet"

    @property
    def missing(self) -> str | None:
        return self._missing

    def current(self) -> ReadModel:
        if self._current is None or self._missing is not None:
            raise Unavailable(_NOT_BUILT if self._missing == _NOT_BUILT else _AWAY)
        return self._current[1]

    async def run(self) -> None:
        """Keep the generation in use known until cancelled."""
        while True:
            before = self._missing
            try:
                self._missing = await self._look()
            except Unavailable as error:
                self._missing = str(error)
            if self._missing is not None and self._missing != before:
                _log.warning("waiting for MongoDB", reason=self._missing)
            elif self._missing is None and before is not None:
                _log.info("MongoDB can be read")
            await asyncio.sleep(_POINTER_SECONDS)

    async def _look(self) -> str | None:
        with translated(_AWAY), pymongo.timeout(QUERY_SECONDS):
            pointer = await self._client[META][POINTERS].find_one({"_id": POINTER_ID})
        if pointer is None:
            return _NOT_BUILT
        generation: int = pointer["generation"]
        if self._current is None or self._current[0] != generation:
            self._current = generation, MongoReadModel(self._client[generation_database(generation)])
            _log.info("reading generation", generation=generation)
        return None


class _Place(NamedTuple):
    """Where something with a name is: documents are found together that differ in the name only."""

    among: tuple[str, ...]
    name: str


class MongoReadModel:
    """One database. Lookups that come at the same time share one query."""

    def __init__(self, database: Database) -> None:
        self._episodes = database[PROJECT_EPISODES]
        self._stream = Merged(_by_id(database[STREAMS]))
        self._project = Merged(_by_name(database[PROJECTS], ("namespace",), "slug", {}))
        self._project_episode = Merged(_by_name(self._episodes, ("namespace", "project"), "name", {"deleted": False}))
        self._tenant_episode = Merged(_by_id(database[TENANT_EPISODES]))

    async def event_id(self, stream: StreamId) -> EventId:
        document = await self._stream.get(stream)
        return EventId(0 if document is None else document["event_id"])

    async def project(self, namespace: str, slug: str) -> Document | None:
        return await self._project.get(_Place((namespace,), slug))

    async def project_episode(self, namespace: str, project: str, name: str) -> Document | None:
        return await self._project_episode.get(_Place((namespace, project), name))

    async def project_episodes(self, project_id: str, where: Slice) -> Sequence[Document]:
        living = {"project_id": project_id, "deleted": False, "ordinal": {"$gt": where.after}}
        cursor = self._episodes.find(living, {"metadata": False}).sort("ordinal", 1)
        return await _all(cursor.skip(where.skip).limit(where.limit), where.limit)

    async def tenant_episode(self, tenant_id: str, episode_id: str) -> Document | None:
        document = await self._tenant_episode.get(episode_id)
        return document if document is not None and document["tenant_id"] == tenant_id else None


def _by_id(collection: Collection) -> "Load[str, Document]":
    async def load(ids: Sequence[str]) -> Mapping[str, Document]:
        documents = await _all(collection.find({"_id": {"$in": [*ids]}}), len(ids))
        return {document["_id"]: document for document in documents}

    return load


def _by_name(
    collection: Collection, among: Sequence[str], name: str, only: Mapping[str, Any]
) -> "Load[_Place, Document]":
    async def load(places: Sequence[_Place]) -> Mapping[_Place, Document]:
        names = defaultdict(list)
        for place in places:
            names[place.among].append(place.name)
        queries = [
            {**dict(zip(among, values, strict=True)), name: {"$in": wanted}, **only} for values, wanted in names.items()
        ]
        query = queries[0] if len(queries) == 1 else {"$or": queries}
        documents = await _all(collection.find(query), len(places))
        return {_Place(tuple(document[key] for key in among), document[name]): document for document in documents}

    return load


async def _all(cursor: Any, most: int) -> list[Document]:
    try:
        with translated(_AWAY), pymongo.timeout(QUERY_SECONDS):
            documents: list[Document] = await cursor.to_list(most)
            return documents
    except Unavailable as error:
        raise Unavailable(_AWAY) from error  # addresses and the like are for the log and /readyz


Load = Callable[[Sequence[K]], Awaitable[Mapping[K, V]]]
"""Finds the values of many keys at once; keys without one are left out."""


class Merged(Generic[K, V]):
    """Merges lookups into few: those of one loop tick, and those that come while enough queries are under way."""

    def __init__(self, load: Load[K, V], *, most: int = _MERGED, at_once: int = _MERGED_AT_ONCE) -> None:
        self._load = load
        self._most = most
        self._turns = asyncio.Semaphore(at_once)
        self._open: dict[K, list[asyncio.Future[V | None]]] | None = None
        """What the next query will ask for, and who else waits for it."""

    async def get(self, key: K) -> V | None:
        """The key's value. Who asks first asks for all who join before the query is sent."""
        try:
            async with asyncio.timeout(QUERY_SECONDS):
                if self._open is None or len(self._open) >= self._most:
                    return await self._lead(key)
                answer: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
                self._open.setdefault(key, []).append(answer)
                return await answer
        except TimeoutError as error:
            raise Unavailable(_AWAY) from error

    async def _lead(self, key: K) -> V | None:
        joined: dict[K, list[asyncio.Future[V | None]]] = {key: []}
        self._open = joined
        try:
            async with self._turns:
                await asyncio.sleep(0)
                self._close(joined)
                found = await self._load(tuple(joined))
        except BaseException as error:
            self._close(joined)
            reason = error if isinstance(error, Exception) else Unavailable("the query that this one joined broke off")
            for answer in _unanswered(joined):
                answer.set_exception(reason)
            raise
        for wanted, answers in joined.items():
            for answer in answers:
                if not answer.done():
                    answer.set_result(found.get(wanted))
        return found.get(key)

    def _close(self, joined: dict[K, list[asyncio.Future[V | None]]]) -> None:
        if self._open is joined:
            self._open = None


def _unanswered(joined: Mapping[K, Sequence[asyncio.Future[V | None]]]) -> Sequence[asyncio.Future[V | None]]:
    return [answer for answers in joined.values() for answer in answers if not answer.done()]
