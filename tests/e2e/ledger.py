"""Three accounts that must agree: what callers were told, what the log says, and what MongoDB holds.

It reads the log by the same rule as the service and shares no code with it, so a mistake in one shows in the other.
The rule for the records of one events partition, in the order of their offsets:

    Keep `fence`, the offset of the latest `WriterFenced`, and `position`, both of what was accepted so far. A record
    happened if its `writer` is `fence` and its `position` is the next one. Anything else did not happen.

All events of one command stand together, the last one says `completes`, and a command that is done is never done again.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer
from pymongo import MongoClient

COMMANDS = "episodes.commands"
EVENTS = "episodes.events"
REPLIES = "episodes.replies"
DEAD_LETTERS = "episodes.dead-letters"

COLLECTIONS = (
    "checkpoints",
    "namespaces",
    "projects",
    "folders",
    "project_episodes",
    "tenant_episodes",
    "entities",
    "streams",
)
"""Read in this order: the checkpoints are at least as old as the rest."""
BLOCK = 1_000
"""Ordinals for which a project keeps one count of the living."""


# ---- what callers were told ------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """One event that an answer speaks of. `text` is the episode's name or content, which no other write uses."""

    event_id: int
    type: str
    id: str
    text: str


@dataclass(frozen=True)
class Acknowledged:
    """A write that was answered with 2xx."""

    stream: str
    key: str
    """The Idempotency-Key of all its attempts, used for nothing else."""
    last_event_id: int
    """X-Event-Id."""
    facts: tuple[Fact, ...]


# ---- what the log says -----------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A record of Kafka."""

    offset: int
    value: bytes
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Event:
    """An event that happened."""

    partition: int
    offset: int
    position: int
    stream: str
    event_id: int
    command_id: str
    type: str
    time: datetime
    data: Mapping[str, Any]

    @property
    def text(self) -> str | None:
        text = self.data.get("content", self.data.get("name"))
        return None if text is None else str(text)


@dataclass(frozen=True)
class Command:
    """What one command left in the log."""

    events: tuple[Event, ...]
    key: str | None


@dataclass
class Log:
    """All that happened, and everything about it that should not be so."""

    commands: list[Command] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    """The last position of each partition."""
    owners: list[str] = field(default_factory=list)
    """Who fenced, in no order across partitions."""
    dropped: int = 0
    """Records that writers left after they had been replaced."""
    violations: list[str] = field(default_factory=list)

    @property
    def events(self) -> Iterator[Event]:
        return (event for command in self.commands for event in command.events)

    def under_key(self, stream: str, key: str) -> list[Command]:
        return [command for command in self.commands if command.key == key and command.events[0].stream == stream]


def read_log(partitions: Mapping[int, Sequence[Record]]) -> Log:
    """Read a whole events topic by the rule, and check it for itself."""
    log = Log()
    for partition, records in sorted(partitions.items()):
        _PartitionReader(log, partition).read(records)
    _check_streams(log)
    _check_once(log)
    _check_projects(log)
    return log


class _PartitionReader:
    """Adds one partition to the log."""

    def __init__(self, log: Log, partition: int) -> None:
        self._log = log
        self._partition = partition
        self._fence = -1
        self._position = 0
        self._command_offset = -1
        self._open: list[Event] = []
        """The events of a command of which the last one is still to come."""

    def read(self, records: Iterable[Record]) -> None:
        for offset, value, *_ in records:
            cloud_event = json.loads(value)
            kind = str(cloud_event["type"]).split(".")[1]
            if kind == "WriterFenced":
                self._break_off(offset)
                self._fence = offset
                self._log.owners.append(cloud_event["data"]["owner"])
            elif self._happened(offset, cloud_event):
                self._add(offset, kind, cloud_event)
        self._break_off(None)
        self._log.positions[self._partition] = self._position

    def _happened(self, offset: int, cloud_event: Mapping[str, Any]) -> bool:
        position = cloud_event["position"]
        if cloud_event["writer"] == self._fence and position == self._position + 1:
            self._position = position
            return True
        self._log.dropped += 1
        if cloud_event["writer"] == self._fence and position > self._position:
            self._violated(offset, f"a gap: position {position} after {self._position}")
        return False

    def _add(self, offset: int, kind: str, cloud_event: Mapping[str, Any]) -> None:
        if kind == "CommandsRefused":
            self._break_off(offset)
            self._judged(offset, cloud_event["commandoffset"])
            return
        event = _event(self._partition, offset, kind, cloud_event)
        if self._open and self._open[0].command_id != event.command_id:
            self._break_off(offset)
        self._open.append(event)
        if "completes" in cloud_event:
            self._log.commands.append(Command(tuple(self._open), cloud_event.get("idempotencykey")))
            self._open = []
            self._judged(offset, cloud_event["commandoffset"])

    def _judged(self, offset: int, command_offset: int) -> None:
        if command_offset <= self._command_offset:
            self._violated(offset, f"command {command_offset} was judged after {self._command_offset}")
        self._command_offset = command_offset

    def _break_off(self, offset: int | None) -> None:
        if self._open:
            self._violated(offset, f"half a command: {self._open[0].command_id} breaks off here")
        self._open = []

    def _violated(self, offset: int | None, what: str) -> None:
        place = "at the end" if offset is None else f"at offset {offset}"
        self._log.violations.append(f"{EVENTS}/{self._partition} {place}: {what}")


def _event(partition: int, offset: int, kind: str, cloud_event: Mapping[str, Any]) -> Event:
    return Event(
        partition=partition,
        offset=offset,
        position=cloud_event["position"],
        stream=cloud_event["streamid"],
        event_id=cloud_event["eventid"],
        command_id=cloud_event["commandid"],
        type=kind,
        time=datetime.fromisoformat(cloud_event["time"]),
        data=cloud_event["data"],
    )


def _check_streams(log: Log) -> None:
    last: dict[str, Event] = {}
    for event in log.events:
        before = last.get(event.stream)
        expected = 1 if before is None else before.event_id + 1
        if event.event_id != expected:
            what = "a gap" if event.event_id > expected else "a repeat"
            log.violations.append(f"{event.stream}: {what}: event_id {event.event_id} where {expected} was next")
        if before is not None and before.partition != event.partition:
            log.violations.append(f"{event.stream}: in partitions {before.partition} and {event.partition}")
        if before is not None and before.time > event.time:
            log.violations.append(f"{event.stream}: event_id {event.event_id} is older than the one before it")
        last[event.stream] = event
    for command in log.commands:
        if len({event.stream for event in command.events}) > 1:
            log.violations.append(f"command {command.events[0].command_id}: in more than one stream")


def _check_once(log: Log) -> None:
    done: Counter[object] = Counter()
    for command in log.commands:
        stream = command.events[0].stream
        done["command", command.events[0].command_id] += 1
        if command.key is not None:
            done[stream, "Idempotency-Key", command.key] += 1
        for event in command.events:
            if event.type == "TenantEpisodeRecorded" and event.data.get("idempotency_key") is not None:
                done[stream, "item key", event.data["idempotency_key"]] += 1
            if event.type.endswith(("Created", "Recorded")):
                done["id", event.data["id"]] += 1
    log.violations += [f"applied {times} times: {what}" for what, times in done.items() if times > 1]


def _check_projects(log: Log) -> None:
    """Check that whoever decided knew all that had been decided: names are given once, ordinals count up."""
    given: dict[tuple[str, ...], str] = {}
    ordinals: Counter[str] = Counter()

    def give(event: Event, kind: str, *name: str) -> None:
        if given.setdefault((event.stream, kind, *name), event.data["id"]) != event.data["id"]:
            log.violations.append(f"{event.stream}: event_id {event.event_id} gives a name again: {kind} {name}")

    for event in log.events:
        data = event.data
        match event.type:
            case "NamespaceCreated" | "ProjectCreated":
                give(event, event.type, data["slug"])
            case "FolderCreated":
                give(event, "folder", data["project_id"], data["path"])
            case "ProjectEpisodeCreated":
                give(event, "episode", data["project_id"], data["name"])
                ordinals[data["project_id"]] += 1
                if data["ordinal"] != ordinals[data["project_id"]]:
                    log.violations.append(f"{event.stream}: event_id {event.event_id} has ordinal {data['ordinal']}")
            case "ProjectEpisodeRevised" if "name" in data["changes"]:
                given.pop((event.stream, "episode", data["project_id"], data["name"]), None)
                give(event, "episode", data["project_id"], data["changes"]["name"])


# ---- do they agree? --------------------------------------------------------------------------------------------------


def check_answers(log: Log, acknowledged: Iterable[Acknowledged]) -> list[str]:
    """Say which answers do not rest on exactly one command in the log with the ids that were told."""
    commands: dict[tuple[str, str], list[Command]] = defaultdict(list)
    for command in log.commands:
        if command.key is not None:
            commands[command.events[0].stream, command.key].append(command)
    made = Counter(
        (event.stream, event.text) for event in log.events if event.type.endswith(("EpisodeCreated", "Recorded"))
    )
    violations = []
    for answer in acknowledged:
        name = f"{answer.stream}, key {answer.key}"
        found = commands[answer.stream, answer.key]
        if not found:
            violations.append(f"lost: {name}: acknowledged, but not in the log")
            continue
        events = {event.event_id: event for command in found for event in command.events}
        if max(events) != answer.last_event_id:
            violations.append(f"{name}: the answer ended with event_id {answer.last_event_id}, the log {max(events)}")
        for fact in answer.facts:
            event = events.get(fact.event_id)
            if event is None or (event.type, event.data["id"], event.text) != (fact.type, fact.id, fact.text):
                violations.append(f"{name}: the answer said {fact}, the log {event}")
            if made[answer.stream, fact.text] != 1:
                violations.append(f"{name}: {fact.text!r} was made {made[answer.stream, fact.text]} times")
    return violations


Documents = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a collection → its documents."""


def check_documents(log: Log, documents: Documents) -> list[str]:
    """Say where the read models differ from what follows from the log."""
    violations = []
    expected = _expected(log)
    for collection, wanted in expected.items():
        found = {document["_id"]: document for document in documents[collection] if document.get("position") != 0}
        violations += [f"{collection}: lost: {missing}" for missing in wanted.keys() - found.keys()]
        violations += [f"{collection}: not in the log: {extra}" for extra in found.keys() - wanted.keys()]
        for identity in wanted.keys() & found.keys():
            for key, value in wanted[identity].items():
                if found[identity].get(key) != value:
                    is_now = f"{key} is {found[identity].get(key)!r}, should be {value!r}"
                    violations.append(f"{collection} {identity}: {is_now}")
    return violations


def _expected(log: Log) -> dict[str, dict[Any, dict[str, Any]]]:
    models: dict[str, dict[Any, dict[str, Any]]] = {name: {} for name in COLLECTIONS}
    for event in log.events:
        _fold(models, event)
        models["streams"][event.stream] = {"event_id": event.event_id}
    for project in models["projects"].values():
        project |= {"total": 0, "blocks": []}
    for episode in models["project_episodes"].values():
        project, block = models["projects"][episode["project_id"]], (episode["ordinal"] - 1) // BLOCK
        project["blocks"] += [0] * (block + 1 - len(project["blocks"]))
        if not episode["deleted"]:
            project["total"] += 1
            project["blocks"][block] += 1
    for partition, position in log.positions.items():
        if position:
            models["checkpoints"][partition] = {"position": position, "stopped": None}
    return models


def _fold(models: dict[str, dict[Any, dict[str, Any]]], event: Event) -> None:
    owner, data = event.stream.partition(":")[2], event.data
    episodes = models["project_episodes"]
    match event.type:
        case "NamespaceCreated":
            models["namespaces"][data["id"]] = {"slug": data["slug"]}
        case "ProjectCreated":
            models["projects"][data["id"]] = {"namespace": owner, "slug": data["slug"], "name": data["name"]}
        case "FolderCreated":
            folder = {key: value for key, value in data.items() if key != "id"}
            models["folders"][data["id"]] = {"namespace": owner, **folder}
        case "ProjectEpisodeCreated":
            episode = {key: value for key, value in data.items() if key not in {"id", "metadata"}}
            episodes[data["id"]] = {"namespace": owner, **episode, "deleted": False, "event_id": event.event_id}
        case "ProjectEpisodeRevised":
            changes = {key: value for key, value in data["changes"].items() if key != "metadata"}
            episodes[data["id"]] |= {**changes, "event_id": event.event_id}
        case "ProjectEpisodeDeleted" | "ProjectEpisodeRestored":
            deleted = event.type == "ProjectEpisodeDeleted"
            episodes[data["id"]] |= {"deleted": deleted, "event_id": event.event_id}
        case "TenantEpisodeRecorded":
            same = ("namespace", "type", "content", "source", "author", "channel")
            recorded = {key: data.get(key) for key in same}
            models["tenant_episodes"][data["id"]] = {"tenant_id": owner, "event_id": event.event_id, **recorded}
            for entity in {entity["id"] for entity in data.get("entities", ())}:
                seen = {"mentions": 0, "first_event_id": event.event_id}
                seen = models["entities"].setdefault(f"{owner}/{entity}", seen)
                seen |= {"mentions": seen["mentions"] + 1, "last_event_id": event.event_id}
        case unknown:
            raise NotImplementedError(f"the checker does not know {unknown}")


# ---- reading the real ones -------------------------------------------------------------------------------------------


async def read_topic(bootstrap: str, topic: str) -> dict[int, list[Record]]:
    """Return the records that a topic holds now: partition → in order."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )
    await consumer.start()
    try:
        partitions = consumer.assignment()
        assert partitions, f"{topic} does not exist"
        ends = await consumer.end_offsets(partitions)
        records: dict[int, list[Record]] = {partition.partition: [] for partition in partitions}
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for partition, batch in (await consumer.getmany(timeout_ms=100)).items():
                records[partition.partition] += (
                    Record(record.offset, record.value or b"", record.key, tuple(record.headers))
                    for record in batch
                    if record.offset < ends[partition]
                )
        return records
    finally:
        await consumer.stop()


async def load_log(bootstrap: str) -> Log:
    return read_log(await read_topic(bootstrap, EVENTS))


def load_documents(mongodb_url: str) -> Documents:
    """Return all documents of the generation in use."""
    with MongoClient[dict[str, Any]](mongodb_url, serverSelectionTimeoutMS=5_000) as client:
        pointer = client["episodes_meta"]["pointers"].find_one({"_id": "generation"})
        assert pointer is not None, "no generation is in use"
        database = client[f"episodes_g{pointer['generation']}"]
        return {name: list(database[name].find()) for name in COLLECTIONS}


def streams_of(documents: Documents) -> dict[str, int]:
    """Return how far each stream is applied."""
    return {document["_id"]: document["event_id"] for document in documents["streams"]}
