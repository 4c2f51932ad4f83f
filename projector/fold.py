"""A batch of commands folded into the documents that it touches. Pure; what is stored comes in from outside."""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from projector.views import Document, Documents, no_documents, project, touched
from shared.errors import PoisonRecord
from shared.events import LoggedEvent
from shared.log import Commit
from shared.read_models import ENTITIES, PROJECTS, STREAMS

TOUCHED_OFTEN = (STREAMS, PROJECTS, ENTITIES)
"""Collections whose documents are small, and change with many commands."""
_REMEMBERED = 1_000

Touches = Mapping[str, Mapping[str, bool]]
"""Collection → key → whether the batch brings the document into being."""


class Writes(Struct, frozen=True):
    """Whole documents: those that are new, and those that take the place of an older state of themselves."""

    new: Documents
    changed: Documents


class Memory:
    """Documents that are touched often, as the last batches left them, so that they need not be loaded again.

    They are right for as long as nobody else writes them: the checkpoint's compare-and-set fails otherwise.
    """

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._documents: dict[tuple[str, str], Document] = {}
        """By collection and key, those that were written longest ago first."""

    def beside(self, writes: Writes, touches: Touches) -> Writes:
        """What was just written, and of the rest what is touched and remembered."""
        changed = dict(writes.changed)
        for name in TOUCHED_OFTEN:
            found = {key: self._documents[name, key] for key in touches[name] if (name, key) in self._documents}
            if found:
                changed[name] = {**found, **changed.get(name, {})}
        return Writes(writes.new, changed)

    def note(self, writes: Writes) -> None:
        """Remember what a batch wrote."""
        for name in TOUCHED_OFTEN:
            for part in (writes.new, writes.changed):
                for key, document in part.get(name, {}).items():
                    self._documents.pop((name, key), None)
                    self._documents[name, key] = document
        while len(self._documents) > self._most:
            del self._documents[next(iter(self._documents))]


class Inapplicable(Exception):
    """An event, at ``offset`` and in the batch's command number ``index``, that does not fit the documents."""

    def __init__(self, index: int, offset: int, description: str) -> None:
        super().__init__(description)
        self.index = index
        self.offset = offset


def touched_by(commits: Iterable[Commit]) -> Touches:
    """The documents that the batch touches."""
    touches: dict[str, dict[str, bool]] = {collection: {} for collection in no_documents()}
    for commit in commits:
        for logged in commit.events:
            for collection, key, is_new in touched(logged):
                touches[collection].setdefault(key, is_new)
    return touches


def missing(touches: Touches, known: Writes) -> dict[str, list[str]]:
    """Those that must be loaded: they may exist, and are not among those just written."""
    missing: dict[str, list[str]] = {}
    for collection, keys in touches.items():
        new, changed = known.new.get(collection, {}), known.changed.get(collection, {})
        if wanted := [key for key, is_new in keys.items() if not is_new and key not in new and key not in changed]:
            missing[collection] = wanted
    return missing


def weight(touches: Touches, known: Writes) -> int:
    """About how many bytes of text those among the just written hold."""
    return sum(
        len(value)
        for source in (known.new, known.changed)
        for collection, there in source.items()
        for key in there.keys() & touches[collection].keys()
        for value in there[key].values()
        if isinstance(value, str)
    )


def found(touches: Touches, known: Writes, loaded: Documents) -> Documents:
    """Those that exist, as they are before the batch."""
    documents = no_documents()
    for source in (known.new, known.changed, loaded):
        for collection, there in source.items():
            keys = touches[collection]
            documents[collection].update((key, there[key]) for key in there.keys() & keys.keys())
    return documents


def fold(before: Documents, commits: Sequence[Commit]) -> Writes:
    """What to write, given the touched documents as they are before the batch.

    Raises:
        Inapplicable: an event does not fit. The commands before its own do.
    """
    documents = {collection: dict(there) for collection, there in before.items()}
    for index, commit in enumerate(commits):
        for number, logged in enumerate(commit.events):
            try:
                project(documents, logged)
            except PoisonRecord as error:
                raise Inapplicable(index, _offset(commit, number), _description(logged, str(error))) from error
    writes = Writes(no_documents(), no_documents())
    for collection, there in documents.items():
        old = before[collection]
        for key, document in there.items():
            (writes.changed if key in old else writes.new)[collection][key] = document
    return writes


def blame(commit: Commit, collection: str, key: str, reason: str) -> tuple[int, str]:
    """Offset and description of the command's last event that touches the document."""
    number, logged = next(
        (number, logged)
        for number, logged in reversed([*enumerate(commit.events)])
        if any(touch[:2] == (collection, key) for touch in touched(logged))
    )
    return _offset(commit, number), _description(logged, reason)


def _offset(commit: Commit, number: int) -> int:
    return commit.cursor.offset - len(commit.events) + number  # a command's events stand together


def _description(logged: LoggedEvent, reason: str) -> str:
    return (
        f"{type(logged.event).__name__} (event {logged.event_id} of {logged.stream}, position {logged.position}) "
        f"cannot be applied: {reason}"
    )
