"""Partitions of the events topic, written down as an ingestor writes them, without Kafka: for what reads the log."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import msgspec
from msgspec import Raw

from shared.codec import encode_record
from shared.commands import Entity
from shared.events import (
    CommandsRefused,
    EpisodeChanges,
    Event,
    FolderCreated,
    FolderRef,
    LoggedEvent,
    LoggedFence,
    LoggedNote,
    NamespaceCreated,
    NotedCommand,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
    TenantEpisodeRecorded,
    WriterFenced,
)
from shared.ids import CommandId, EventId, Position, StreamId, entity_id, namespace_stream, tenant_stream
from shared.log import Commit, Cursor

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

Record = tuple[bytes | None, bytes]
"""Key and value."""


@dataclass
class PartitionLog:
    """One partition, and what a reader must make of it."""

    records: list[Record] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    offset: int = 0
    """Kafka offset of the next record."""
    fence: int = -1
    position: int = 0
    last_event_ids: Counter[StreamId] = field(default_factory=Counter)
    at: datetime = NOON

    @property
    def events(self) -> list[LoggedEvent]:
        return [logged for commit in self.commits for logged in commit.events]

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.offset, self.fence, Position(self.position))

    def take_over(self) -> None:
        """Write a fence."""
        fence = WriterFenced("test", f"nonce-{self.offset}")
        self.fence = self.offset
        self._put(None, encode_record(LoggedFence(fence)))
        self.commits.append(Commit(self.cursor, fence=fence))

    def append(self, stream: StreamId, *events: Event) -> Commit:
        """Write the events of one command."""
        if self.fence < 0:
            self.take_over()
        logged = self.logged(stream, events)
        for one in logged:
            self._put(stream.encode(), encode_record(one))
        self.position += len(events)
        self.last_event_ids[stream] += len(events)
        self.commits.append(Commit(self.cursor, tuple(logged)))
        return self.commits[-1]

    def note(self) -> None:
        """Write that a command was refused."""
        if self.fence < 0:
            self.take_over()
        self.position += 1
        refused = CommandsRefused(self.offset, (NotedCommand(CommandId(f"refused-{self.offset}"), "gone"),))
        note = LoggedNote(Position(self.position), self.fence, self.at, refused)
        self._put(None, encode_record(note))
        self.commits.append(Commit(self.cursor, note=note))

    def append_fenced(self, stream: StreamId, *events: Event) -> None:
        """Write what a replaced writer still sends: it did not happen."""
        for one in self.logged(stream, events):
            zombie = msgspec.structs.replace(one, writer=self.fence - 1)
            self._put(stream.encode(), encode_record(zombie))

    def append_foreign(self, value: bytes) -> None:
        """Write what is no record of ours."""
        self._put(b"foreign", value)

    def logged(self, stream: StreamId, events: Sequence[Event]) -> list[LoggedEvent]:
        """The events as a command would have them in the log next."""
        self.at += timedelta(milliseconds=1)
        return [
            LoggedEvent(
                stream=stream,
                event_id=EventId(self.last_event_ids[stream] + number),
                position=Position(self.position + number),
                writer=self.fence,
                command_id=CommandId(f"command-{self.offset}"),
                command_offset=self.offset,
                actor="test",
                at=self.at,
                event=event,
                completes="UpsertEpisode" if number == len(events) else None,
            )
            for number, event in enumerate(events, 1)
        ]

    def _put(self, key: bytes | None, value: bytes) -> None:
        self.records.append((key, value))
        self.offset += 1


@dataclass
class FakeEpisode:
    """What the writer of a fake history must remember of an episode."""

    id: str
    project_id: str
    project: str
    name: str
    stream: StreamId
    deleted: bool = False


@dataclass
class History:
    """A random, valid history of both APIs in one partition. The same seed gives the same history."""

    log: PartitionLog
    random: random.Random
    prefix: str = ""
    namespaces: int = 3
    tenants: int = 3
    content_bytes: int = 60
    episodes: list[FakeEpisode] = field(default_factory=list)
    projects: dict[tuple[str, str], str] = field(default_factory=dict)
    ordinals: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    def step(self) -> None:
        """Write one more command."""
        deeds = (self.create, self.create, self.revise, self.revise, self.delete, self.restore, self.record)
        self.random.choice(deeds)()

    def create(self) -> None:
        """Upsert an episode that is new, and what it needs."""
        slug = f"{self.prefix}n{self.random.randrange(self.namespaces)}"
        stream, project = namespace_stream(slug), f"p{self.random.randrange(3)}"
        events: list[Event] = []
        if slug not in self.seen:
            self.seen.add(slug)
            events.append(NamespaceCreated(self._id(), slug))
        project_id = self.projects.get((slug, project))
        if project_id is None:
            project_id = self.projects[slug, project] = self._id()
            events.append(ProjectCreated(project_id, project, project))
        folder = None
        if self.random.random() < 0.2:
            folder = FolderRef(self._id(), f"/a/{self.log.offset}")
            events.append(FolderCreated(folder.id, project_id, project, None, folder.path, folder.name))
        self.ordinals[project_id] += 1
        episode = FakeEpisode(self._id(), project_id, project, f"episode {self.log.offset}", stream)
        self.episodes.append(episode)
        events.append(
            ProjectEpisodeCreated(
                id=episode.id,
                project_id=project_id,
                project=project,
                ordinal=self.ordinals[project_id],
                name=episode.name,
                description=self._text(),
                tags=("a", "b"),
                folder=folder,
                write_protected=False,
                status="running",
                metadata=Raw(b'{"n":1}'),
            )
        )
        self.log.append(stream, *events)

    def revise(self) -> None:
        """Change an episode, its name too now and then."""
        if (episode := self._pick(deleted=False)) is None:
            return self.create()
        old = episode.name
        if self.random.random() < 0.3:
            episode.name = f"renamed {self.log.offset}"
        changes = EpisodeChanges(
            name=msgspec.UNSET if episode.name == old else episode.name,
            description=self._text(),
            status=self.random.choice(("completed", "failed")),
        )
        self.log.append(
            episode.stream, ProjectEpisodeRevised(episode.id, episode.project_id, episode.project, old, changes)
        )
        return None

    def delete(self) -> None:
        """Delete an episode."""
        if (episode := self._pick(deleted=False)) is None:
            return self.create()
        episode.deleted = True
        self.log.append(
            episode.stream,
            ProjectEpisodeDeleted(episode.id, episode.project_id, episode.project, episode.name),
        )
        return None

    def restore(self) -> None:
        """Bring a deleted episode back."""
        if (episode := self._pick(deleted=True)) is None:
            return self.create()
        episode.deleted = False
        self.log.append(
            episode.stream,
            ProjectEpisodeRestored(episode.id, episode.project_id, episode.project, episode.name),
        )
        return None

    def record(self, items: int | None = None) -> None:
        """Record a batch of episodes of a tenant."""
        tenant = f"{self.prefix}t{self.random.randrange(self.tenants)}"
        stream = tenant_stream(tenant)
        self.log.append(
            stream,
            *(
                TenantEpisodeRecorded(
                    id=f"ep_{self._id()}",
                    type="message",
                    content=self._text(),
                    source="test",
                    timestamp=self.log.at,
                    entities=tuple(self._entity(tenant) for _ in range(self.random.randrange(3))),
                )
                for _ in range(items or self.random.randint(1, 5))
            ),
        )

    def _entity(self, tenant: str) -> Entity:
        name = f"Thing {self.random.randrange(20)}"
        return Entity(entity_id(tenant, "thing", name), name, "thing")

    def _pick(self, *, deleted: bool) -> FakeEpisode | None:
        for _ in range(8):
            if self.episodes and (episode := self.random.choice(self.episodes)).deleted == deleted:
                return episode
        return None

    def _text(self) -> str:
        return "".join(self.random.choices("abcdefgh ", k=self.content_bytes))

    def _id(self) -> str:
        return f"{self.random.getrandbits(96):024x}"
