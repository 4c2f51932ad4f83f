"""The documents in MongoDB: a `DocumentStore` for each partition, which share what is cheaper to share."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import bson
import structlog
from bson import Timestamp
from bson.errors import BSONError
from msgspec import Struct
from pymongo import InsertOne, ReplaceOne, UpdateOne
from pymongo.client_session import ClientSession
from pymongo.errors import BulkWriteError, ConnectionFailure, DocumentTooLarge, OperationFailure

from projector.documents import REPAIRS, Checkpoint, DocumentRefused, Overtaken, TooMuch, checkpoint_in
from projector.fold import Writes
from projector.together import Together
from projector.views import INDEXES, Document, Documents
from shared.log import Cursor
from shared.mongo import (
    DURABLE,
    META,
    Client,
    ReadConcern,
    blocking_client,
    generation_database,
    translated,
)
from shared.read_models import CHECKPOINTS
from shared.threads import in_thread

_SESSIONS = "projector_sessions"
_OWN, _SHARED = "sessions", "shared"
"""Fields with the sessions of transactions of this partition alone, and of those that it shared with others."""
_NOTED_SESSIONS = 16
_PATIENCE_S = 1.0
_HELD_POLL_S = 0.02
_DUPLICATE_KEY = 11000
_WRITE_CONFLICT = 112
_TOO_LARGE_FOR_CACHE = 394
_MAX_DOCUMENT_BYTES = 16 * 1024 * 1024

_FEW_DOCUMENTS = 64
_FEW_BYTES = 1024 * 1024
"""Of one partition's part in what is shared. What is larger goes its own way, beside others."""
_REST = 4.0
_LONGEST_REST_SECONDS = 0.05

_log = structlog.get_logger(__name__)


class Move(Struct, frozen=True):
    """What a partition wants: its documents written, and its checkpoint moved from ``before`` to ``after``."""

    partition: int
    before: Cursor
    after: Checkpoint
    repairs: int | None
    """How often documents of the partition had been mended in place when it was first asked for its checkpoint."""
    writes: Writes


class Wish(Struct, frozen=True):
    """Documents that a partition asks for, collection → keys, as they were at ``seen_at`` or later."""

    documents: Mapping[str, Sequence[str]]
    seen_at: Timestamp | None


class Generation:
    """The documents of one generation, for all partitions that this process has.

    A transaction, and a query, costs almost as much for one partition as for all. So what is small goes together with
    what other partitions want at that moment, and after a transaction of several commands all of them rest before they
    take more. If one of several cannot be done, each is done alone, and nobody is stopped by another's.
    """

    def __init__(self, client: Client, number: int) -> None:
        self.client = blocking_client(client)
        self.name = generation_database(number)
        self.database = self.client[self.name]
        threads = ThreadPoolExecutor(2, self.name)
        self.write = Together(self._write, threads)
        self.load = Together(self._load, threads)
        self._writes: ClientSession | None = None
        self._noted: set[int] = set()
        """The partitions where the session of ``_writes`` is noted."""
        self._reads: ClientSession | None = None
        self._several = False
        self._rest_until = 0.0

    def note(self, partitions: Iterable[int], session: ClientSession, kind: str) -> None:
        """Note a session that may hold the partitions' checkpoints, for those who may have to end it."""
        change = {"$push": {kind: {"$each": [session.session_id["id"]], "$slice": -_NOTED_SESSIONS}}}
        self.client[META][_SESSIONS].bulk_write(
            [UpdateOne({"_id": f"{self.name}/{partition}"}, change, upsert=True) for partition in partitions],
            ordered=False,
        )

    def opened(self, partition: int, session: ClientSession) -> None:
        """Note the session of a partition's own transactions, and that of the shared ones before the next of them."""
        self._noted.discard(partition)
        self.note([partition], session, _OWN)

    @property
    def session_id(self) -> object:
        """Of the transactions that are shared; none before the first."""
        session = self._writes
        return None if session is None else session.session_id["id"]

    async def rest(self, commands: int) -> None:
        """Wait as long as the last transaction asks for. Whoever came alone with one command does not wait."""
        if commands > 1 or self._several:
            longest = time.monotonic() + _LONGEST_REST_SECONDS
            # Another transaction may make it longer meanwhile: then all come back together.
            while (left := min(self._rest_until, longest) - time.monotonic()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(left)

    def _write(self, moves: Sequence[Move]) -> Timestamp | None:
        """When all of it was done. If it was not, each may be tried alone."""
        began = time.monotonic()
        try:
            session = self._writes = self._writes or self.client.start_session()
            if unknown := {move.partition for move in moves} - self._noted:
                self.note(unknown, session, _SHARED)
                self._noted |= unknown
            transact(self.database, session, moves)
        except Exception as error:
            self._writes = None
            self._noted.clear()
            if isinstance(error, ConnectionFailure):
                raise
            partitions = [move.partition for move in moves]
            _log.info("applying each partition's events alone", partitions=partitions, reason=str(error))
            return None
        ended = time.monotonic()
        self._several = len(moves) > 1
        self._rest_until = ended + min(_REST * (ended - began), _LONGEST_REST_SECONDS)
        return cast("Timestamp", session.operation_time)

    def _load(self, wishes: Sequence["Wish"]) -> Documents | None:
        """All documents that somebody asks for; nothing if that is much."""
        wanted: dict[str, list[str]] = {}
        for wish in wishes:
            for name, keys in wish.documents.items():
                wanted.setdefault(name, []).extend(keys)
        session, self._reads = self._reads or self.client.start_session(), None  # until it is seen to work
        for wish in wishes:
            _see(session, wish.seen_at)
        try:
            found = load(self.database, session, wanted, _FEW_BYTES)
        except TooMuch:
            found = None
        self._reads = session
        return found


@asynccontextmanager
async def open_documents(
    client: Client, number: int, partition: int, generation: Generation | None = None
) -> AsyncIterator["MongoDocumentStore"]:
    """The documents of one partition in a generation, that ``generation`` which its partitions in this process share.

    Raises:
        Unavailable: MongoDB does not answer.
    """
    generation = generation or Generation(client, number)
    with ThreadPoolExecutor(2, f"documents-{number}-{partition}") as threads:
        with translated("opening the read models"):
            reads, writes = [await in_thread(threads, generation.client.start_session) for _ in range(2)]
        try:
            store = MongoDocumentStore(generation, partition, reads, writes, threads)
            with translated("noting the projector's session"):
                await in_thread(threads, lambda: generation.opened(partition, writes))
            yield store
        finally:
            # The session of the writes is noted and may be ended by others: PyMongo must not give it to anyone again.
            await in_thread(threads, reads.end_session)


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
        generation: Generation,
        partition: int,
        reads: ClientSession,
        writes: ClientSession,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._generation = generation
        self._partition = partition
        self._reads = reads
        self._writes = writes
        self._threads = threads
        self._repairs: int | None = None
        self._seen_at: Timestamp | None = None
        """MongoDB's time of our last write, or of the checkpoint that we began with: reads must not be of before."""

    async def checkpoint(self) -> Checkpoint:
        with translated("reading the checkpoint"):
            found = await in_thread(self._threads, self._find_checkpoint)
        repairs = 0 if found is None else found.get(REPAIRS, 0)
        if self._repairs is None:
            self._repairs = repairs
        elif self._repairs != repairs:
            raise Overtaken("documents were mended")
        return Checkpoint() if found is None else checkpoint_in(found)

    def _find_checkpoint(self) -> Document | None:
        _see(self._reads, self._seen_at)
        found = self._generation.database[CHECKPOINTS].find_one({"_id": self._partition}, session=self._reads)
        self._seen_at = cast("Timestamp", self._reads.operation_time)
        return found

    async def load(self, wanted: Mapping[str, Sequence[str]], *, max_bytes: int | None) -> Documents:
        if max_bytes is not None and max_bytes < 0:
            raise TooMuch("the batch is too large without any documents")
        if not wanted:
            return {}
        if sum(map(len, wanted.values())) <= _FEW_DOCUMENTS and (max_bytes is None or max_bytes >= _FEW_BYTES):
            with translated("loading documents"):
                shared = await self._generation.load(Wish(wanted, self._seen_at))
            if shared is not None:
                return {
                    name: {key: shared[name][key] for key in keys if key in shared[name]}
                    for name, keys in wanted.items()
                }
        with translated("loading documents"):
            return await in_thread(self._threads, lambda: self._load(wanted, max_bytes))

    def _load(self, wanted: Mapping[str, Sequence[str]], max_bytes: int | None) -> Documents:
        _see(self._reads, self._seen_at)
        return load(self._generation.database, self._reads, wanted, max_bytes)

    async def apply(self, before: Cursor, after: Checkpoint, writes: Writes) -> None:
        move = Move(self._partition, before, after, self._repairs, writes)
        if _is_small(writes):
            with translated("applying events"):
                seen_at = await self._generation.write(move)
            if seen_at is not None:
                self._seen_at = seen_at
                return None
        held_since = time.monotonic()
        while True:
            try:
                with translated("applying events"), _too_much():
                    return await in_thread(self._threads, lambda: self._apply(move))
            except _CheckpointHeld:
                if time.monotonic() - held_since > _PATIENCE_S:
                    with translated("ending the sessions of projectors that are gone"):
                        await in_thread(self._threads, self._end_other_sessions)
                await asyncio.sleep(_HELD_POLL_S)

    async def rest(self, commands: int) -> None:
        await self._generation.rest(commands)

    def _apply(self, move: Move) -> None:
        transact(self._generation.database, self._writes, [move])
        self._seen_at = cast("Timestamp", self._writes.operation_time)

    def _end_other_sessions(self) -> None:
        noted = self._generation.client[META][_SESSIONS].find_one({"_id": f"{self._generation.name}/{self._partition}"})
        own = (self._writes.session_id["id"], self._generation.session_id)
        sessions = [session for kind in (_OWN, _SHARED) for session in (noted or {}).get(kind, ())]
        others = [{"id": session} for session in sessions if session not in own]
        if others:
            self._generation.client.admin.command("killSessions", others)


def _see(session: ClientSession, seen_at: Timestamp | None) -> None:
    """Let the session's reads see what there was then."""
    if seen_at is not None:
        session.advance_operation_time(seen_at)


def load(
    database: Any, session: ClientSession, wanted: Mapping[str, Sequence[str]], max_bytes: int | None
) -> Documents:
    """Those of the documents ``wanted`` (collection → keys) that exist. Blocks.

    Raises:
        TooMuch: they exceed ``max_bytes``.
    """
    size = 0
    loaded: Documents = {}
    for name, keys in wanted.items():
        found = loaded[name] = {}
        collection = database[name]
        with collection.find_raw_batches({"_id": {"$in": keys}}, batch_size=len(keys), session=session) as cursor:
            for batch in cast("Iterable[bytes]", cursor):
                size += len(batch)
                if max_bytes is not None and size > max_bytes:
                    raise TooMuch(f"the documents exceed {max_bytes} bytes")
                for document in bson.decode_all(batch, collection.codec_options):
                    found[document["_id"]] = document
    return loaded


def transact(database: Any, session: ClientSession, moves: Sequence[Move]) -> None:
    """Do all of it in one transaction. Blocks."""
    new = _all_of(move.writes.new for move in moves)
    changed = _all_of(move.writes.changed for move in moves)
    with session.start_transaction(ReadConcern("snapshot"), DURABLE):
        _move_checkpoints(database, session, moves)
        for name in INDEXES:
            inserted, replaced = new.get(name, {}), changed.get(name, {})
            if inserted or replaced:
                requests: list[InsertOne[Document] | ReplaceOne[Document]] = [
                    *map(InsertOne, inserted.values()),
                    *(ReplaceOne({"_id": key}, document) for key, document in replaced.items()),
                ]
                with _refusals(name, {**inserted, **replaced}):
                    result = database[name].bulk_write(requests, ordered=False, session=session)
                if result.matched_count < len(replaced):
                    _miss(database, session, name, replaced)


def _all_of(parts: Iterable[Documents]) -> Documents:
    """The documents of all partitions; each has its own."""
    found: Documents = {}
    for part in parts:
        for name, documents in part.items():
            found.setdefault(name, {}).update(documents)
    return found


def _move_checkpoints(database: Any, session: ClientSession, moves: Sequence[Move]) -> None:
    try:
        moved = database[CHECKPOINTS].bulk_write([_moving(move) for move in moves], session=session)
    except BulkWriteError as error:
        [failed] = (error.details or {}).get("writeErrors") or [{}]
        if failed.get("code") == _DUPLICATE_KEY:
            raise Overtaken from error
        if failed.get("code") == _WRITE_CONFLICT:
            raise _CheckpointHeld from error
        raise
    except OperationFailure as error:
        if error.code == _WRITE_CONFLICT:
            raise _CheckpointHeld from error
        raise
    if moved.matched_count + moved.upserted_count < len(moves):
        raise Overtaken


def _moving(move: Move) -> UpdateOne:
    after = move.after
    change: Document = {"$set": _fields(after.cursor)}
    if after.stopped is None:
        change["$unset"] = {"stopped": ""}
    else:
        change["$set"]["stopped"] = {
            "offset": after.stopped.offset,
            "reason": after.stopped.reason,
            "at": after.stopped.at,
        }
    unmended = {REPAIRS: move.repairs} if move.repairs else {REPAIRS: {"$exists": False}}
    return UpdateOne(
        {"_id": move.partition, **_fields(move.before), **unmended}, change, upsert=move.before == Cursor()
    )


def _miss(database: Any, session: ClientSession, name: str, changed: Mapping[str, Document]) -> None:
    wanted = {"_id": {"$in": [*changed]}}
    there = {found["_id"] for found in database[name].find(wanted, {"_id": True}, session=session)}
    raise Overtaken(f"somebody removed {name}/{min(changed.keys() - there)}")


def _is_small(writes: Writes) -> bool:
    parts = [there for part in (writes.new, writes.changed) for there in part.values()]
    if sum(map(len, parts)) > _FEW_DOCUMENTS:
        return False
    texts = (value for there in parts for one in there.values() for value in one.values() if isinstance(value, str))
    return sum(map(len, texts)) <= _FEW_BYTES


class _CheckpointHeld(Exception):
    """An open transaction holds the checkpoint. It may move it, or never end."""


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
