"""The log that this version writes for a short fixed history with everything in it: one JSON text per record.

``tests/samples/logs`` keeps what each version wrote. After a change of what is written, keep the new log beside them::

    python -m tests.written_log > tests/samples/logs/<next number>-<what is new>.ndjson
"""

import sys
from datetime import datetime, timedelta

from msgspec import Raw
from msgspec.structs import replace

from ingestor.state import Checkpoint
from ingestor.tenure import Batch, Tenure
from shared.codec import encode_record
from shared.commands import Command, Entity, EpisodeFields, ItemError
from shared.events import LoggedFence, WriterFenced
from shared.ids import CommandId, EventId, StreamId, entity_id
from shared.log import Cursor
from shared.receipts import CommandRefused, Receipt
from tests.builders import batch, delete, item, patch, restore, upsert
from tests.fakes import InMemoryStateStore
from tests.spec import NOON, WEEK

_ODD_METADATA = Raw(b'{"big":18446744073709551616,"tiny":1e-400,"a":{"b":[]},"b":"\\u0000"}')


class WrittenLog:
    """A partition of the events topic in memory. The index of a record is its offset."""

    def __init__(self, began_at: datetime = NOON) -> None:
        self._began_at = began_at
        self.values: list[bytes] = []
        self.store = InMemoryStateStore()
        """The state of the writers, live."""
        self._commands = 0
        self._tenure = self._take_over()

    def write(self, *commands: Command) -> None:
        """Decide the commands, and append what comes of them as one batch."""
        batch = self._decided(*commands)
        self._tenure.settle(batch, self._append(batch))
        self._tenure.store(batch)

    def park(self) -> None:
        """Note a command that could not be read."""
        refused = CommandRefused("validation_error", "It could not be read.")
        receipt = Receipt(command_id=self._next_id(), stream=StreamId(""), event_id=EventId(0), outcome=refused)
        self._tenure.note_poison(receipt, command_offset=self._commands - 1, at=self._began_at, reply_to=None)
        self.write()

    def replace_writer(self, *unheard: Command) -> None:
        """Let another writer take over; the old one appends what comes of ``unheard``, which then did not happen."""
        late = self._decided(*unheard)
        self._commands -= len(unheard)
        self._tenure = self._take_over()
        self._append(late)
        self._tenure = self._take_over()

    def _take_over(self) -> Tenure:
        offset = len(self.values)
        fence = WriterFenced("ingestor-1", f"00000000-0000-4000-8000-{offset:012d}")
        self.values.append(encode_record(LoggedFence(fence), at=self._began_at))
        before = self.store.checkpoint() or Checkpoint(Cursor(), "", -1)
        cursor = Cursor(offset + 1, offset, before.cursor.position)
        return Tenure(self.store, Checkpoint(cursor, fence.nonce, before.command_offset), WEEK)

    def _decided(self, *commands: Command) -> Batch:
        for command in commands:
            numbered = replace(command, command_id=self._next_id())
            at = self._began_at + timedelta(seconds=self._commands)
            self._tenure.decide(numbered, command_offset=self._commands - 1, at=at, reply_to=None)
        return self._tenure.close_batch()

    def _append(self, batch: Batch) -> int:
        offset = len(self.values)
        self.values += [value for _, value, _ in batch.records]
        return offset

    def _next_id(self) -> CommandId:
        self._commands += 1
        return CommandId(f"01980e5a-7c00-7000-8000-{self._commands:012d}")


def written_log() -> WrittenLog:
    """Every type of record, every kind of answer, and records of a writer that was replaced."""
    log = WrittenLog()
    key = {"idempotency_key": "k1", "request_hash": "h1"}
    everything = EpisodeFields(
        description="First light",
        tags=("arm", "calibration"),
        folder="/experiments/batch-1",
        status="running",
        metadata=_ODD_METADATA,
    )
    log.write(
        upsert("run-1", everything, **key),
        upsert("run-2", EpisodeFields(folder="/experiments/batch 2/\N{SNOWMAN}")),
        upsert("run-1", EpisodeFields(folder=None, metadata=Raw(b"null"))),
    )
    log.write(patch("run-1", EpisodeFields(tags=(), status="completed"), new_name="run-1-final"), patch("run-2"))
    log.write(delete("run-2"), upsert("run-2"), restore("run-2", idempotency_key="k2"), restore("run-2", **key))
    log.write(restore("run-2", idempotency_key="k3"), upsert("other", namespace="bob", project="vision"))
    log.park()
    log.replace_writer(delete("run-1-final"), upsert("never", namespace="carol"))
    log.write(
        batch(
            item(
                "Chose CockroachDB.",
                type="decision",
                source="notes",
                author="prashant",
                channel="#payments",
                timestamp=NOON - timedelta(days=30),
                metadata=_ODD_METADATA,
                entities=(Entity(entity_id("acme", "technology", "CockroachDB"), "CockroachDB", "technology"),),
                idempotency_key="note-17",
            ),
            item("\N{PILE OF POO}"),
            namespace="engineering",
            idempotency_key="k4",
            request_hash="h4",
        ),
        batch(item(idempotency_key="note-17"), item("new"), errors=(ItemError(1, "validation_error", "No content"),)),
        batch(item(idempotency_key="note-17"), idempotency_key="k5"),
        batch(item("elsewhere"), tenant_id="globex"),
    )
    log.write(upsert("run-1", everything, **key), delete("run-2"), upsert("last", EpisodeFields(write_protected=True)))
    log.write(patch("last"), upsert("run-3", EpisodeFields(folder="/experiments/batch-1")))
    return log


if __name__ == "__main__":
    sys.stdout.buffer.writelines(value + b"\n" for value in written_log().values)
