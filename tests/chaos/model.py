"""The log by the reader's rule, and the read models that follow from it: a second reading of both, without the service.

The rule for the records of one events partition, in the order of their offsets:

    Keep `fence`, the offset of the latest `WriterFenced`, and `position`, both of what was accepted so far. A record
    happened if its `writer` is `fence` and its `position` is the next one. Anything else did not happen.

All events of one command stand together and the last one says ``completes``; a note names commands without events.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from tests.chaos.log_reader import Log, Models, Record, read_log, read_models

BLOCK = 1_000
"""Ordinals for which a project keeps one count of the living."""

Document = dict[str, Any]
Expected = dict[str, dict[Any, Document]]
"""Collection → _id → document."""


class Finding(Struct, frozen=True):
    """Something that must not be."""

    kind: str
    detail: str
    operations: tuple[int, ...] = ()
    """Numbers of the calls that it shows in."""


class Event(Struct, frozen=True):
    """An event that happened."""

    offset: int
    position: int
    stream: str
    event_id: int
    type: str
    time: datetime
    data: dict[str, Any]
    metadata: str | None
    """Its JSON text, where ``data`` or its ``changes`` hold metadata."""


class Judged(Struct, frozen=True):
    """What the log says of one command: either its events, or a code."""

    partition: int
    offset: int
    """Of its last record. Commands of one note share it."""
    command_id: str
    command_offset: int | None
    """None in a note, which has the last one's only."""
    events: tuple[Event, ...] = ()
    code: str = ""
    key: str | None = None
    """The Idempotency-Key that its events carry."""

    @property
    def last_event_id(self) -> int:
        return self.events[-1].event_id


class Reading(Struct):
    """A log as it was read."""

    judged: list[Judged] = []
    """Partition by partition, in the order of the log."""
    positions: dict[int, int] = {}
    """Partition → position of the last record that happened."""
    findings: list[Finding] = []


# ---- the reader's rule -----------------------------------------------------------------------------------------------


def read(log: Log) -> Reading:
    """Read the log by the rule, and look whether it fits together by itself."""
    reading = Reading()
    for partition, records in sorted(log.events.items()):
        _Partition(reading, partition).read(records)
    _check_event_ids(reading)
    return reading


def read_all(bootstrap: str, mongodb_url: str, *, within: float = 60.0) -> tuple[Log, Models]:
    """All there is, once every command is decided and every generation level with the log, or after ``within`` s."""
    until = time.monotonic() + within
    while True:
        log, models = read_log(bootstrap), read_models(mongodb_url)
        if not _is_unfinished(log, models) or time.monotonic() > until:
            return log, models
        time.sleep(_POLL_SECONDS)


_POLL_SECONDS = 0.5


def _is_unfinished(log: Log, models: Models) -> bool:
    reading = read(log)
    judged = {one.command_id for one in reading.judged}
    if any(command_id(record) not in judged for records in log.commands.values() for record in records):
        return True
    level = {partition: position for partition, position in reading.positions.items() if position}
    return any(generation.positions != level for generation in models.generations)


def command_id(record: Record) -> str:
    """The command in a record of the commands topic."""
    return record.headers.get("correlation-id", "")


class _CloudEvent(Struct):
    type: str
    time: datetime
    data: Raw
    position: int = -1
    writer: int = -1
    streamid: str = ""
    eventid: int = -1
    commandid: str = ""
    commandoffset: int = -1
    completes: str | None = None
    idempotencykey: str | None = None


class _Changes(Struct, frozen=True):
    metadata: Raw | UnsetType = UNSET


class _Data(Struct):
    metadata: Raw | UnsetType = UNSET
    changes: _Changes = _Changes()


_cloud_event = msgspec.json.Decoder(_CloudEvent).decode
_data = msgspec.json.Decoder(_Data).decode


class _Partition:
    """Adds one partition to the reading."""

    def __init__(self, reading: Reading, partition: int) -> None:
        self._reading = reading
        self._number = partition
        self._fence = -1
        self._position = 0
        self._open: list[tuple[str, Event]] = []
        """The events of a command of which the last one is still to come."""

    def read(self, records: Iterable[Record]) -> None:
        for record in records:
            cloud_event = _cloud_event(record.value)
            kind = cloud_event.type.split(".")[1]
            if kind == "WriterFenced":
                self._break_off(record.offset)
                self._fence = record.offset
            elif self._happened(record.offset, cloud_event):
                self._add(record.offset, kind, cloud_event)
        self._break_off(None)
        self._reading.positions[self._number] = self._position

    def _happened(self, offset: int, cloud_event: _CloudEvent) -> bool:
        if cloud_event.writer != self._fence:
            return False
        if cloud_event.position > self._position + 1:
            self._found("gap", offset, f"position {cloud_event.position} comes after {self._position}")
        elif cloud_event.position <= self._position:
            self._found("id_repeated", offset, f"position {cloud_event.position} comes again after {self._position}")
        else:
            self._position += 1
            return True
        return False

    def _add(self, offset: int, kind: str, cloud_event: _CloudEvent) -> None:
        if kind == "CommandsRefused":
            self._break_off(offset)
            note = msgspec.json.decode(cloud_event.data)
            self._reading.judged += [
                Judged(self._number, offset, noted["command_id"], None, code=noted["code"])
                for noted in note["refusals"]
            ]
            return
        data = _data(cloud_event.data)
        metadata = data.metadata if data.metadata is not UNSET else data.changes.metadata
        event = Event(
            offset,
            cloud_event.position,
            cloud_event.streamid,
            cloud_event.eventid,
            kind,
            cloud_event.time,
            msgspec.json.decode(cloud_event.data),
            None if metadata is UNSET else bytes(metadata).decode(),
        )
        if self._open and self._open[0][0] != cloud_event.commandid:
            self._break_off(offset)
        self._open.append((cloud_event.commandid, event))
        if cloud_event.completes is not None:
            events = tuple(event for _, event in self._open)
            self._open = []
            judged = Judged(
                self._number,
                offset,
                cloud_event.commandid,
                cloud_event.commandoffset,
                events,
                key=cloud_event.idempotencykey,
            )
            self._reading.judged.append(judged)

    def _break_off(self, offset: int | None) -> None:
        if self._open:
            self._found("half_batch", offset, f"the events of command {self._open[0][0]} break off here")
        self._open = []

    def _found(self, kind: str, offset: int | None, what: str) -> None:
        place = "at the end" if offset is None else f"at offset {offset}"
        self._reading.findings.append(Finding(kind, f"events partition {self._number} {place}: {what}"))


def _check_event_ids(reading: Reading) -> None:
    last: dict[str, tuple[int, Event]] = {}
    for judged in reading.judged:
        for event in judged.events:
            partition, before = last.get(event.stream, (judged.partition, None))
            wanted = 1 if before is None else before.event_id + 1
            if event.event_id != wanted:
                kind = "gap" if event.event_id > wanted else "id_repeated"
                what = f"event_id {event.event_id} of {event.stream} stands where {wanted} was next"
                reading.findings.append(Finding(kind, f"{what} (command {judged.command_id})"))
            if before is not None and (partition != judged.partition or event.time < before.time):
                what = f"event_id {event.event_id} of {event.stream} is older than the one before, or elsewhere"
                reading.findings.append(Finding("out_of_order", what))
            last[event.stream] = judged.partition, event


# ---- the state that follows from it ----------------------------------------------------------------------------------


class Namespace(Struct):
    """What the rules of the projects API look at."""

    id: str | None = None
    projects: dict[str, Document] = {}
    ordinals: dict[str, int] = {}
    """Project → the last ordinal that was given."""
    folders: dict[tuple[str, str], str] = {}
    """Project, path → id."""
    episodes: dict[tuple[str, str], Document] = {}
    """Project, name → the episode, living or deleted."""


class Tenant(Struct):
    """What the rules of the batch API look at."""

    items: dict[str, tuple[int, str]] = {}
    """Item key → event_id and episode id of the first item under it."""


class State:
    """Everything, after the events that were applied. A document is replaced, never changed."""

    def __init__(self) -> None:
        self.documents: Expected = {
            name: {}
            for name in (
                "namespaces",
                "projects",
                "folders",
                "project_episodes",
                "tenant_episodes",
                "entities",
                "streams",
            )
        }
        self.namespaces: dict[str, Namespace] = {}
        self.tenants: dict[str, Tenant] = {}

    def namespace(self, stream: str) -> Namespace:
        return self.namespaces.setdefault(stream, Namespace())

    def tenant(self, stream: str) -> Tenant:
        return self.tenants.setdefault(stream, Tenant())

    def head(self, stream: str) -> int:
        """The last event_id of the stream, 0 for none."""
        head: int = self.documents["streams"].get(stream, {"event_id": 0})["event_id"]
        return head

    def apply(self, event: Event) -> str | None:
        """Fold one event in. Says what does not fit, if something does not; then little of it is done."""
        try:
            self._fold(event)
        except (KeyError, IndexError) as error:
            return f"{event.type} {event.event_id} of {event.stream} does not fit what was before it: {error!r}"
        finally:
            self.documents["streams"][event.stream] = {
                "_id": event.stream,
                "event_id": event.event_id,
                "at": event.time,
            }
        return None

    def _fold(self, event: Event) -> None:
        owner, data, documents = event.stream.partition(":")[2], event.data, self.documents
        made = {"_id": data["id"], "created_at": event.time}
        match event.type:
            case "NamespaceCreated":
                self.namespace(event.stream).id = data["id"]
                documents["namespaces"][data["id"]] = {**made, "slug": data["slug"]}
            case "ProjectCreated":
                project = {"namespace": owner, "slug": data["slug"], "name": data["name"], "total": 0, "blocks": []}
                documents["projects"][data["id"]] = {**made, **project}
                self.namespace(event.stream).projects[data["slug"]] = documents["projects"][data["id"]]
            case "FolderCreated":
                folder = {key: data[key] for key in ("project", "project_id", "parent_id", "name", "path")}
                documents["folders"][data["id"]] = {**made, "namespace": owner, **folder}
                self.namespace(event.stream).folders[data["project"], data["path"]] = data["id"]
            case "ProjectEpisodeCreated":
                same = ("project", "project_id", "ordinal", "name", "description", "tags", "status", "folder")
                self._put(
                    event,
                    {
                        **made,
                        "namespace": owner,
                        **{key: data[key] for key in (*same, "write_protected")},
                        "metadata": event.metadata,
                        "updated_at": event.time,
                        "deleted": False,
                        "deleted_at": None,
                        "event_id": event.event_id,
                    },
                    counted=1,
                )
            case "ProjectEpisodeRevised":
                changes = dict(data["changes"])
                if "metadata" in changes:
                    changes["metadata"] = event.metadata
                self._put(event, self._after(event, changes))
            case "ProjectEpisodeDeleted":
                self._put(event, self._after(event, {"deleted": True, "deleted_at": event.time}), counted=-1)
            case "ProjectEpisodeRestored":
                self._put(event, self._after(event, {"deleted": False, "deleted_at": None}), counted=1)
            case "TenantEpisodeRecorded":
                self._record(event, owner)
            case unknown:
                raise KeyError(unknown)

    def _after(self, event: Event, changes: Mapping[str, Any]) -> Document:
        episode = self.documents["project_episodes"][event.data["id"]]
        return {**episode, **changes, "updated_at": event.time, "event_id": event.event_id}

    def _put(self, event: Event, episode: Document, counted: int = 0) -> None:
        namespace, slug = self.namespace(event.stream), episode["project"]
        before = self.documents["project_episodes"].get(episode["_id"])
        if before is not None and before["name"] != episode["name"]:
            namespace.episodes.pop((slug, before["name"]), None)
        namespace.episodes[slug, episode["name"]] = episode
        namespace.ordinals[slug] = max(namespace.ordinals.get(slug, 0), episode["ordinal"])
        self.documents["project_episodes"][episode["_id"]] = episode
        if counted:
            project = self.documents["projects"][episode["project_id"]]
            block = (episode["ordinal"] - 1) // BLOCK
            blocks = project["blocks"] + [0] * (block + 1 - len(project["blocks"]))
            blocks[block] += counted
            project = {**project, "total": project["total"] + counted, "blocks": blocks}
            self.documents["projects"][project["_id"]] = namespace.projects[slug] = project

    def _record(self, event: Event, owner: str) -> None:
        data = event.data
        entities = data.get("entities", [])
        self.documents["tenant_episodes"][data["id"]] = {
            "_id": data["id"],
            "tenant_id": owner,
            "event_id": event.event_id,
            **{key: data.get(key) for key in ("namespace", "type", "content", "source", "author", "channel")},
            "timestamp": datetime.fromisoformat(data["timestamp"]),
            "metadata": event.metadata if event.metadata is not None else "{}",
            "entities": entities,
            "status": "active",
            "created_at": event.time,
        }
        if (key := data.get("idempotency_key")) is not None:
            self.tenant(event.stream).items.setdefault(key, (event.event_id, data["id"]))
        for entity in {entity["id"]: entity for entity in reversed(entities)}.values():
            identity = f"{owner}/{entity['id']}"
            first = {
                "_id": identity,
                "tenant_id": owner,
                "entity_id": entity["id"],
                "name": entity["name"],
                "type": entity["type"],
                "mentions": 0,
                "first_event_id": event.event_id,
            }
            known = self.documents["entities"].get(identity, first)
            self.documents["entities"][identity] = {
                **known,
                "mentions": known["mentions"] + 1,
                "last_event_id": event.event_id,
            }


def documents_at(judged: Sequence[Judged], positions: Mapping[int, int]) -> Expected:
    """The read models that follow from the log up to a position of each partition."""
    state = State()
    for one in judged:
        if one.events and one.events[-1].position <= positions.get(one.partition, 0):
            for event in one.events:
                state.apply(event)
    return state.documents


def by_partition(judged: Sequence[Judged]) -> Iterator[tuple[int, list[Judged]]]:
    """Partition by partition, as they stand in the reading."""
    for partition, of_it in groupby(judged, key=lambda one: one.partition):
        yield partition, list(of_it)
