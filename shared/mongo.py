"""MongoDB through Motor and PyMongo, in this one module, and MongoDB's errors in our words."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from pymongo import MongoClient, WriteConcern
from pymongo.errors import ConfigurationError, ConnectionFailure, ExecutionTimeout, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

from shared.errors import Unavailable
from shared.settings import MongoSettings

# Read by Motor when it is imported. Its own five threads a core would let slow reads keep all others waiting.
os.environ.setdefault("MOTOR_MAX_WORKERS", "32")

from motor.motor_asyncio import (
    AsyncIOMotorClient,
    AsyncIOMotorClientSession,
    AsyncIOMotorCollection,
    AsyncIOMotorDatabase,
)

Document = dict[str, Any]
Client = AsyncIOMotorClient[Document]
BlockingClient = MongoClient[Document]
Database = AsyncIOMotorDatabase[Document]
Collection = AsyncIOMotorCollection[Document]
Session = AsyncIOMotorClientSession

META = "episodes_meta"
"""The database with the pointer to the generation in use."""

DURABLE = WriteConcern(w="majority", j=True)
QUICK = WriteConcern(w=1, j=False)
"""For what may be lost, because something that is written `DURABLE` behind it says whether it is there."""

_PASSING_LABELS = ("TransientTransactionError", "UnknownTransactionCommitResult", "RetryableWriteError")


def generation_database(generation: int) -> str:
    """Name of the database that holds one complete set of read models."""
    return f"episodes_g{generation}"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise MongoDB's passing errors in our words; others are bugs and stay as they are.

    Raises:
        Unavailable: MongoDB does not answer, has no primary, or aborted a transaction that may be tried again.
    """
    try:
        yield
    except PyMongoError as error:
        passing = (
            isinstance(error, ConnectionFailure | ExecutionTimeout)
            or any(error.has_error_label(label) for label in _PASSING_LABELS)
            or (isinstance(error, OperationFailure) and not _PASSING_CODES.isdisjoint(_codes(error)))
            or (
                isinstance(error, ConfigurationError) and "Sessions are not supported" in str(error)
            )  # no replica set yet
        )
        if not passing:
            raise
        raise Unavailable(f"{what}: {str(error).partition(', Timeout:')[0]}") from error


def _codes(error: OperationFailure) -> set[int | None]:
    """The error's code and, of a bulk of writes, those of the writes that failed."""
    return {error.code, *(failed["code"] for failed in (error.details or {}).get("writeErrors", ()))}


_PASSING_CODES = frozenset(
    {6, 7, 43, 89, 91, 112, 175, 189, 215, 237, 262, 9001, 10107, 11600, 11601, 11602, 13435, 13436}
)
"""HostUnreachable, HostNotFound, NetworkTimeout, shutting down, WriteConflict, stepped down, a database that is being
dropped, a cursor that is gone because of such things, interrupted, not primary and kin."""


@asynccontextmanager
async def open_mongo(settings: MongoSettings, *, timeout_ms: int = 2_000) -> AsyncIterator[Client]:
    """A client for the replica set. It connects when first used; a server that is away fails after ``timeout_ms``."""
    client: Client = AsyncIOMotorClient(
        settings.url,
        tz_aware=True,
        serverSelectionTimeoutMS=timeout_ms,
        connectTimeoutMS=timeout_ms,
        socketTimeoutMS=30_000,
        maxPoolSize=50,
        w="majority",
        journal=True,
        readConcernLevel="majority",
    )
    try:
        yield client
    finally:
        client.close()


def blocking_client(client: Client) -> BlockingClient:
    """The client that ``client`` itself uses, from threads. Its calls block."""
    blocking: BlockingClient = client.delegate
    return blocking


@contextmanager
def open_blocking_mongo(settings: MongoSettings) -> Iterator[BlockingClient]:
    """A client for a process that does nothing else: its calls block."""
    with MongoClient[Document](
        settings.url, tz_aware=True, serverSelectionTimeoutMS=2_000, socketTimeoutMS=30_000
    ) as client:
        yield client


__all__ = [
    "DURABLE",
    "META",
    "QUICK",
    "BlockingClient",
    "Client",
    "Collection",
    "Database",
    "Document",
    "ReadConcern",
    "Session",
    "blocking_client",
    "generation_database",
    "open_blocking_mongo",
    "open_mongo",
    "translated",
]
