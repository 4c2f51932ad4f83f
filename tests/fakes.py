"""Stand-ins for ports, held to the same contracts as the real adapters (tests/contract)."""

from datetime import datetime

from ingestor.domain.state import Changes, Key, StoredReceipt, Value
from ingestor.state import Checkpoint


class InMemoryStateStore:
    """The ingestor's state in a dict."""

    def __init__(self) -> None:
        self.values: dict[Key, Value] = {}
        self._checkpoint: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint | None:
        return self._checkpoint

    def get(self, key: Key) -> Value | None:
        return self.values.get(key)

    def apply(self, changes: Changes, checkpoint: Checkpoint) -> None:
        for key, value in changes.items():
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value
        self._checkpoint = checkpoint

    def forget_receipts(self, before: datetime) -> None:
        for key, value in list(self.values.items()):
            if isinstance(value, StoredReceipt) and value.at < before:
                del self.values[key]

    def clear(self) -> None:
        self.values.clear()
        self._checkpoint = None
