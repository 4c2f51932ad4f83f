"""How a document came to be, read from the log."""

import json

from msgspec import Raw

from projector.history import HistoryEntry, history
from shared.events import (
    EpisodeChanges,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
)
from shared.ids import StreamId, namespace_stream
from shared.kafka import partition_of
from tests.event_log import PartitionLog
from tests.read_models import PARTITIONS, ReadModels

ALICE = namespace_stream("alice")


def created(number: int, name: str) -> ProjectEpisodeCreated:
    return ProjectEpisodeCreated(
        id=f"e{number}",
        project_id="p1",
        project="robotics",
        ordinal=number,
        name=name,
        description=None,
        tags=(),
        folder=None,
        write_protected=False,
        status="running",
        metadata=Raw(b'{"seed":7}'),
    )


def renamed(number: int, old: str, new: str) -> ProjectEpisodeRevised:
    return ProjectEpisodeRevised(f"e{number}", "p1", "robotics", old, EpisodeChanges(name=new))


def alices_log(models: ReadModels) -> PartitionLog:
    """Two episodes that go by the same name, one after the other, and what else stands around them."""
    log = models.logs[partition_of(ALICE.encode(), PARTITIONS)]
    log.append(ALICE, NamespaceCreated("n1", "alice"), ProjectCreated("p1", "robotics", "Robotics"), created(1, "one"))
    log.append(StreamId("namespace:bob"), created(7, "one"))
    log.append(ALICE, created(2, "two"))
    log.take_over()
    log.append_fenced(ALICE, renamed(1, "one", "never"))
    log.append(ALICE, renamed(1, "one", "uno"))
    log.note()
    log.append(ALICE, renamed(2, "two", "one"))
    log.append(ALICE, ProjectEpisodeDeleted("e1", "p1", "robotics", "uno"))
    log.append(ALICE, ProjectEpisodeRestored("e1", "p1", "robotics", "uno"))
    return log


async def of(models: ReadModels, subject: str | None) -> list[HistoryEntry]:
    return [each async for each in history(models.kafka, ALICE, subject)]


async def test_the_history_of_a_stream_is_its_events_in_order(models: ReadModels) -> None:
    log = alices_log(models)
    await models.write()
    entries = await of(models, None)
    logged = [each for each in log.events if each.stream == ALICE]
    assert [each.event_id for each in entries] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [(each.at, each.command_id, each.actor, each.subject) for each in entries] == [
        (each.at, each.command_id, "test", each.event.id) for each in logged
    ]
    assert {each.command for each in entries} == {"UpsertEpisode"}, "the whole command's, on each of its events"
    assert entries[2].type == "ProjectEpisodeCreated"
    assert (entries[2].changed["name"], entries[2].changed["metadata"]) == ("one", {"seed": 7})
    assert entries[4].changed == {"name": "uno"}


async def test_a_subject_is_found_by_its_id_and_by_each_name_that_it_ever_had(models: ReadModels) -> None:
    alices_log(models)
    await models.write()
    first, second = [3, 5, 7, 8], [4, 6]
    for subject, expected in {
        "e1": first,
        "uno": first,
        "e2": second,
        "two": second,
        "one": sorted(first + second),
        "robotics": [2],
        "alice": [1],
        "never": [],
    }.items():
        assert [each.event_id for each in await of(models, subject)] == expected, subject


async def test_the_command_shows_it_to_people_and_programs(models: ReadModels) -> None:
    alices_log(models)
    await models.write()
    said = await models.cli("history", ALICE, "--subject", "two")
    assert said.status == 0, said
    assert [line for line in said.out.splitlines() if not line.startswith("    ")] == [
        "2026-03-01 12:00:00.003000  event 4  ProjectEpisodeCreated  e2",
        "2026-03-01 12:00:00.006000  event 6  ProjectEpisodeRevised  e2",
    ]
    assert said.out.splitlines()[-1] == '    {"name": "one"}'
    said = await models.cli("history", ALICE, "--subject", "two", "--json")
    assert [json.loads(line)["event_id"] for line in said.out.splitlines()] == [4, 6]
