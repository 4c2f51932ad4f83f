"""One random history: callers send commands, ingestors come, stall and crash, the broker does what it likes."""

from dataclasses import dataclass
from enum import Enum, auto
from random import Random

from shared.errors import Fenced
from shared.ids import StreamId
from shared.log import accept

from .broker import Partition
from .rules import Auditor, Violation
from .trace import Trace
from .writer import Accept, Answer, Command, StateStore, Steps, Tenure, World

MAX_COMMANDS = 20
MAX_TENURES = 3
"""How many may be alive at once."""
IS_FENCED = "{} ends, fenced"
ENOUGH_STEPS = 300
"""For one writer to finish all commands."""
ZOMBIE_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The protocol of the service; a faulty variant has one part exchanged."""

    accept: Accept = accept
    tenure: type[Tenure] = Tenure
    store: type[StateStore] = StateStore


@dataclass
class Ingestor:
    name: str
    store: StateStore
    backup: StateStore


class Disk(Enum):
    """What a crash leaves of the stored state."""

    KEPT = auto()
    LOST = auto()
    RESTORED = auto()


@dataclass(eq=False)
class Running:
    name: str
    ingestor: Ingestor
    steps: Steps
    pace: float
    """How often it gets its turn, among the others. A slow one becomes a zombie when another takes over."""


class History:
    def __init__(self, seed: int, protocol: Protocol) -> None:
        self.trace = Trace()
        self.random = Random(seed)  # noqa: S311 - a seed has to bring the same history back
        self.protocol = protocol
        self.commands: list[Command] = []
        self.events = Partition(self.random, self.trace)
        self.auditor = Auditor(self.events, protocol.accept)
        self.world = World(
            random=self.random,
            commands=self.commands,
            events=self.events,
            accept=protocol.accept,
            reply=self._reply,
            trace=self.trace,
        )
        self.ingestors = [
            Ingestor(name, protocol.store(), protocol.store()) for name in "ABC"[: self.random.randint(1, 3)]
        ]
        self.running: list[Running] = []
        self._tenures = 0

    def play(self) -> None:
        """Trouble first; then it ends, and one writer finishes all commands; then the zombies awake.

        Raises:
            Violation: a rule was broken.
        """
        for _ in range(self.random.randint(30, 200)):
            self._step()
        zombies = self.running
        self._finish()
        self._awake(zombies)
        self._finish()
        self._check_stores()

    def _step(self) -> None:
        chance = self.random.random()
        if chance < 0.12:
            self._send_command()
        elif chance < 0.50:
            self.events.deliver()
        elif chance < 0.94 and self.running:
            self._go_on(self.random.choices(self.running, [each.pace for each in self.running])[0])
        elif chance < 0.98:
            self._start()
        else:
            self._crash(self.random.choice(self.ingestors))

    def _send_command(self) -> None:
        if len(self.commands) < MAX_COMMANDS:
            command = Command(
                offset=len(self.commands),
                stream=StreamId(self.random.choice(("tenant:a", "tenant:a", "tenant:b"))),
                key=self.random.choice((None, None, "k1", "k2")),
                body=int(self.random.random() < 0.2),
            )
            self.trace("{} is sent", command)
            self.commands.append(command)

    def _start(self) -> None:
        if len(self.running) < MAX_TENURES:
            ingestor = self.random.choice(self.ingestors)
            self._tenures += 1
            name = f"{ingestor.name}{self._tenures}"
            self.trace("{} begins", name)
            tenure = self.protocol.tenure(name, self.world, ingestor.store)
            self.running.append(Running(name, ingestor, tenure.run(), pace=self.random.choice((0.02, 0.3, 1.0))))

    def _go_on(self, running: Running) -> None:
        try:
            next(running.steps)
        except Fenced:
            self.trace(IS_FENCED, running.name)
            self.running.remove(running)

    def _crash(self, ingestor: Ingestor) -> None:
        """Memory is gone; the stored state is kept, or gone too, or an old copy of it is put back."""
        self.running = [each for each in self.running if each.ingestor is not ingestor]
        fate = self.random.choice(tuple(Disk))
        self.trace("{}: {} crashes", fate, ingestor.name)
        match fate:
            case Disk.KEPT:
                ingestor.backup = ingestor.store.copy()
            case Disk.LOST:
                ingestor.store = self.protocol.store()
            case Disk.RESTORED:
                ingestor.store = ingestor.backup.copy()

    def _finish(self) -> None:
        """One writer that nothing befalls finishes all commands."""
        self.trace("trouble ends")
        self.running = []
        self.events.settle()
        self._start()
        for _ in range(ENOUGH_STEPS):
            self.auditor.read_on()
            if all(map(self.auditor.is_done, self.commands)):
                return
            self._go_on_alone()
        raise Violation("commands are left undone, though nothing stands in the way")

    def _go_on_alone(self) -> None:
        [running] = self.running
        self._go_on(running)
        if not self.running:
            raise Violation(f"{running.name} is fenced, though nobody else writes")
        self.events.deliver()

    def _awake(self, zombies: list[Running]) -> None:
        """Stalled writers go on where they were, beside the one that has finished, and all find new commands."""
        self._send_command()
        self._send_command()
        self.running = [*zombies, *self.running]
        for _ in range(ZOMBIE_STEPS):
            if self.running:
                self._go_on(self.random.choice(self.running))
                self.events.deliver()

    def _check_stores(self) -> None:
        for ingestor in self.ingestors:
            self.auditor.check_reader_from(ingestor.store.cursor)
            self.auditor.check_store(ingestor.store)
        self.auditor.check_reader_from(self.random.choice(self.auditor.cursors))

    def _reply(self, writer: str, answer: Answer) -> None:
        self.trace("{}: {} answers {}", answer.code, writer, answer)
        self.auditor.hear(answer)


def check(seed: int, protocol: Protocol) -> History:
    """Play the history of that seed.

    Raises:
        Violation: a rule was broken. The message tells the whole history.
    """
    history = History(seed, protocol)
    try:
        history.play()
    except Violation as violation:
        again = f"MODEL_FIRST_SEED={seed} MODEL_HISTORIES=1 plays it again"
        raise Violation(f"seed {seed}: {violation}\n({again})\n\n{history.trace}") from violation
    return history
