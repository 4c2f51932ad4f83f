"""Where the documents are kept, along with the checkpoint up to which the log is folded into them: what it must do."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

from msgspec import Struct
from pymongo.errors import OperationFailure

from projector.fold import Writes
from projector.views import Document, Documents
from shared.errors import EpisodesError
from shared.ids import Position
from shared.log import Cursor
from shared.mongo import META, Client, Database, generation_database, translated
from shared.read_models import CHECKPOINTS, POINTER_ID, POINTERS

REPAIRS = "repairs"
"""The field of a checkpoint that counts how often documents were mended in place, see `projector.repair`."""


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
    """What is stored is not what it was, because of another projector or a person: go on from what is there now."""

    def __init__(self, reason: str = "another projector is ahead") -> None:
        super().__init__(reason)


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
            Overtaken: the checkpoint is not at ``before``, documents were mended in place meanwhile, or one that is to
                be replaced is gone.
            DocumentRefused: a document cannot be stored.
            TooMuch: the database would not take them all in one transaction.
            Unavailable: the database does not answer. It may have happened.
        """
        ...

    async def rest(self, commands: int) -> None:
        """Wait as long as it is better to, after so many commands were applied, before more are taken."""
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


def checkpoint_in(found: Document) -> Checkpoint:
    """The checkpoint in its document."""
    stopped = found.get("stopped")
    return Checkpoint(
        Cursor(found["offset"], found["fence"], Position(found["position"])),
        None if stopped is None else Stopped(stopped["offset"], stopped["reason"], stopped["at"]),
    )
