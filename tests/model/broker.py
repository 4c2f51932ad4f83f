"""One partition of the events topic as a writer may meet it: appends in one order for all, and nothing else is sure."""

from enum import Enum, auto
from random import Random

from shared.events import LogRecord

from .trace import Trace

LANDS_LATE = "delayed batch of {} lands"

Batch = tuple[LogRecord, ...]


class Fate(Enum):
    """What becomes of a batch that was sent. A batch is atomic: all of its records land together, or none."""

    ACKED = auto()
    ACK_LOST = auto()
    LOST = auto()
    DELAYED = auto()
    """The producer gives up on it, and yet it lands: later, behind others, or never."""
    DUPLICATED = auto()
    """A retry lands as well as the first try; the ack may speak of either."""
    OFFSET_UNKNOWN = auto()
    """A success at offset -1; whether it landed is anyone's guess."""


_MISHAPS = tuple(fate for fate in Fate if fate is not Fate.ACKED)


class Delivery:
    """A batch under way, and what the producer's future says of it."""

    __slots__ = ("base_offset", "batch", "done", "sender")

    def __init__(self, sender: str, batch: Batch) -> None:
        self.sender = sender
        self.batch = batch
        self.done = False
        self.base_offset: int | None = None
        """Once done: the offset that the ack names, or None for an error."""

    def succeed(self, base_offset: int) -> None:
        self.done, self.base_offset = True, base_offset

    def fail(self) -> None:
        self.done = True


class Partition:
    """The log, and the batches on their way to it."""

    def __init__(self, random: Random, trace: Trace) -> None:
        self.records: list[LogRecord] = []
        self._random = random
        self._trace = trace
        self._mishaps = random.choice((0.0, 0.1, 0.3, 0.6))
        self._on_the_way: list[Delivery] = []
        self._delayed: list[Delivery] = []

    def send(self, sender: str, batch: Batch) -> Delivery:
        delivery = Delivery(sender, batch)
        self._on_the_way.append(delivery)
        return delivery

    def deliver(self) -> None:
        """Let one batch meet its fate, most often the oldest."""
        if self._delayed and self._random.random() < 0.2:
            delivery = self._delayed.pop(self._random.randrange(len(self._delayed)))
            self._trace(LANDS_LATE, delivery.sender)
            self._append(delivery)
        elif self._on_the_way:
            overtakes = self._random.random() < self._mishaps
            delivery = self._on_the_way.pop(self._random.randrange(len(self._on_the_way)) if overtakes else 0)
            self._meet(self._random.choice(_MISHAPS) if self._random.random() < self._mishaps else Fate.ACKED, delivery)

    def settle(self) -> None:
        """Trouble is over: what is still under way lands or is lost now, and from here on all goes well."""
        while self._on_the_way:
            self.deliver()
        self._random.shuffle(self._delayed)
        for delivery in self._delayed:
            if self._random.random() < 0.5:
                self._trace(LANDS_LATE, delivery.sender)
                self._append(delivery)
        self._delayed.clear()
        self._mishaps = 0.0

    def _meet(self, fate: Fate, delivery: Delivery) -> None:
        self._trace("{}: batch of {}", fate, delivery.sender)
        match fate:
            case Fate.ACKED:
                delivery.succeed(self._append(delivery))
            case Fate.ACK_LOST:
                self._append(delivery)
                delivery.fail()
            case Fate.LOST:
                delivery.fail()
            case Fate.DELAYED:
                self._delayed.append(delivery)
                delivery.fail()
            case Fate.DUPLICATED:
                delivery.succeed(self._random.choice((self._append(delivery), self._append(delivery))))
            case Fate.OFFSET_UNKNOWN:
                if self._random.random() < 0.5:
                    self._append(delivery)
                delivery.succeed(-1)

    def _append(self, delivery: Delivery) -> int:
        base_offset = len(self.records)
        for offset, record in enumerate(delivery.batch, base_offset):
            self._trace("    log[{}] = {}", offset, record)
        self.records.extend(delivery.batch)
        return base_offset
