"""Holds the history against the log, and the read models against both. It shares no code with the service.

The log is the serial order: each command has one place in it, and the state there must explain the command's events
and its answer. A read shows, for each thing in it, a state that the stream had between the answer's X-Event-Id and
what can have been written before the read ended. The kinds of findings:

==================  ==================================================================================================
lost                an acknowledged write is not in the log, or a command was never decided
applied_twice       an acknowledged write stands in the log twice
unknown_twice       a write whose outcome was unknown stands in the log twice
id_repeated         an event_id, a position, or another id was given twice
id_never_given      an answer tells an id that the log does not have
gap                 an event_id or a position is missing
refused_effect      a write was refused, or not accepted, and happened
key_two_effects     two effects under one Idempotency-Key or one item's key
half_batch          part of a command, in the log or in a read
out_of_order        a write stands before one that was answered before it began, or commands are out of order
unexplained         an answer or an event that does not follow from the state at its place
read_back           a read is older than what the same gateway had acknowledged or read before, and did not wait
read_missed         a read is older than its X-Min-Event-Id
read_unwritten      a read shows what was never, or not yet, written
page                a page of a list that skips, repeats, or miscounts
generations_mixed   the parts of an answer are of states that the read model cannot have had together
models_differ       a read model is not what the log says, or is behind it
==================  ==================================================================================================
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
from msgspec import Struct

from tests.chaos import rules
from tests.chaos.history import Operation
from tests.chaos.log_reader import Generation, Log, Models
from tests.chaos.model import (
    Document,
    Event,
    Finding,
    Judged,
    Reading,
    State,
    by_partition,
    command_id,
    documents_at,
    read,
)

__all__ = ["KINDS", "Finding", "check"]

KINDS = (
    "lost",
    "applied_twice",
    "unknown_twice",
    "id_repeated",
    "id_never_given",
    "gap",
    "refused_effect",
    "key_two_effects",
    "half_batch",
    "out_of_order",
    "unexplained",
    "read_back",
    "read_missed",
    "read_unwritten",
    "page",
    "generations_mixed",
    "models_differ",
)

_MOST_OF_A_KIND = 50
_PATIENCE = 2.0
"""Seconds that a read waits for its X-Min-Event-Id if it does not say how long."""
_REMEMBERED = 1.0
"""Seconds that a read waits for what its gateway remembers."""
_LONGEST_PATIENCE = 30
_FROM_GATEWAY = {"invalid": (400, "validation_error"), "forbidden": (403, "forbidden")}
_WRITES = frozenset({"upsert", "patch", "delete", "restore", "record"})


def check(history: Sequence[Operation], log: Log, models: Models) -> list[Finding]:
    """Everything that must not be; at most fifty of a kind.

    Read ``log`` and ``models`` once all is quiet: every command decided, and the read models level with the log.
    """
    reading = read(log)
    found = _Found(reading.findings)
    commands = _Commands(history, log, found)
    _check_judgements(commands, reading, found)
    timeline = _Timeline()
    _Replay(commands, timeline, found).run(reading)
    _check_never_judged(commands, reading, found)
    _check_without_command(history, commands, found)
    _check_real_time(commands, reading, found)
    timeline.close(commands)
    _check_reads(history, timeline, found)
    _check_gateways(history, found)
    _check_models(reading, models, found)
    return found.findings


class _Found:
    """What was found, of each kind the first few."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings: list[Finding] = []
        self._count: Counter[str] = Counter()
        for finding in findings:
            self.add(finding.kind, finding.detail, *finding.operations)

    def add(self, kind: str, detail: str, *operations: "Operation | int | None") -> None:
        self._count[kind] += 1
        if self._count[kind] <= _MOST_OF_A_KIND:
            numbers = tuple(one if isinstance(one, int) else one.number for one in operations if one is not None)
            self.findings.append(Finding(kind, detail, numbers))


def _named(operation: Operation) -> str:
    """The call, for people."""
    key = operation.headers.get("idempotency-key")
    under = f" under key {key}" if key else ""
    answer = "no answer" if operation.status is None else f"{operation.status}"
    return f"call {operation.number} ({operation.method} {operation.path}{under} → {answer})"


# ---- commands and their calls ----------------------------------------------------------------------------------------


class _Commands:
    """Which call made which command."""

    def __init__(self, history: Sequence[Operation], log: Log, found: _Found) -> None:
        by_trace = {trace: one for one in history if (trace := one.headers.get("traceparent")) is not None}
        self.operation: dict[str, Operation] = {}
        """Command id → the call that made it."""
        self.offsets: dict[int, dict[str, int]] = {}
        """Partition of the commands topic → command id → where it stands."""
        self.of_operation: dict[int, list[str]] = defaultdict(list)
        """Number of a call → its commands: one, or none."""
        for partition, records in log.commands.items():
            offsets = self.offsets[partition] = {}
            for record in records:
                identity = command_id(record)
                offsets.setdefault(identity, record.offset)
                operation = by_trace.get(record.headers.get("traceparent", ""))
                if operation is None:
                    continue
                self.operation[identity] = operation
                self.of_operation[operation.number].append(identity)
        for number, ids in self.of_operation.items():
            if len(ids) > 1:
                found.add("applied_twice", f"one call made the commands {', '.join(ids)}", number)


def _check_judgements(commands: _Commands, reading: Reading, found: _Found) -> None:
    """Every command is decided once, in the order of the commands topic."""
    for partition, judged in by_partition(reading.judged):
        offsets = commands.offsets.get(partition, {})
        last, seen = -1, dict[str, Judged]()
        for one in judged:
            operation = commands.operation.get(one.command_id)
            before = seen.get(one.command_id)
            if before is not None:
                _found_twice(before, one, operation, found)
                continue
            seen[one.command_id] = one
            offset = offsets.get(one.command_id)
            if offset is None:
                found.add("unexplained", f"command {one.command_id} is in the log, and was never sent", operation)
                continue
            if offset < last:
                found.add("out_of_order", f"command {one.command_id} was decided after a later one", operation)
            if one.command_offset is not None and one.command_offset != offset:
                what = f"the events of command {one.command_id} say offset {one.command_offset}, it stands at {offset}"
                found.add("out_of_order", what, operation)
            last = max(last, offset)


def _found_twice(before: Judged, one: Judged, operation: Operation | None, found: _Found) -> None:
    where = f"command {one.command_id} was decided at offset {before.offset} and again at {one.offset}"
    if bool(before.events) != bool(one.events):
        found.add("refused_effect", f"{where}: refused once, accepted once", operation)
    elif one.events:
        unknown = operation is not None and operation.outcome == "unknown"
        found.add("unknown_twice" if unknown else "applied_twice", where, operation)
    else:
        found.add("unexplained", where, operation)


def _check_never_judged(commands: _Commands, reading: Reading, found: _Found) -> None:
    """Every command that was sent is decided."""
    judged = {one.command_id for one in reading.judged}
    for partition, offsets in commands.offsets.items():
        for identity in offsets:
            if identity not in judged:
                what = f"command {identity} of partition {partition} was never decided"
                found.add("lost", what, commands.operation.get(identity))


def _check_without_command(history: Sequence[Operation], commands: _Commands, found: _Found) -> None:
    """A gateway answers by itself what it must, and nothing else."""
    for operation in history:
        if operation.method == "GET" or operation.status is None:
            continue
        if operation.status == 500:
            found.add("unexplained", f"{_named(operation)} met an error of the service", operation)
        if operation.number in commands.of_operation:
            continue
        if operation.outcome == "ok":
            found.add("lost", f"{_named(operation)} was acknowledged, and its command is nowhere", operation)
        elif operation.outcome == "refused" and operation.status not in {429, 503}:
            told = operation.status, _code(operation)
            if _FROM_GATEWAY.get(operation.kind) != told:
                found.add("unexplained", f"{_named(operation)} was answered {told[1]!r} without a command", operation)


def _code(operation: Operation) -> str:
    answer = operation.answered
    return str(answer.get("code")) if isinstance(answer, dict) else ""


def _check_real_time(commands: _Commands, reading: Reading, found: _Found) -> None:
    """No command of a stream stands before one that had been answered before it was sent."""
    earliest: dict[str, Operation] = {}
    for one in reversed(reading.judged):
        operation = commands.operation.get(one.command_id)
        if operation is None:
            continue
        later = earliest.get(operation.stream)
        if later is not None and later.ended < operation.began:
            what = f"{_named(operation)} stands before {_named(later)}, which had ended before it began"
            found.add("out_of_order", what, operation, later)
        answered = operation.outcome != "unknown" and operation.status not in {429, 503}
        if answered and (later is None or operation.ended < later.ended):
            earliest[operation.stream] = operation


# ---- the replay: every command at its place --------------------------------------------------------------------------


class _Kept(Struct):
    """What a key came to first."""

    fingerprint: bytes | None
    """None: that request is not in this history."""
    status: int = 0
    answer: Any = None
    event_id: int = 0
    first: int | None = None
    """Number of the call."""


class _Replay:
    """Goes through the log once, stream by stream in its order, and holds each command against the rules."""

    def __init__(self, commands: _Commands, timeline: "_Timeline", found: _Found) -> None:
        self._commands = commands
        self._timeline = timeline
        self._found = found
        self._state = State()
        self._keys: dict[tuple[str, str], _Kept] = {}
        self._item_keys: dict[tuple[str, str], Event] = {}
        self._ids: dict[str, Event] = {}
        self._seen: set[str] = set()

    def run(self, reading: Reading) -> None:
        for one in reading.judged:
            operation = self._commands.operation.get(one.command_id)
            if operation is None or one.command_id in self._seen or operation.kind not in _WRITES:
                if operation is not None and operation.kind not in _WRITES:
                    what = f"{_named(operation)} must not make a command, and made {one.command_id}"
                    self._found.add("refused_effect" if one.events else "unexplained", what, operation)
                self._apply(one, operation)
                if one.key is not None and one.events:
                    self._keys.setdefault((one.events[0].stream, one.key), _Kept(None))
            else:
                self._seen.add(one.command_id)
                self._judge(one, operation)

    def _judge(self, one: Judged, operation: Operation) -> None:
        key = operation.headers.get("idempotency-key")
        kept = None if key is None else self._keys.get((operation.stream, key))
        if one.code == "poison":
            self._found.add("unexplained", f"{_named(operation)} was put into the dead letters", operation)
            return
        if one.events and not _was_accepted(operation):
            self._found.add("refused_effect", f"{_named(operation)} made events {_ids(one)}", operation)
        if kept is not None:
            self._repeat(one, operation, kept)
            return
        head = self._state.head(operation.stream)
        try:
            verdict = rules.decide(self._state, operation, one.events)
        except (KeyError, TypeError, ValueError) as error:
            self._found.add("unexplained", f"{_named(operation)} cannot be judged here: {error!r}", operation)
            self._apply(one, operation)
            return
        explained = self._explained(one, operation, verdict)
        self._apply(one, operation)
        refused = verdict.code not in {"", "unchanged"}
        answer = None
        if explained and not refused:
            try:
                answer = rules.answer(self._state, operation, verdict, one.events)
            except (KeyError, StopIteration) as error:
                self._found.add("unexplained", f"{_named(operation)} has no answer here: {error!r}", operation)
        event_id = one.last_event_id if one.events else head
        if key is not None and not refused:
            prints = rules.fingerprint(operation) if explained else None
            kept = _Kept(prints, verdict.status, answer, event_id, operation.number)
            self._keys[operation.stream, key] = kept
        if not explained:
            return
        self._check_answer(one, operation, verdict.status, verdict.code if refused else "", answer, event_id)

    def _repeat(self, one: Judged, operation: Operation, kept: _Kept) -> None:
        """A command under a key that led to something before."""
        if one.events:
            what = f"{_named(operation)} made events {_ids(one)} under a key of call {kept.first}"
            self._found.add("key_two_effects", what, operation, kept.first)
        self._apply(one, operation)
        if kept.fingerprint is None or one.events:
            return
        same = kept.fingerprint == rules.fingerprint(operation)
        code = "replayed" if same else "idempotency_mismatch"
        if one.code != code:
            what = f"{_named(operation)} came to {one.code!r} and not to {code!r}, after call {kept.first}"
            self._found.add("unexplained", what, operation, kept.first)
        elif same:
            self._check_answer(one, operation, kept.status, "", kept.answer, kept.event_id)
            if operation.outcome == "ok" and operation.answer_headers.get("idempotency-replayed") != "true":
                self._found.add("unexplained", f"{_named(operation)} does not say that it repeats", operation)
        else:
            head = self._state.head(operation.stream)
            self._check_answer(one, operation, rules.STATUS[code], code, None, head)

    def _explained(self, one: Judged, operation: Operation, verdict: rules.Verdict) -> bool:
        """Whether the log says of the command what the rules say."""
        if one.code != verdict.code:
            kind = "unexplained"
            if one.events:
                kind, came_to = "refused_effect" if verdict.code != "unchanged" else "key_two_effects", "events"
            else:
                came_to = repr(one.code)
            wanted = repr(verdict.code) if verdict.code else "events"
            what = f"{_named(operation)}: by the rules {wanted}, in the log {came_to}{_ids(one)} at {one.offset}"
            self._found.add(kind, what, operation)
            return False
        made = [rules.comparable(event) for event in one.events]
        if made == verdict.events:
            return True
        if len(made) < len(verdict.events):
            what = f"{_named(operation)}: {len(made)} of {len(verdict.events)} events are in the log, {_ids(one)}"
            self._found.add("half_batch", what, operation)
            return False
        differing = next(
            (
                f"{found} and not {wanted}"
                for found, wanted in zip(made, verdict.events, strict=False)
                if found != wanted
            ),
            f"{len(made)} events and not {len(verdict.events)}",
        )
        self._found.add("unexplained", f"{_named(operation)}: the log has {differing}, {_ids(one)}", operation)
        return False

    def _check_answer(
        self, one: Judged, operation: Operation, status: int, code: str, answer: Any, event_id: int
    ) -> None:
        """What the caller was told, against what the log says."""
        if operation.outcome == "unknown" or operation.status in {429, 503}:
            return
        if operation.status != status or (code and _code(operation) != code):
            told, wanted = f"{operation.status} {_code(operation)}", f"{status} {code}"
            kind = "lost" if operation.outcome == "ok" and code else "unexplained"
            what = f"{_named(operation)} was told {told}; the log says {wanted} at offset {one.offset}"
            self._found.add(kind, what, operation)
            return
        if operation.event_id != event_id:
            head = self._state.head(operation.stream)
            kind = "id_never_given" if (operation.event_id or 0) > head else "unexplained"
            what = f"{_named(operation)} was told event_id {operation.event_id}, the log has {event_id}"
            self._found.add(kind, what, operation)
        if answer is not None and not rules.same_answer(answer, operation.answered):
            told_ids = operation.answered.get("event_ids", ()) if isinstance(operation.answered, dict) else ()
            kind = "unexplained"
            if any(told > self._state.head(operation.stream) for told in told_ids):
                kind = "id_never_given"
            what = f"{_named(operation)} was told {operation.answered}; by the log it is {answer}"
            self._found.add(kind, what, operation)

    def _apply(self, one: Judged, operation: Operation | None) -> None:
        for event in one.events:
            self._check_ids(event, operation)
            if (misfit := self._state.apply(event)) is not None:
                self._found.add("unexplained", misfit, operation)
        if one.events:
            self._timeline.note(one, self._state)

    def _check_ids(self, event: Event, operation: Operation | None) -> None:
        if event.type.endswith(("Created", "Recorded")):
            first = self._ids.setdefault(event.data["id"], event)
            if first is not event:
                what = f"id {event.data['id']} was given by {first.stream}/{first.event_id} and {event.event_id}"
                self._found.add("id_repeated", what, operation)
        key = event.data.get("idempotency_key")
        if event.type == "TenantEpisodeRecorded" and key is not None:
            recorded = self._item_keys.setdefault((event.stream, key), event)
            if recorded is not event:
                what = f"item key {key} of {event.stream} has the events {recorded.event_id} and {event.event_id}"
                self._found.add("key_two_effects", what, operation)


def _was_accepted(operation: Operation) -> bool:
    """Whether the caller was told that it happened, or that it may have."""
    return operation.outcome != "refused"


def _ids(one: Judged) -> str:
    """The event_ids of a command, for people."""
    if not one.events:
        return ""
    stream, first, last = one.events[0].stream, one.events[0].event_id, one.last_event_id
    return f" {first} to {last} of {stream}"


# ---- what there was to be read, and when -----------------------------------------------------------------------------


class _Versions(Struct):
    """States of one thing: from ``event_ids[i]`` on it was ``values[i]``; before the first there was none."""

    event_ids: list[int] = []
    values: list[Document | None] = []

    def put(self, event_id: int, value: Document | None) -> None:
        if self.event_ids and self.event_ids[-1] == event_id:
            self.values[-1] = value
        else:
            self.event_ids.append(event_id)
            self.values.append(value)

    def between(self, first: int, last: int) -> Iterator[Document | None]:
        """Those that there were from event_id ``first`` to ``last``."""
        index = bisect_right(self.event_ids, first) - 1
        if index < 0:
            yield None
        yield from self.values[max(index, 0) : bisect_right(self.event_ids, last)]


class _List(Struct):
    """The list of one project."""

    since: int
    """The event_id of the project."""
    changes: list[tuple[int, int, bool]] = []
    """event_id, ordinal, and whether it lives from then on."""
    totals: list[int] = []
    """How many live after each change."""
    shrinks: bool = False


class _Timeline:
    """What could be read, by event_id. Commands are applied as a whole, so only their last event_ids count."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, str, str], _Versions] = {}
        """Stream, project, name → the living episode."""
        self.episodes: dict[str, _Versions] = {}
        """Id of a project's episode → its states; None while it is deleted."""
        self.items: dict[tuple[str, str], Document] = {}
        """Stream, id → a tenant's episode."""
        self.lists: dict[tuple[str, str], _List] = {}
        self._ends: dict[str, list[int]] = defaultdict(list)
        """Stream → the last event_id of each command, ascending."""
        self._commands: dict[str, list[str]] = defaultdict(list)
        self._began: dict[str, list[float]] = {}
        """Stream → the moment before which each of those cannot have been in the log, ascending."""

    def note(self, one: Judged, state: State) -> None:
        """Note the state after a command."""
        stream, end = one.events[-1].stream, one.last_event_id
        self._ends[stream].append(end)
        self._commands[stream].append(one.command_id)
        for event in one.events:
            identity = event.data["id"]
            if event.type == "TenantEpisodeRecorded":
                self.items[stream, identity] = state.documents["tenant_episodes"].get(identity, {})
            elif event.type == "ProjectCreated":
                self.lists[stream, event.data["slug"]] = _List(end)
            elif event.type.startswith("ProjectEpisode"):
                self._note_episode(event, state, stream, end)

    def _note_episode(self, event: Event, state: State, stream: str, end: int) -> None:
        episode = state.documents["project_episodes"].get(event.data["id"])
        if episode is None:
            return
        project, lives = episode["project"], not episode["deleted"]
        if event.type == "ProjectEpisodeRevised" and event.data["name"] != episode["name"]:
            self.names.setdefault((stream, project, event.data["name"]), _Versions()).put(end, None)
        shown = episode if lives else None
        self.names.setdefault((stream, project, episode["name"]), _Versions()).put(end, shown)
        self.episodes.setdefault(episode["_id"], _Versions()).put(end, shown)
        if event.type != "ProjectEpisodeRevised" and (listed := self.lists.get((stream, project))) is not None:
            listed.changes.append((end, episode["ordinal"], lives))
            listed.totals.append((listed.totals[-1] if listed.totals else 0) + (1 if lives else -1))
            listed.shrinks |= not lives

    def close(self, commands: _Commands) -> None:
        """Find out since when each event can have been read."""
        for stream, ids in self._commands.items():
            latest, began = float("-inf"), list[float]()
            for identity in ids:
                operation = commands.operation.get(identity)
                latest = max(latest, operation.began) if operation is not None else latest
                began.append(latest)
            self._began[stream] = began

    def newest(self, stream: str, at: float) -> int:
        """The last event_id that can have been there at a moment."""
        count = bisect_right(self._began.get(stream, []), at)
        return self._ends[stream][count - 1] if count else 0

    def is_end(self, stream: str, event_id: int) -> bool:
        """Whether it is 0 or the last event of a command."""
        ends = self._ends[stream]
        index = bisect_left(ends, event_id)
        return event_id == 0 or (index < len(ends) and ends[index] == event_id)


# ---- reads -----------------------------------------------------------------------------------------------------------


def _check_reads(history: Sequence[Operation], timeline: _Timeline, found: _Found) -> None:
    lists: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for read_ in history:
        if read_.method != "GET" or read_.status in {None, 503, 429}:
            continue
        newest = timeline.newest(read_.stream, read_.ended)
        if not _check_promises(read_, newest, timeline, found):
            continue
        if read_.kind == "get_item":
            _check_one(read_, newest, _item_versions(timeline, read_), rules.whole_item, found)
            continue
        _, project, name, _ = rules.target(read_.path)
        if read_.kind == "list":
            lists[read_.stream, project].append(read_)
        else:
            versions = timeline.names.get((read_.stream, project, name), _Versions())
            _check_one(read_, newest, versions, rules.whole, found)
    for key, reads in lists.items():
        _ListCheck(key, timeline, found).check(reads)


def _check_promises(read_: Operation, newest: int, timeline: _Timeline, found: _Found) -> bool:
    """Check what the answer says of itself. Gives whether it can be held against the log at all."""
    event_id = read_.event_id
    if read_.status not in {200, 404} or event_id is None:
        found.add("unexplained", f"{_named(read_)} is no answer to a read", read_)
        return False
    if read_.min_event_id is not None and event_id < read_.min_event_id:
        what = f"{_named(read_)} shows event_id {event_id}, {read_.min_event_id} was the least"
        found.add("read_missed", what, read_)
    if event_id > newest:
        found.add("read_unwritten", f"{_named(read_)} claims event_id {event_id}, {newest} was the last", read_)
        return False
    if not timeline.is_end(read_.stream, event_id):
        what = f"{_named(read_)} shows event_id {event_id} of {read_.stream}, in the midst of a command"
        found.add("half_batch", what, read_)
    return True


def _item_versions(timeline: _Timeline, read_: Operation) -> _Versions:
    identity = urlsplit(read_.path).path.rpartition("/")[2]
    item = timeline.items.get((read_.stream, identity))
    return _Versions() if item is None else _Versions([item["event_id"]], [item])


def _check_one(
    read_: Operation, newest: int, versions: _Versions, shape: Callable[[Document], Any], found: _Found
) -> None:
    event_id = read_.event_id or 0
    told = read_.answered if read_.status == 200 else None

    def explained(first: int, last: int) -> bool:
        return any((None if one is None else shape(one)) == told for one in versions.between(first, last))

    if explained(event_id, newest):
        return
    shows = "nothing" if told is None else repr(told)
    if explained(0, event_id):
        kind = "read_missed" if read_.min_event_id is not None else "generations_mixed"
        what = f"it says event_id {event_id}, and shows an older state: {shows}"
    elif told is None:
        kind, what = "generations_mixed", f"it says event_id {event_id}, and shows nothing, which was so at no time"
    else:
        kind, what = "read_unwritten", f"between event_id {event_id} and {newest} nothing like this was there: {shows}"
    found.add(kind, f"{_named(read_)}: {what}", read_)


class _ListCheck:
    """All reads of one project's list, the oldest states first."""

    def __init__(self, key: tuple[str, str], timeline: _Timeline, found: _Found) -> None:
        self._listed = timeline.lists.get(key)
        self._timeline = timeline
        self._found = found
        self._living: list[int] = []
        """Ordinals that live at the read's X-Event-Id."""
        self._applied = 0

    def check(self, reads: Sequence[Operation]) -> None:
        for read_ in sorted(reads, key=lambda one: one.event_id or 0):
            event_id = read_.event_id or 0
            self._check(read_, event_id, self._timeline.newest(read_.stream, read_.ended))

    def _check(self, read_: Operation, event_id: int, newest: int) -> None:
        listed = self._listed
        exists = None if listed is None else listed.since
        if read_.status == 404:
            if exists is not None and exists <= event_id:
                what = f"{_named(read_)} says event_id {event_id}, and there is a project since {exists}"
                self._found.add("generations_mixed", what, read_)
            return
        if listed is None or listed.since > newest:
            self._found.add("read_unwritten", f"{_named(read_)} shows a project that is not there", read_)
            return
        while self._applied < len(listed.changes) and listed.changes[self._applied][0] <= event_id:
            _, ordinal, lives = listed.changes[self._applied]
            if lives:
                insort(self._living, ordinal)
            else:
                self._living.remove(ordinal)
            self._applied += 1
        self._check_page(read_, listed, event_id, newest)

    def _check_page(self, read_: Operation, listed: _List, event_id: int, newest: int) -> None:
        body = read_.answered
        query = parse_qs(urlsplit(read_.path).query)
        page, size = int(query.get("page", ["1"])[0]), min(int(query.get("pageSize", ["50"])[0]), 200)
        total = body["total"]
        meanwhile = bisect_right(listed.changes, newest, key=lambda change: change[0])
        possible = {len(self._living), *listed.totals[self._applied : meanwhile]}
        shape = {"page": page, "pageSize": size, "totalPages": -(-total // size)}
        if total not in possible or any(body[key] != value for key, value in shape.items()):
            older = total in listed.totals[: self._applied] and total not in possible
            what = f"{_named(read_)} counts {total} at event_id {event_id}; possible were {sorted(possible)[:5]}"
            self._found.add("generations_mixed" if older else "page", what, read_)
            return
        ordinals = self._check_items(read_, body["episodes"], event_id, newest)
        if ordinals is None:
            return
        first = (page - 1) * size
        if not listed.shrinks:
            wanted = list(range(first + 1, min(first + size, total) + 1))
        elif meanwhile == self._applied:
            wanted = self._living[first : first + size]
        else:
            wanted = sorted(set(ordinals))[:size]
        if ordinals != wanted:
            what = f"{_named(read_)} shows the ordinals {_short(ordinals)} and not {_short(wanted)}, of {total}"
            self._found.add("page", what, read_)

    def _check_items(self, read_: Operation, items: Sequence[Any], event_id: int, newest: int) -> list[int] | None:
        ordinals = []
        for item in items:
            versions = self._timeline.episodes.get(item["id"], _Versions())
            for version in versions.between(event_id, newest):
                if version is not None and rules.described(version) == item:
                    ordinals.append(int(version["ordinal"]))
                    break
            else:
                older = any(one is not None and rules.described(one) == item for one in versions.between(0, event_id))
                kind = "read_unwritten"
                if older:
                    kind = "read_missed" if read_.min_event_id is not None else "generations_mixed"
                age = "an older state" if older else "what was never there"
                what = f"{_named(read_)} says event_id {event_id}, and shows {age}: {item}"
                self._found.add(kind, what, read_)
                return None
        return ordinals


def _short(ordinals: Sequence[int]) -> str:
    return str(ordinals) if len(ordinals) <= 8 else f"{[*ordinals[:4]]}…{[*ordinals[-4:]]}"


# ---- what a gateway remembers ----------------------------------------------------------------------------------------


def _check_gateways(history: Sequence[Operation], found: _Found) -> None:
    """No read goes back behind what the same process had acknowledged or read, unless it waited for it in vain."""
    process = _processes(history)
    events: list[tuple[float, int, Operation]] = []
    for operation in history:
        if operation.event_id is not None and operation.connection and operation.status not in {429, 503}:
            events.append((operation.ended, 1, operation))
            if operation.method == "GET":
                events.append((operation.began, 0, operation))
    events.sort(key=lambda event: event[:2])
    remembered: dict[tuple[int, str], tuple[int, Operation]] = {}
    for _, ends, operation in events:
        place, event_id = (process[operation.connection], operation.stream), operation.event_id or 0
        known, by = remembered.get(place, (0, None))
        if ends:
            if event_id > known:
                remembered[place] = event_id, operation
        elif event_id < known and by is not None and operation.ended - operation.began < _patience(operation):
            what = f"{_named(operation)} shows event_id {event_id}, and {_named(by)} had told {known} before"
            found.add("read_back", what, operation, by)


def _patience(read_: Operation) -> float:
    """How long the gateway waits before it answers with something older."""
    if read_.min_event_id is None:
        return _REMEMBERED
    prefer = read_.headers.get("prefer", "")
    return min(float(prefer.removeprefix("wait=")), _LONGEST_PATIENCE) if prefer else _PATIENCE


def _processes(history: Sequence[Operation]) -> Mapping[str, int]:
    """Connection → number of a gateway process. Two that lived at the same time, at one URL, lead to the same one."""
    spans: dict[str, tuple[str, float, float]] = {}
    for operation in history:
        if operation.connection:
            url, alive_from, _ = spans.get(operation.connection, (operation.url, operation.ended, 0.0))
            spans[operation.connection] = url, min(alive_from, operation.ended), operation.began
    process: dict[str, int] = {}
    number = 0
    at, until = "", 0.0
    for connection, (url, alive_from, alive_until) in sorted(spans.items(), key=lambda span: span[1]):
        if url != at or alive_from > until:
            number, at, until = number + 1, url, alive_until
        until = max(until, alive_until)
        process[connection] = number
    return process


# ---- the read models -------------------------------------------------------------------------------------------------


def _check_models(reading: Reading, models: Models, found: _Found) -> None:
    level = {partition: position for partition, position in reading.positions.items() if position}
    expected: dict[tuple[tuple[int, int], ...], Mapping[str, Mapping[Any, Document]]] = {}
    if level and not any(generation.in_use for generation in models.generations):
        found.add("models_differ", "no generation of read models is in use")
    for generation in models.generations:
        positions = generation.positions
        name = f"generation {generation.number}"
        for partition in sorted({*level, *positions}):
            has, end = positions.get(partition, 0), level.get(partition, 0)
            if has != end:
                what = f"{name} is at position {has} of partition {partition}, the log ends with {end}"
                found.add("models_differ", what)
        for checkpoint in generation.collections.get("checkpoints", ()):
            if checkpoint.get("stopped"):
                found.add("models_differ", f"{name} stands still: {checkpoint['stopped']}")
        key = tuple(sorted(positions.items()))
        if key not in expected:
            expected[key] = documents_at(reading.judged, positions)
        _compare(name, generation, expected[key], found)


def _compare(name: str, generation: Generation, expected: Mapping[str, Mapping[Any, Document]], found: _Found) -> None:
    for collection, wanted in expected.items():
        there = {document["_id"]: document for document in generation.collections.get(collection, ())}
        for identity in sorted({*wanted, *there}, key=str):
            if wanted.get(identity) == there.get(identity):
                continue
            what = f"{name}, {collection} {identity}: {_difference(wanted.get(identity), there.get(identity))}"
            found.add("models_differ", what)


def _difference(wanted: Mapping[str, Any] | None, there: Mapping[str, Any] | None) -> str:
    if there is None:
        return "is missing"
    if wanted is None:
        return "does not follow from the log"
    keys = [key for key in {**wanted, **there} if wanted.get(key, msgspec.UNSET) != there.get(key, msgspec.UNSET)]
    return "; ".join(f"{key} is {there.get(key)!r}, and {wanted.get(key)!r} by the log" for key in keys)
