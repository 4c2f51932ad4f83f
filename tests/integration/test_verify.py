"""Verifying: whatever is altered in MongoDB or missing from the log is found and named, and nothing else ever is."""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from bson import Int64, ObjectId
from pymongo.errors import OperationFailure

import projector.verify
from projector.__main__ import _mend
from projector.documents import Checkpoint
from projector.jobs import DIFFERENT, EXTRA, MISSING
from projector.repair import Repaired, _StreamFold, repair
from projector.verify import SnapshotTooOldError, Verdict
from projector.views import INDEXES
from shared.errors import EpisodesError
from shared.events import ProjectCreated
from shared.ids import namespace_stream
from shared.mongo import Database, Session
from shared.read_models import CHECKPOINTS
from tests.event_log import NOON, PartitionLog
from tests.read_models import ReadModels, until

MUTATIONS = 150
ALICE = namespace_stream("alice")

Named = tuple[str, str, str]
"""Kind, collection and key: how a difference is reported."""


@dataclass
class Vandal:
    """Alters documents behind the service's back, each one once, and remembers what must be reported."""

    database: Database
    random: random.Random
    untouched: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    done: dict[Named, str] = field(default_factory=dict)
    """What was altered → the field, or the deed."""

    async def look(self) -> None:
        for name in INDEXES:
            there = await self.database[name].find().to_list(None)
            self.random.shuffle(there)
            self.untouched[name] = there

    async def mutate(self) -> None:
        """Do one more thing, anywhere."""
        deeds = (
            self.delete,
            self.duplicate,
            self.alter,
            self.swap,
            self.count_wrongly,
            self.orphan,
            self.misplace,
            self.retype,
            self.disown,
        )
        await self.random.choice(deeds)()

    async def delete(self) -> None:
        name, document = self._take()
        await self.database[name].delete_one({"_id": document["_id"]})
        self.done[MISSING, name, document["_id"]] = "delete"

    async def duplicate(self) -> None:
        name, document = self._take()
        identity = self.random.choice((f"{document['_id']}-again", ObjectId(), 7 + len(self.done)))
        await self.database[name].insert_one({**document, "_id": identity})
        self.done[EXTRA, name, identity if isinstance(identity, str) else repr(identity)] = "duplicate"

    async def impersonate(self) -> None:
        """Add a document with an ``_id`` that reads the same, so that MongoDB has it before the real one."""
        name, document = self._take("folders")
        impostor = ObjectId(document["_id"])
        await self.database[name].delete_one({"_id": document["_id"]})
        await self.database[name].insert_one({**document, "_id": impostor})
        await self.database[name].insert_one(document)
        self.done[EXTRA, name, repr(impostor)] = "impersonate"

    async def alter(self) -> None:
        name, document = self._take()
        key = self.random.choice([key for key in document if key not in {"_id", *OWNERS}])
        await self._set(name, document, key, altered(document[key]))

    async def swap(self) -> None:
        """Give two documents each other's contents."""
        name = self.random.choice(("project_episodes", "tenant_episodes", "folders", "entities"))
        if len(self.untouched[name]) < 2:
            return
        (_, first), (_, second) = self._take(name), self._take(name)
        for one, other in ((first, second), (second, first)):
            await self.database[name].replace_one({"_id": one["_id"]}, {**other, "_id": one["_id"]})
            self.done[DIFFERENT, name, one["_id"]] = "swap"

    async def count_wrongly(self) -> None:
        name, key = self.random.choice((("projects", "total"), ("entities", "mentions")))
        if self.untouched[name]:
            _, document = self._take(name)
            await self._set(name, document, key, document[key] + self.random.choice((-1, 1)))

    async def orphan(self) -> None:
        name = self.random.choice(tuple(INDEXES))
        key = f"orphan-{len(self.done)}"
        await self.database[name].insert_one({"_id": key})
        self.done[EXTRA, name, key] = "orphan"

    async def misplace(self) -> None:
        """Say that a stream is elsewhere than it is."""
        if self.untouched["streams"]:
            _, document = self._take("streams")
            await self._set("streams", document, "event_id", document["event_id"] - 1)

    async def retype(self) -> None:
        """Store the same value as another type, leave a null out, or turn the fields round."""
        name, document = self._take()
        numbers = [key for key, value in document.items() if type(value) is int]
        nothings = [key for key, value in document.items() if value is None]
        if numbers:
            key = self.random.choice(numbers)
            retyped = self.random.choice((Int64, float))
            await self._set(name, document, key, retyped(document[key]))
        elif nothings:
            key = self.random.choice(nothings)
            await self.database[name].update_one({"_id": document["_id"]}, {"$unset": {key: True}})
            self.done[DIFFERENT, name, document["_id"]] = key
        else:
            await self.database[name].replace_one({"_id": document["_id"]}, dict(reversed(document.items())))
            self.done[DIFFERENT, name, document["_id"]] = "order of the fields"

    async def disown(self) -> None:
        """Give a document to somebody else."""
        name = self.random.choice([name for name in INDEXES if name != "streams"])
        if self.untouched[name]:
            _, document = self._take(name)
            owner = next(key for key in OWNERS if key in document)
            owners = {other[owner] for other in self.untouched[name]} - {document[owner]}
            await self._set(name, document, owner, self.random.choice(("stranger", *sorted(owners))))

    def _take(self, name: str | None = None) -> tuple[str, dict[str, Any]]:
        if name is None:
            name = self.random.choice([name for name, there in self.untouched.items() if len(there) > 1])
        return name, self.untouched[name].pop()

    async def _set(self, name: str, document: dict[str, Any], key: str, value: object) -> None:
        await self.database[name].update_one({"_id": document["_id"]}, {"$set": {key: value}})
        self.done[DIFFERENT, name, document["_id"]] = key


OWNERS = ("tenant_id", "namespace", "slug")


def altered(value: Any) -> Any:
    """Something else."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return value[:-1] + chr(ord(value[-1]) ^ 1) if value else "x"
        case list():
            return [*value, "x"]
        case dict():
            return {**value, "x": 1}
        case _:
            return "x"


def named(verdict: Verdict) -> dict[Named, dict[str, tuple[str, str]]]:
    found = {(each.kind, each.collection, each.key): each.fields for each in verdict.differences}
    assert len(found) == len(verdict.differences) == verdict.different, "each once"
    return found


async def vandal(models: ReadModels, seed: int) -> Vandal:
    made = Vandal(models.database(), random.Random(seed))  # noqa: S311
    await made.look()
    return made


async def some_models(models: ReadModels, steps: int) -> None:
    models.histories(steps)
    await models.write()
    await models.project()
    assert (await models.verdict()).good


@pytest.mark.parametrize("events_per_range", [50_000, 100])
async def test_every_mutation_is_found_and_nothing_else(
    models: ReadModels, monkeypatch: pytest.MonkeyPatch, events_per_range: int
) -> None:
    monkeypatch.setattr(projector.verify, "EVENTS_PER_RANGE", events_per_range)
    await some_models(models, 250)
    at_work = await vandal(models, events_per_range)
    while len(at_work.done) < MUTATIONS:
        await at_work.mutate()
    found = named(await models.verdict())
    assert found.keys() == at_work.done.keys(), found.keys() ^ at_work.done.keys()
    for (kind, collection, key), deed in at_work.done.items():
        fields = found[kind, collection, key]
        if kind == DIFFERENT and deed != "swap":
            assert [*fields] == [deed], (collection, key)
        assert bool(fields) == (kind == DIFFERENT)
        for must_be, is_now in fields.values():
            assert must_be != is_now


async def test_each_kind_of_mutation_is_found_alone(models: ReadModels) -> None:
    await some_models(models, 60)
    at_work = await vandal(models, 1)
    before: set[Named] = set()
    deeds = (at_work.delete, at_work.impersonate, at_work.retype, at_work.disown, at_work.count_wrongly)
    for deed in deeds:
        await deed()
        found = named(await models.verdict()).keys()
        assert found - before == at_work.done.keys() - before
        assert len(found - before) == 1
        before = set(found)


async def test_the_report_names_each_difference_and_what_to_do(models: ReadModels) -> None:
    log = models.logs[1]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"))
    log.append(ALICE, ProjectCreated("p2", "vision", "vision"))
    await models.write()
    await models.project()

    good = await models.cli("verify", "--json")
    assert good.status == 0, good
    assert (good.json["generation"], good.json["events"], good.json["dropped"]) == (1, 2, 0)
    assert good.json["content"]["projects"]["documents"] == 2
    assert [good.json["differences"], good.json["findings"]] == [[], []]
    assert [told["phase"] for told in good.progress if told["done"] == told["of"]][-1].startswith("comparing partition")

    await models.database().projects.update_one({"_id": "p1"}, {"$set": {"total": 3.0, "extra": None}})
    await models.database().streams.delete_one({})
    await models.database().folders.insert_one({"_id": "f1", "namespace": "alice"})
    bad = await models.cli("verify", "--json", "--generation", "1")
    assert bad.status == 1
    assert sorted(bad.json["differences"], key=lambda each: str(each["key"])) == [
        {"kind": EXTRA, "collection": "folders", "key": "f1", "stream": ALICE, "fields": {}},
        {"kind": MISSING, "collection": "streams", "key": ALICE, "stream": ALICE, "fields": {}},
        {
            "kind": DIFFERENT,
            "collection": "projects",
            "key": "p1",
            "stream": ALICE,
            "fields": {"total": ["0", "3.0"], "extra": ["absent", "None"]},
        },
    ]
    assert bad.json["different"] == 3
    bad = await models.cli("verify", "--folder", str(models.folder / "spill"))
    assert bad.status == 1
    for line in (
        f"EXTRA  folders/f1  of {ALICE}",
        f"MISSING  streams/{ALICE}  of {ALICE}",
        f"DIFFERENT  projects/p1  of {ALICE}",
        "    total: must be 0, is 3.0",
        "    extra: must be absent, is None",
    ):
        assert line in bad.out.splitlines()
    assert bad.out.splitlines()[-1].startswith("3 documents differ. `history STREAM` shows how they came to be; ")
    assert [*(models.folder / "spill").iterdir()] == [], "what was spilled is removed"

    mended = await models.cli("rebuild", "--stream", ALICE)
    assert (mended.status, mended.out) == (0, f"{ALICE}: 1 put back, 1 mended, 1 removed\n")
    good = await models.cli("verify", "--workers", "1")
    assert good.status == 0, good
    assert good.out.splitlines()[-1] == "every document is as the log says"


async def test_a_folder_that_was_spilled_to_before_is_no_trap(models: ReadModels) -> None:
    models.histories(20)
    await models.write()
    await models.project()
    said = await models.cli("verify", "--folder", str(models.folder / "spill"))
    assert said.status == 0, said
    await models.database().drop_collection(CHECKPOINTS)
    for name in INDEXES:
        await models.database().drop_collection(name)
    assert (await models.cli("verify", "--folder", str(models.folder / "spill"))).status == 0


async def test_a_repair_takes_in_what_comes_meanwhile(models: ReadModels, monkeypatch: pytest.MonkeyPatch) -> None:
    log = models.logs[1]
    log.append(ALICE, ProjectCreated("p1", "robotics", "robotics"))
    await models.write()
    await models.project()
    await models.database().projects.update_one({"_id": "p1"}, {"$inc": {"total": 1}})
    fold = _StreamFold.up_to
    meanwhile = iter([True])

    async def interrupted(self: _StreamFold, checkpoint: Checkpoint) -> None:
        await fold(self, checkpoint)
        if next(meanwhile, False):
            log.append(ALICE, ProjectCreated("p2", "vision", "vision"))
            await models.write()
            await models.project()

    monkeypatch.setattr(_StreamFold, "up_to", interrupted)
    assert await repair(models.client, models.kafka, 1, ALICE, INDEXES) == Repaired(ALICE, different=1)
    assert next(meanwhile, None) is None
    verdict = await models.verdict()
    assert verdict.good, verdict
    assert verdict.events == 2


async def test_views_are_mended_in_place_however_much_else_differs(
    models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some_models(models, 60)
    await models.database().tenant_episodes.update_many({}, {"$set": {"content": "x"}})
    await models.database().projects.update_many({}, {"$inc": {"total": 1}})
    monkeypatch.setattr(projector.verify, "_MOST_DETAILS", 20)
    for name, value in models.servers.env.items():
        monkeypatch.setenv(name, value)
    mended = await _mend(models.client, models.folder, 1, lambda phase, done, of: None, None, ["projects", "entities"])
    streams = {logged.stream for log in models.logs.values() for logged in log.events}
    namespaces = {stream for stream in streams if stream.startswith("namespace:")}
    assert {each.stream for each in mended} == namespaces
    assert all(each.different > 0 == each.missing == each.extra for each in mended)
    monkeypatch.undo()
    assert {collection for _, collection, _ in named(await models.verdict())} == {"tenant_episodes"}
    nothing = await models.cli("rebuild", "--views", "projects")
    assert (nothing.status, nothing.out) == (0, "nothing differs\n")
    unknown = await models.cli("rebuild", "--views", "gardens")
    assert unknown.status == 2
    assert "gardens: there are namespaces, projects" in unknown.err


async def has_some(models: ReadModels) -> bool:
    return await models.database().streams.find_one({}) is not None


async def test_nothing_is_found_on_a_healthy_system_under_load(models: ReadModels) -> None:
    histories = models.histories(30)
    await models.write()
    writing = True

    async def write() -> None:
        while writing:
            for history in histories:
                for _ in range(5):
                    history.step()
                if history.random.random() < 0.1:
                    models.replace_writer(history)
            await models.write()
            await asyncio.sleep(0.01)

    async with models.followed(), asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        await until(lambda: has_some(models), "the first events to be applied")
        events = 0
        for _ in range(5):
            verdict = await models.verdict()
            assert verdict.good, verdict
            assert verdict.events > events, "it is under load"
            events = verdict.events
        writing = False


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_hole_in_a_copied_log_is_found(models: ReadModels, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    histories = models.histories(30)
    await models.write()
    await models.project()
    assert (await models.verdict()).good
    holes, copies = {}, {}
    for partition, history in enumerate(histories):
        records = history.log.records
        hole = holes[partition] = chance.randrange(len(records) - 1)
        copied = PartitionLog(records=records[:hole] + records[hole + 1 :], offset=len(records) - 1)
        copies[partition] = copied
    await models.begin_anew()
    models.logs = copies
    await models.write()
    try:
        verdict = await models.verdict()
    except EpisodesError as error:
        assert "episodes.events/" in str(error)  # noqa: PT017
        return
    for partition in holes:
        assert any(finding.startswith(f"partition {partition}: ") for finding in verdict.findings), holes


async def test_a_hole_in_the_log_is_found_though_the_read_models_agree_with_it(models: ReadModels) -> None:
    log = models.logs[0]
    for number in range(9):
        log.append(ALICE, ProjectCreated(f"p{number}", f"p{number}", "p"))
    del log.records[5]
    log.commits, log.offset, log.position = [], log.offset - 1, 4
    await models.write()
    await models.project()
    said = await models.cli("verify")
    assert said.status == 1
    assert (
        "LOG  partition 0: offset 5: event 6 of namespace:alice (position 6) does not follow position 4, and nothing "
        "after it does: records before it are missing"
    ) in said.out.splitlines()


async def test_checkpoints_that_do_not_fit_the_log_are_found(models: ReadModels) -> None:
    await some_models(models, 20)
    checkpoints = models.database()[CHECKPOINTS]
    await checkpoints.update_one({"_id": 0}, {"$inc": {"position": 1}})
    await checkpoints.update_one({"_id": 1}, {"$inc": {"offset": 1}})
    await checkpoints.update_one({"_id": 2}, {"$set": {"stopped": {"offset": 9, "reason": "odd", "at": NOON}}})
    [first, second, third] = (await models.verdict()).findings
    assert first.startswith("partition 0: the checkpoint says position ")
    assert second.startswith("partition 1: the checkpoint is at offset ")
    assert third == "partition 2: stopped at offset 9: odd"


async def test_a_log_that_cannot_be_read_is_one_sentence(models: ReadModels) -> None:
    await some_models(models, 20)
    models.logs[0].append_foreign(b"not ours")
    await models.write()
    await models.database()[CHECKPOINTS].update_one({"_id": 0}, {"$inc": {"offset": 1}})
    said = await models.cli("verify")
    assert said.status == 1
    assert said.err.splitlines()[-1].startswith("python -m projector verify: episodes.events/0, offset ")
    assert "Traceback" not in said.err


async def test_a_moment_that_mongodb_no_longer_has_is_told_with_what_to_do(
    models: ReadModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    await some_models(models, 20)
    read = projector.verify._note_stored

    async def read_too_late(database: Database, session: Session, *rest: Any) -> None:
        with suppress(OperationFailure):  # it is gone
            for _ in range(300):
                await database[CHECKPOINTS].find_one({}, session=session)
                await database["meanwhile"].insert_one({})
                await asyncio.sleep(0.1)
        await read(database, session, *rest)

    monkeypatch.setattr(projector.verify, "_note_stored", read_too_late)
    admin, parameter = models.client.admin, "minSnapshotHistoryWindowInSeconds"
    usual = (await admin.command({"getParameter": 1, parameter: 1}))[parameter]
    await admin.command({"setParameter": 1, parameter: 1})
    try:
        with pytest.raises(SnapshotTooOldError, match=parameter):
            await models.verdict()
    finally:
        await admin.command({"setParameter": 1, parameter: usual})
