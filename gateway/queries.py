"""Reading what the projector wrote: the port `ReadModels`, and MongoDB behind it. All that the gateway asks MongoDB.

A `ReadModel` is one generation, so an answer that is made from one never mixes two.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import bson
import pymongo
import structlog
from bson.codec_options import CodecOptions
from cachetools import LRUCache

from gateway.paging import Slice
from shared.errors import EpisodesError, Unavailable
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
LARGE = 64 * 1024
"""Bytes of an episode that is not read together with others."""
LARGEST_PAGE = 32 * 1024 * 1024
"""Bytes of the episodes in one page of a list, as MongoDB sends them."""
_POINTER_SECONDS = 0.5
_MERGED = 200
_AT_ONCE = 4
"""Queries for episodes. MongoDB sends at most 16 MiB at a time, so what they hold is bounded too."""
_PAGES_AT_ONCE = 8
_SLOW_SECONDS = 0.05
"""For a lookup of small documents, of which one is under way at a time."""
_LARGE_AT_ONCE = 2
_KNOWN_LARGE = 10_000
LISTED = ("name", "description", "tags", "status", "write_protected", "folder", "created_at", "updated_at")
"""What lists show of an episode, beside its ``_id``."""
_NOT_BUILT = "The read model is not built yet"
_AWAY = "MongoDB does not answer"

K = TypeVar("K")
V = TypeVar("V")
Tell = Callable[[K, V], None]
Load = Callable[[Sequence[K], Tell[K, V]], Awaitable[None]]
"""Looks many keys up and tells the values as they come; nothing is told of keys without one."""


class WaitRoom(Protocol):
    """Waits until there is room for more answers."""

    async def __call__(self, *, large: bool) -> None: ...


_log = structlog.get_logger(__name__)


class PageTooLarge(EpisodesError):
    """The page of a list holds more than an answer may."""

    def __init__(self) -> None:
        super().__init__(f"This page holds more than {LARGEST_PAGE} bytes: ask for a smaller pageSize")


class ReadModel(Protocol):
    """One generation of the read models. Its documents are those of `shared.read_models`; their times are UTC, naive.

    Every method raises `Unavailable` when MongoDB does not answer.
    """

    async def event_id(self, stream: StreamId) -> EventId:
        """The last event of the stream that is in it, 0 for none."""

    async def project(self, namespace: str, slug: str) -> Document | None:
        """The project, with its counts."""

    async def project_episode(self, namespace: str, project: str, name: str) -> Document | None:
        """The living episode of that name."""

    async def project_episodes(self, project_id: str, where: Slice) -> Sequence[Document]:
        """Living episodes in the order of their making, as far as lists show them: without metadata.

        Raises:
            PageTooLarge: they are too long.
        """

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

    def __init__(self, client: Client, wait_room: WaitRoom) -> None:
        self._client = client
        self._wait_room = wait_room
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
            self._current = generation, MongoReadModel(self._client[generation_database(generation)], self._wait_room)
            _log.info("reading generation", generation=generation)
        return None


class _Place(NamedTuple):
    """Where something with a name is: documents are found together that differ in the name only."""

    among: tuple[str, ...]
    name: str


class MongoReadModel:
    """One database. Lookups that come at the same time share one query; large episodes are read a few at a time."""

    def __init__(self, database: Database, wait_room: WaitRoom) -> None:
        self._episodes = database[PROJECT_EPISODES]
        self._wait_room = wait_room
        self._pages = asyncio.Semaphore(_PAGES_AT_ONCE)
        large = asyncio.Semaphore(_LARGE_AT_ONCE)
        streams = _ById(database[STREAMS])
        projects = _ByName(database[PROJECTS], ("namespace",), "slug", {})
        project_episodes = _ByName(self._episodes, ("namespace", "project"), "name", {"deleted": False})
        tenant_episodes = _ById(database[TENANT_EPISODES])
        self._stream = Merged(streams.load, at_once=1, patience=_SLOW_SECONDS)
        self._project = Merged(projects.load, at_once=1, patience=_SLOW_SECONDS)
        self._project_episode = Episodes(project_episodes, large, wait_room)
        self._tenant_episode = Episodes(tenant_episodes, large, wait_room)

    async def event_id(self, stream: StreamId) -> EventId:
        document = await self._stream.get(stream)
        return EventId(0 if document is None else document["event_id"])

    async def project(self, namespace: str, slug: str) -> Document | None:
        return await self._project.get(_Place((namespace,), slug))

    async def project_episode(self, namespace: str, project: str, name: str) -> Document | None:
        return await self._project_episode.get(_Place((namespace, project), name))

    async def project_episodes(self, project_id: str, where: Slice) -> Sequence[Document]:
        living = {"project_id": project_id, "deleted": False, "ordinal": {"$gt": where.after}}
        page = {"sort": [("ordinal", 1)], "skip": where.skip, "limit": where.limit}
        found: list[Document] = []
        left = LARGEST_PAGE

        def take(batch: bytes) -> None:
            nonlocal left
            left -= len(batch)
            if left < 0:
                raise PageTooLarge
            found.extend(bson.decode_all(batch, _NAIVE))

        async with _in_time(), self._pages:
            await self._wait_room(large=False)
            await _read(self._episodes, living, take, projection=LISTED, **page)
        return found

    async def tenant_episode(self, tenant_id: str, episode_id: str) -> Document | None:
        document = await self._tenant_episode.get(episode_id)
        return document if document is not None and document["tenant_id"] == tenant_id else None


class _ById:
    """Documents by their ``_id``."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection

    async def load(self, ids: Sequence[str], tell: "Tell[str, Document]") -> None:
        query = {"_id": {"$in": [*ids]}}
        await _read(self._collection, query, _each(lambda document: tell(document["_id"], document)))


class _ByName:
    """Documents by their names and what those are in."""

    def __init__(self, collection: Collection, among: Sequence[str], name: str, only: Mapping[str, Any]) -> None:
        self._collection = collection
        self._among = among
        self._name = name
        self._only = only

    async def load(self, places: Sequence[_Place], tell: "Tell[_Place, Document]") -> None:
        names = defaultdict(list)
        for place in places:
            names[place.among].append(place.name)
        queries = [
            {**dict(zip(self._among, values, strict=True)), self._name: {"$in": wanted}, **self._only}
            for values, wanted in names.items()
        ]
        query = queries[0] if len(queries) == 1 else {"$or": queries}
        await _read(self._collection, query, _each(lambda document: tell(self._place(document), document)))

    def _place(self, document: Document) -> _Place:
        return _Place(tuple(document[key] for key in self._among), document[self._name])


class Find(Protocol[K]):
    """A way to find documents."""

    async def load(self, keys: Sequence[K], tell: "Tell[K, Document]") -> None: ...


class Episodes(Generic[K]):
    """Single episodes. Large ones are read once more, a few at a time and when there is room for their answers."""

    def __init__(self, find: Find[K], turns: asyncio.Semaphore, wait_room: WaitRoom) -> None:
        self._find = find
        self._turns = turns
        self._wait_room = wait_room
        self._merged = Merged(self._load)
        self._known_large: LRUCache[K, bool] = LRUCache(_KNOWN_LARGE)

    async def get(self, key: K) -> Document | None:
        if key not in self._known_large:
            document = await self._merged.get(key)
            if document is not _TOO_LARGE_TO_MERGE:
                return document
            self._known_large[key] = True
        found: list[Document] = []
        async with _in_time(), self._turns:
            await self._wait_room(large=True)
            await self._find.load([key], lambda _, document: found.append(document))
        return found[0] if found else None

    async def _load(self, keys: Sequence[K], tell: "Tell[K, Document]") -> None:
        await self._wait_room(large=False)
        await self._find.load(
            keys, lambda key, document: tell(key, document if _length(document) < LARGE else _TOO_LARGE_TO_MERGE)
        )


_TOO_LARGE_TO_MERGE: Document = {}


def _length(episode: Document) -> int:
    """About how many bytes an answer with it has."""
    texts = (episode.get(name) or "" for name in ("metadata", "description", "content"))
    return sum(map(len, texts)) + sum(map(len, episode.get("tags", ())))


_NAIVE: CodecOptions[Document] = CodecOptions(tz_aware=False)
"""A time zone for every time takes longer than all else of a document."""


async def _read(
    collection: Collection, query: Mapping[str, Any], take: Callable[[bytes], None], **options: Any
) -> None:
    """Hand on what MongoDB sends, still encoded, as it comes: all can be larger than memory.

    Motor's own cursor hands documents out one by one, which takes longer than decoding them.
    """
    try:
        with translated(_AWAY), pymongo.timeout(QUERY_SECONDS):
            async for batch in collection.find_raw_batches(query, **options):
                take(batch)
                del batch  # before the next one comes
    except Unavailable as error:
        raise Unavailable(_AWAY) from error  # addresses and the like are for the log and /readyz


def _each(tell: Callable[[Document], None]) -> Callable[[bytes], None]:
    """Tells the documents of each batch one by one."""

    def take(batch: bytes) -> None:
        for document in bson.decode_all(batch, _NAIVE):
            tell(document)

    return take


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(QUERY_SECONDS):
            yield
    except TimeoutError as error:
        raise Unavailable(_AWAY) from error


class Merged(Generic[K, V]):
    """Merges lookups into few: those of one loop tick, and those that come while ``at_once`` queries are under way.

    With one at a time a query asks for all that came during the one before, as a database's group commit does. Small
    documents that every read asks for are best looked up so, with ``patience``: after so many seconds a query no longer
    keeps the next one waiting.
    """

    def __init__(
        self, load: Load[K, V], *, most: int = _MERGED, at_once: int = _AT_ONCE, patience: float | None = None
    ) -> None:
        self._load = load
        self._most = most
        self._turns = asyncio.Semaphore(at_once)
        self._patience = patience
        self._open: dict[K, list[asyncio.Future[V | None]]] | None = None
        """What the next query will ask for, and who else waits for it."""

    async def get(self, key: K) -> V | None:
        """The key's value. Who asks first asks for all who join before the query is sent, and has begun before them."""
        if self._open is None or len(self._open) >= self._most:
            async with _in_time():
                return await self._lead(key)
        answer: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        self._open.setdefault(key, []).append(answer)
        return await answer

    async def _lead(self, key: K) -> V | None:
        mine: asyncio.Future[V | None] = asyncio.get_running_loop().create_future()
        joined: dict[K, list[asyncio.Future[V | None]]] = {key: [mine]}
        self._open = joined

        def tell(found: K, value: V) -> None:
            for answer in joined.pop(found, ()):
                if not answer.done():
                    answer.set_result(value)

        try:
            async with self._turn():
                await asyncio.sleep(0)
                self._close(joined)
                await self._load(tuple(joined), tell)
        except BaseException as error:
            self._close(joined)
            mine.cancel()
            reason = error if isinstance(error, Exception) else Unavailable("the query that this one joined broke off")
            for answer in _unanswered(joined):
                answer.set_exception(reason)
            raise
        for answer in _unanswered(joined):
            answer.set_result(None)
        return mine.result()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """It is over with the query, or with our patience."""
        await self._turns.acquire()
        over = False

        def end() -> None:
            nonlocal over
            if not over:
                over = True
                self._turns.release()

        patience = None if self._patience is None else asyncio.get_running_loop().call_later(self._patience, end)
        try:
            yield
        finally:
            if patience is not None:
                patience.cancel()
            end()

    def _close(self, joined: dict[K, list[asyncio.Future[V | None]]]) -> None:
        if self._open is joined:
            self._open = None


def _unanswered(joined: Mapping[K, Sequence[asyncio.Future[V | None]]]) -> Sequence[asyncio.Future[V | None]]:
    return [answer for answers in joined.values() for answer in answers if not answer.done()]
