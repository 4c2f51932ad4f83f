"""Where the documents are kept, along with the checkpoint up to which the log is folded into them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import Protocol, TypeVar, cast

import bson
from bson import Timestamp
from bson.errors import BSONError
from msgspec import Struct
from pymongo import InsertOne, ReplaceOne
from pymongo.client_session import ClientSession
from pymongo.errors import BulkWriteError, DocumentTooLarge, DuplicateKeyError, OperationFailure

from projector.fold import Writes
from projector.views import INDEXES, Document, Documents
from shared.errors import EpisodesError
from shared.ids import Position
from shared.log import Cursor
from shared.mongo import (
    DURABLE,
    META,
    BlockingClient,
    Client,
    Database,
    ReadConcern,
    blocking_client,
    generation_database,
    translated,
)
from shared.read_models import CHECKPOINTS, POINTER_ID, POINTERS

REPAIRS = "repairs"
"""The field of a checkpoint that counts how often documents were mended in place, see `projector.repair`."""

T = TypeVar("T")


class Stopped(Struct, frozen=True):
    """Why a partition does not go on: the record at ``offset`` cannot be applied."""

    offset: int
    reason: str
    at: datetime


class Checkpoint(Struct, frozen=True):
    """How far a partition is folded into the documents."""

    cursor: Cursor = Cursor()
    stopped: Stopped | None = None


class Overtaken(EpisodesError):
    """Another projector moved the checkpoint: go on from where it is now."""


class TooMuch(EpisodesError):
    """More than can be done at once. Less of it may go."""


class DocumentRefused(EpisodesError):
    """A document that cannot be stored: too large, a value that the database does not have, or there already."""

    def __init__(self, collection: str, key: str, reason: str) -> None:
        super().__init__(f"{collection}/{key} cannot be stored: {reason}")
        self.collection = collection
        self.key = key


class DocumentStore(Protocol):
    """The documents that one partition of the log makes."""

    async def checkpoint(self) -> Checkpoint:
        """How far the documents are. At the start of the log if nothing is stored yet.

        Raises:
            Overtaken: documents were mended in place since the first call: what was loaded before is not good any more.
            Unavailable: the database does not answer.
        """
        ...

    async def load(self, wanted: Mapping[str, Sequence[str]], *, max_bytes: int | None) -> Documents:
        """Those of the documents ``wanted`` (collection → keys) that exist.

        Raises:
            TooMuch: they exceed ``max_bytes``.
            Unavailable: the database does not answer.
        """
        ...

    async def apply(self, before: Cursor, after: Checkpoint, writes: Writes) -> None:
        """Write the documents and move the checkpoint from ``before`` to ``after``: both, or neither.

        Raises:
            Overtaken: the checkpoint is not at ``before``, or documents were mended in place meanwhile.
            DocumentRefused: a document cannot be stored.
            TooMuch: the database would not take them all in one transaction.
            Unavailable: the database does not answer. It may have happened.
        """
        ...


_NAMESPACE_EXISTS = 48


async def create_collection(database: Database, collection: str) -> None:
    """Create a collection, unless somebody else is quicker."""
    try:
        await database.create_collection(collection, check_exists=False)
    except OperationFailure as error:
        if error.code != _NAMESPACE_EXISTS:  # another projector was quicker
            raise


async def read_checkpoints(client: Client) -> tuple[int, dict[int, Checkpoint]]:
    """Give the generation in use and the checkpoints in it, by partition.

    Raises:
        Unavailable: MongoDB does not answer.
    """
    with translated("reading the checkpoints"):
        pointer = await client[META][POINTERS].find_one({"_id": POINTER_ID})
        generation: int = 1 if pointer is None else pointer["generation"]
        database: Database = client[generation_database(generation)]
        checkpoints = {found["_id"]: checkpoint_in(found) async for found in database[CHECKPOINTS].find()}
    return generation, checkpoints


@asynccontextmanager
async def open_documents(client: Client, generation: int, partition: int) -> AsyncIterator["MongoDocumentStore"]:
    """The documents of one partition in one generation.

    Raises:
        Unavailable: MongoDB does not answer.
    """
    blocking = blocking_client(client)
    with ThreadPoolExecutor(2, f"documents-{generation}-{partition}") as threads:
        with translated("opening the read models"):
            reads, writes = [await _in_thread(threads, blocking.start_session) for _ in range(2)]
        try:
            store = MongoDocumentStore(blocking, generation_database(generation), partition, reads, writes, threads)
            await store.register()
            yield store
        finally:
            await _in_thread(threads, writes.end_session)
            await _in_thread(threads, reads.end_session)


class MongoDocumentStore:
    """A `DocumentStore` in one database of MongoDB.

    Every batch is one transaction that begins with the compare-and-set of the checkpoint, so that rivals meet there and
    nowhere else. Reads go through a causally consistent session that knows our last write: after a failover a server
    that has not got it cannot answer them.

    A transaction's statements follow each other in a thread: between any two of them, an event loop that prepares the
    next batch would keep MongoDB waiting.

    MongoDB keeps the transaction of a client that was killed open for a minute, and with it the checkpoint. So each
    store notes its session where the next one finds it, and a checkpoint that is held without being moved for
    ``_PATIENCE_S`` is freed by ending the sessions noted by others.
    """

    def __init__(
        self,
        client: BlockingClient,
        database: str,
        partition: int,
        reads: ClientSession,
        writes: ClientSession,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._client = client
        self._database = client[database]
        self._checkpoints = self._database[CHECKPOINTS]
        self._sessions = client[META][_SESSIONS]
        self._partition = partition
        self._sessions_key = f"{database}/{partition}"
        self._reads = reads
        self._writes = writes
        self._threads = threads
        self._own_session = writes.session_id["id"]
        self._repairs: int | None = None
        """How often documents of this partition had been mended in place when this store was first asked."""

    async def register(self) -> None:
        """Note our session for those who may have to end it."""
        with translated("noting the projector's session"):
            await _in_thread(self._threads, self._register)

    def _register(self) -> None:
        self._sessions.update_one(
            {"_id": self._sessions_key},
            {"$push": {"sessions": {"$each": [self._own_session], "$slice": -_NOTED_SESSIONS}}},
            upsert=True,
        )

    async def checkpoint(self) -> Checkpoint:
        with translated("reading the checkpoint"):
            found = await _in_thread(
                self._threads, lambda: self._checkpoints.find_one({"_id": self._partition}, session=self._reads)
            )
        if found is None:
            return Checkpoint()
        if self._repairs is None:
            self._repairs = found.get(REPAIRS, 0)
        elif self._repairs != found.get(REPAIRS, 0):
            raise Overtaken
        return checkpoint_in(found)

    async def load(self, wanted: Mapping[str, Sequence[str]], *, max_bytes: int | None) -> Documents:
        if max_bytes is not None and max_bytes < 0:
            raise TooMuch("the batch is too large without any documents")
        with translated("loading documents"):
            return await _in_thread(self._threads, lambda: self._load(wanted, max_bytes))

    def _load(self, wanted: Mapping[str, Sequence[str]], max_bytes: int | None) -> Documents:
        size = 0
        loaded: Documents = {}
        for name, keys in wanted.items():
            found = loaded[name] = {}
            collection = self._database[name]
            with collection.find_raw_batches(
                {"_id": {"$in": keys}}, batch_size=len(keys), session=self._reads
            ) as cursor:
                for batch in cast("Iterable[bytes]", cursor):
                    size += len(batch)
                    if max_bytes is not None and size > max_bytes:
                        raise TooMuch(f"the documents exceed {max_bytes} bytes")
                    for document in bson.decode_all(batch, collection.codec_options):
                        found[document["_id"]] = document
        return loaded

    async def apply(self, before: Cursor, after: Checkpoint, writes: Writes) -> None:
        held_since = time.monotonic()
        while True:
            try:
                with translated("applying events"), _too_much():
                    return await _in_thread(self._threads, lambda: self._apply(before, after, writes))
            except _CheckpointHeld:
                if time.monotonic() - held_since > _PATIENCE_S:
                    with translated("ending the sessions of projectors that are gone"):
                        await _in_thread(self._threads, self._end_other_sessions)
                await asyncio.sleep(_HELD_POLL_S)

    def _apply(self, before: Cursor, after: Checkpoint, writes: Writes) -> None:
        with self._writes.start_transaction(ReadConcern("snapshot"), DURABLE):
            self._move_checkpoint(before, after)
            for name in INDEXES:
                new, changed = writes.new.get(name, {}), writes.changed.get(name, {})
                if new or changed:
                    requests: list[InsertOne[Document] | ReplaceOne[Document]] = [
                        *map(InsertOne, new.values()),
                        *(ReplaceOne({"_id": key}, document) for key, document in changed.items()),
                    ]
                    with _refusals(name, {**new, **changed}):
                        result = self._database[name].bulk_write(requests, ordered=False, session=self._writes)
                    if result.matched_count < len(changed):
                        self._miss(name, changed)
        self._reads.advance_operation_time(cast("Timestamp", self._writes.operation_time))

    def _move_checkpoint(self, before: Cursor, after: Checkpoint) -> None:
        change: Document = {"$set": _fields(after.cursor)}
        if after.stopped is None:
            change["$unset"] = {"stopped": ""}
        else:
            change["$set"]["stopped"] = {
                "offset": after.stopped.offset,
                "reason": after.stopped.reason,
                "at": after.stopped.at,
            }
        unmended = {REPAIRS: self._repairs} if self._repairs else {REPAIRS: {"$exists": False}}
        try:
            moved = self._checkpoints.update_one(
                {"_id": self._partition, **_fields(before), **unmended},
                change,
                upsert=before == Cursor(),
                session=self._writes,
            )
        except DuplicateKeyError as error:
            raise Overtaken from error
        except OperationFailure as error:
            if error.code == _WRITE_CONFLICT:
                raise _CheckpointHeld from error
            raise
        if moved.matched_count == 0 and moved.upserted_id is None:
            raise Overtaken

    def _miss(self, name: str, changed: Mapping[str, Document]) -> None:
        wanted = {"_id": {"$in": [*changed]}}
        there = {found["_id"] for found in self._database[name].find(wanted, {"_id": True}, session=self._writes)}
        raise DocumentRefused(name, min(changed.keys() - there), "somebody removed it")

    def _end_other_sessions(self) -> None:
        noted = self._sessions.find_one({"_id": self._sessions_key})
        others = [{"id": session} for session in (noted or {}).get("sessions", ()) if session != self._own_session]
        if others:
            self._client.admin.command("killSessions", others)


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """What the work comes to. Cancelled, this waits until it is over: nobody may use its session meanwhile."""
    running = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # it was looked at; being cancelled comes first
        raise


_SESSIONS = "projector_sessions"
_NOTED_SESSIONS = 16
_PATIENCE_S = 1.0
_HELD_POLL_S = 0.02
_WRITE_CONFLICT = 112
_TOO_LARGE_FOR_CACHE = 394
_MAX_DOCUMENT_BYTES = 16 * 1024 * 1024


class _CheckpointHeld(Exception):
    """An open transaction holds the checkpoint. It may move it, or never end."""


def checkpoint_in(found: Document) -> Checkpoint:
    """The checkpoint in its document."""
    stopped = found.get("stopped")
    return Checkpoint(
        Cursor(found["offset"], found["fence"], Position(found["position"])),
        None if stopped is None else Stopped(stopped["offset"], stopped["reason"], stopped["at"]),
    )


def _fields(cursor: Cursor) -> Document:
    return {"position": cursor.position, "offset": cursor.offset, "fence": cursor.fence}


@contextmanager
def _too_much() -> Iterator[None]:
    # Rivals meet at the checkpoint. A conflict after it, at the commit mostly, comes from a cache that is too small.
    try:
        yield
    except OperationFailure as error:
        if error.code in (_WRITE_CONFLICT, _TOO_LARGE_FOR_CACHE):
            raise TooMuch(f"MongoDB rolled the transaction back: {error}") from error
        raise


@contextmanager
def _refusals(collection: str, documents: Mapping[str, Document]) -> Iterator[None]:
    try:
        yield
    except BulkWriteError as error:
        failed = (error.details or {}).get("writeErrors") or []
        if not failed or error.has_error_label("TransientTransactionError"):
            raise
        operation = failed[0]["op"]
        key = operation["q"]["_id"] if "q" in operation else operation["_id"]
        raise DocumentRefused(collection, key, failed[0]["errmsg"]) from error
    except (BSONError, DocumentTooLarge, OperationFailure, OverflowError, UnicodeError) as error:
        for key, document in documents.items():
            if reason := _unfit(document):
                raise DocumentRefused(collection, key, reason) from error
        raise


def _unfit(document: Document) -> str | None:
    try:
        size = len(bson.encode(document))
    except (BSONError, OverflowError, UnicodeError) as error:
        return str(error)
    return f"{size} bytes, MongoDB takes {_MAX_DOCUMENT_BYTES}" if size > _MAX_DOCUMENT_BYTES else None
