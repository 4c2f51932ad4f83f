"""Documents into MongoDB by `bulk_write`, each batch in one transaction with a checkpoint, and nothing else.

The floor of a projector that applies each event exactly once. The documents are there already; blocking PyMongo, for
nothing goes on beside it. Row 6 runs it in a process of its own that is tuned as the projector is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pymongo import InsertOne, MongoClient, ReplaceOne, WriteConcern
from pymongo.read_concern import ReadConcern

Document = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """What one transaction writes. Each maps a collection to its documents by ``_id``."""

    new: Mapping[str, Mapping[str, Document]] = field(default_factory=dict)
    changed: Mapping[str, Mapping[str, Document]] = field(default_factory=dict)


def write(client: "MongoClient[Document]", database: str, batches: Sequence[Batch]) -> None:
    """Write the batches one after the other, with ``w: majority`` and ``j: true``."""
    there = client[database]
    with client.start_session() as session:
        for number, batch in enumerate(batches):
            with session.start_transaction(ReadConcern("snapshot"), WriteConcern(w="majority", j=True)):
                there.checkpoints.update_one({"_id": 0}, {"$set": {"position": number}}, upsert=True, session=session)
                for name in {**batch.new, **batch.changed}:
                    requests = [InsertOne(one) for one in batch.new.get(name, {}).values()] + [
                        ReplaceOne({"_id": key}, one) for key, one in batch.changed.get(name, {}).items()
                    ]
                    if requests:
                        there[name].bulk_write(requests, ordered=False, session=session)
