"""The checker finds nothing in a small clean history, and exactly the one thing that is then altered in it."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET, Raw

from tests.chaos.checker import KINDS, check
from tests.chaos.history import History, Operation, outcome_of
from tests.chaos.log_reader import Generation, Log, Models, Record, instant
from tests.chaos.model import documents_at, read

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ALICE, BOB, ACME = "namespace:alice", "namespace:bob", "tenant:acme"


@dataclass
class Done:
    """A command with events in the log."""

    command: str
    stream: str
    events: list[tuple[str, dict[str, Any]]]
    key: str | None = None
    first_event_id: int | None = None
    """If it is not the next one."""
    first_position: int | None = None
    """If it is not the next one."""


@dataclass
class Noted:
    """A command without events in the log."""

    command: str
    code: str


@dataclass
class Story:
    """Calls and what the log says of their commands. The command of call 7 is ``c7``."""

    calls: dict[str, Operation] = field(default_factory=dict)
    entries: list[Done | Noted] = field(default_factory=list)
    strangers: set[str] = field(default_factory=set)
    """Commands of calls that are not in the history."""
    spoil: Callable[[Models], None] = lambda models: None
    """Alters the read models that follow from the log."""

    def call(
        self,
        kind: str,
        stream: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        status: int | None = 200,
        answer: Any = None,
        event_id: int | None = None,
        key: str | None = None,
        replayed: bool = False,
        min_event_id: int | None = None,
        connection: str = "",
    ) -> str:
        number = len(self.calls) + 1
        headers = {"traceparent": f"trace {number}"}
        headers |= {"idempotency-key": key} if key else {}
        headers |= {"x-min-event-id": str(min_event_id)} if min_event_id is not None else {}
        told = {"x-event-id": str(event_id)} if event_id is not None else {}
        told |= {"idempotency-replayed": "true"} if replayed else {}
        self.calls[f"c{number}"] = Operation(
            number=number,
            client=0,
            kind=kind,
            stream=stream,
            user=stream.partition(":")[2] if stream.startswith("namespace") else "",
            began=10.0 * number,
            ended=10.0 * number + 0.5,
            method=method,
            url="http://gateway",
            path=path,
            headers=headers,
            body=UNSET if body is None else Raw(msgspec.json.encode(body)),
            status=status,
            answer_headers=told,
            answer=UNSET if answer is None else Raw(msgspec.json.encode(answer)),
            outcome=outcome_of(method, status, answer),
            connection=connection,
        )
        return f"c{number}"

    def findings(self) -> set[str]:
        log = _log(self)
        reading = read(log)
        models = _models(documents_at(reading.judged, reading.positions), reading.positions)
        self.spoil(models)
        return {finding.kind for finding in check([*self.calls.values()], log, models)}


def _at(command: str) -> datetime:
    return NOON + timedelta(seconds=int(command[1:]))


def _log(story: Story) -> Log:
    values: list[dict[str, Any]] = [{"type": "episodes.WriterFenced.v1", "time": instant(NOON), "data": {}}]
    writes = [name for name, call in story.calls.items() if call.method != "GET" and "traceparent" in call.headers]
    heads: dict[str, int] = {}
    for entry in story.entries:
        common = {"time": instant(_at(entry.command)), "writer": 0, "commandoffset": writes.index(entry.command)}
        if isinstance(entry, Noted):
            refusals = [{"command_id": entry.command, "code": entry.code}]
            data: Any = {"command_offset": common["commandoffset"], "refusals": refusals}
            values.append({**common, "type": "episodes.CommandsRefused.v1", "position": len(values), "data": data})
            continue
        head = entry.first_event_id - 1 if entry.first_event_id is not None else heads.get(entry.stream, 0)
        for index, (kind, data) in enumerate(entry.events):
            position = len(values) if entry.first_position is None else entry.first_position + index
            event = {**common, "type": f"episodes.{kind}.v1", "position": position, "data": data}
            event |= {"streamid": entry.stream, "eventid": head + index + 1, "commandid": entry.command}
            if index == len(entry.events) - 1:
                event |= {"completes": "It", "idempotencykey": entry.key}
            values.append(event)
            heads[entry.stream] = head + index + 1
    events = [Record(offset, msgspec.json.encode(value)) for offset, value in enumerate(values)]
    commands = [
        Record(
            offset,
            b"",
            key=story.calls[name].stream.encode(),
            headers={"correlation-id": name, "traceparent": "" if name in story.strangers else f"trace {name[1:]}"},
        )
        for offset, name in enumerate(writes)
    ]
    return Log({0: commands}, {0: events})


def _models(documents: Mapping[str, Mapping[Any, dict[str, Any]]], positions: Mapping[int, int]) -> Models:
    collections: dict[str, list[Any]] = {name: [*there.values()] for name, there in documents.items()}
    collections["checkpoints"] = [{"_id": number, "position": position} for number, position in positions.items()]
    return Models([Generation(1, "live", in_use=True, collections=copy.deepcopy(collections))])


# ---- the clean history -----------------------------------------------------------------------------------------------

LIST = "/namespaces/alice/projects/arm/episodes"


def _created(identity: str, ordinal: int, name: str, description: str | None = None) -> tuple[str, dict[str, Any]]:
    data = {"id": identity, "project_id": "p", "project": "arm", "ordinal": ordinal, "name": name}
    data |= {"description": description, "tags": [], "folder": None, "write_protected": False}
    return "ProjectEpisodeCreated", {**data, "status": "running", "metadata": None}


def _revised(identity: str, name: str, project_id: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    data = {"id": identity, "project_id": project_id, "project": "arm", "name": name, "changes": changes}
    return "ProjectEpisodeRevised", data


def _upserted(identity: str, name: str, project_id: str, owner: str) -> dict[str, Any]:
    episode: dict[str, Any] = {"id": identity, "name": name, "description": None, "tags": [], "projectId": project_id}
    episode |= {"folderId": None, "writeProtected": False, "status": "running", "metadata": None}
    workspace = {"id": project_id, "slug": "arm"}
    return {
        "episode": episode,
        "workspace": workspace,
        "folder": None,
        "namespace": {"id": f"n-{owner}", "slug": owner},
    }


def _shown(identity: str, name: str, created: str, updated: str, description: str | None = None) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": identity, "name": name, "description": description, "tags": [], "status": "running"}
    times = {"createdAt": instant(_at(created)), "updatedAt": instant(_at(updated))}
    return {**shown, "writeProtected": False, "folderId": None, **times}


def _page(number: int, total: int, *episodes: Any) -> dict[str, Any]:
    return {"episodes": [*episodes], "page": number, "pageSize": 2, "total": total, "totalPages": -(-total // 2)}


def _space(owner: str, project_id: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("NamespaceCreated", {"id": f"n-{owner}", "slug": owner}),
        ("ProjectCreated", {"id": project_id, "slug": "arm", "name": "arm"}),
    ]


def _item(identity: str, content: str, at: str, key: str | None = None) -> tuple[str, dict[str, Any]]:
    data = {"id": identity, "type": "message", "content": content, "timestamp": instant(_at(at))}
    return "TenantEpisodeRecorded", {**data, **({"idempotency_key": key} if key else {})}


@pytest.fixture
def story() -> Story:
    """Alice's list grows; Bob's stream is for what no read looks at; Acme records batches."""
    story = Story()
    _write_as_alice(story)
    _write_as_bob(story)
    _record_for_acme(story)
    _read(story)
    return story


def _write_as_alice(story: Story) -> None:
    call, done = story.call, story.entries.append

    def alices(name: str, ordinal: int, event_id: int, *before: tuple[str, dict[str, Any]]) -> None:
        answer = _upserted(f"e{ordinal}", name, "p", "alice")
        made = call("upsert", ALICE, "POST", LIST, {"name": name}, status=201, answer=answer, event_id=event_id)
        done(Done(made, ALICE, [*before, _created(f"e{ordinal}", ordinal, name)]))

    alices("a", 1, 3, *_space("alice", "p"))  # c1
    alices("b", 2, 4)  # c2
    alices("c", 3, 5)  # c3
    patch = {"description": "new"}
    answer = {**_shown("e1", "a", "c1", "c4", "new"), "metadata": None}
    call("patch", ALICE, "PATCH", f"{LIST}/a", patch, answer=answer, event_id=6)
    done(Done("c4", ALICE, [_revised("e1", "a", "p", description="new")]))
    refused = {"code": "not_found"}
    call("patch", ALICE, "PATCH", f"{LIST}/nobody", patch, status=404, answer=refused, event_id=6)
    done(Noted("c5", "not_found"))


def _write_as_bob(story: Story) -> None:
    call, done = story.call, story.entries.append
    bobs = LIST.replace("alice", "bob")
    answer = _upserted("f1", "a", "q", "bob")
    call("upsert", BOB, "POST", bobs, {"name": "a"}, status=201, answer=answer, event_id=3, key="k")
    new = _created("f1", 1, "a")
    done(Done("c6", BOB, [*_space("bob", "q"), (new[0], {**new[1], "project_id": "q"})], key="k"))
    call(
        "upsert", BOB, "POST", bobs, {"name": "a"}, status=201, answer=answer, event_id=3, key="k", replayed=True
    )  # fmt: skip
    done(Noted("c7", "replayed"))
    answer = {**_shown("f1", "a", "c6", "c8", "two"), "metadata": None}
    call("patch", BOB, "PATCH", f"{bobs}/a", {"description": "two"}, answer=answer, event_id=4)
    done(Done("c8", BOB, [_revised("f1", "a", "q", description="two")]))
    call("patch", BOB, "PATCH", f"{bobs}/a", {"description": "three"}, status=None)
    done(Done("c9", BOB, [_revised("f1", "a", "q", description="three")]))


def _record_for_acme(story: Story) -> None:
    call, done = story.call, story.entries.append
    items = [{"content": "one", "idempotency_key": "i"}, {"content": None}, {"content": "two"}]
    error = {"index": 1, "code": "validation_error", "message": "Field 'content' is required"}
    answer = {"count": 2, "event_ids": [1, 2], "errors": [error], "episode_ids": ["ep_1", "ep_2"]}
    batch = {"tenant_id": "acme", "episodes": items}
    call("record", ACME, "POST", "/v1/episodes", batch, status=201, answer=answer, event_id=2)
    done(Done("c10", ACME, [_item("ep_1", "one", "c10", "i"), _item("ep_2", "two", "c10")]))
    answer = {"count": 1, "event_ids": [1], "errors": [], "episode_ids": ["ep_1"]}
    again = {"tenant_id": "acme", "episodes": items[:1]}
    call("record", ACME, "POST", "/v1/episodes", again, status=201, answer=answer, event_id=2)
    done(Noted("c11", "unchanged"))
    call("record", ACME, "POST", "/v1/episodes", {"tenant_id": "acme", "episodes": items[2:] * 2}, status=None)
    done(Done("c12", ACME, [_item("ep_3", "two", "c12"), _item("ep_4", "two", "c12")]))


def _read(story: Story) -> None:
    call = story.call
    listed = [
        _shown("e1", "a", "c1", "c4", "new"),
        _shown("e2", "b", "c2", "c2"),
        _shown("e3", "c", "c3", "c3"),
    ]
    whole = {"metadata": None, "projectId": "p"}
    call("get", ALICE, "GET", f"{LIST}/a", answer={**listed[0], **whole}, event_id=6, connection="x")
    call("get", ALICE, "GET", f"{LIST}/b", answer={**listed[1], **whole}, event_id=6, connection="x")
    call("get", ALICE, "GET", f"{LIST}/b", answer={**listed[1], **whole}, event_id=6, min_event_id=6)
    call("list", ALICE, "GET", f"{LIST}?page=1&pageSize=2", answer=_page(1, 3, *listed[:2]), event_id=6)
    call("list", ALICE, "GET", f"{LIST}?page=2&pageSize=2", answer=_page(2, 3, *listed[2:]), event_id=6)
    item = {"id": "ep_1", "event_id": 1, "type": "message", "content": "one", "source": None, "author": None}
    at = instant(_at("c10"))
    item |= {"timestamp": at, "metadata": {}, "entities": [], "status": "active", "created_at": at}
    call("get_item", ACME, "GET", "/v1/episodes/ep_1?tenant_id=acme", answer=item, event_id=2)


def entry(story: Story, command: str) -> Done:
    return next(entry for entry in story.entries if isinstance(entry, Done) and entry.command == command)


def again(story: Story, command: str) -> None:
    done = entry(story, command)
    story.entries.insert(story.entries.index(done) + 1, copy.deepcopy(done))


def tell(operation: Operation, *, event_id: int | None = None, **changes: Any) -> None:
    """Alter an answer."""
    if event_id is not None:
        operation.answer_headers = {**operation.answer_headers, "x-event-id": str(event_id)}
    operation.answer = Raw(json.dumps({**operation.answered, **changes}).encode())


def refuse(operation: Operation, status: int, code: str) -> None:
    operation.status, operation.outcome, operation.answer = status, "refused", Raw(json.dumps({"code": code}).encode())


def _second_effect(story: Story) -> None:
    story.calls["c9"].headers["idempotency-key"] = entry(story, "c9").key = "k"


def _twice_and_the_last(story: Story) -> None:
    """What came after a doubled write would have other ids than its caller was told; so nobody is told any."""
    story.entries.remove(entry(story, "c9"))
    del story.calls["c9"]
    again(story, "c8")


def _item_key_again(story: Story) -> None:
    story.strangers.add("c12")
    entry(story, "c12").events[0][1].update(idempotency_key="i")


def _same_id(story: Story) -> None:
    story.strangers.add("c12")
    entry(story, "c12").events[1][1].update(id="ep_3")


def _wrong_document(models: Models) -> None:
    [generation] = models.generations
    generation.collections["project_episodes"][0]["status"] = "failed"  # type: ignore[index]  # ours to spoil


def _behind(models: Models) -> None:
    [generation] = models.generations
    generation.collections["checkpoints"] = []
    for name in generation.collections:
        generation.collections[name] = []


def _late(operation: Operation) -> None:
    operation.began, operation.ended = 500.0, 501.0


def _early(operation: Operation) -> None:
    operation.began, operation.ended, operation.connection = 35.0, 35.5, ""


def _repeat_page(story: Story) -> None:
    tell(story.calls["c17"], episodes=story.calls["c16"].answered["episodes"][:1])


def _older_item(story: Story) -> None:
    first, second = story.calls["c16"].answered["episodes"]
    older = {**first, "description": None, "updatedAt": instant(_at("c1"))}
    tell(story.calls["c16"], episodes=[older, second])


ALTERATIONS: dict[str, tuple[str, Callable[[Story], Any]]] = {
    "an acknowledged command has no record in the log": (
        "lost",
        lambda story: story.entries.remove(entry(story, "c12")),
    ),
    "an acknowledged write was never sent": (
        "lost",
        lambda story: story.calls.update(
            extra=msgspec.structs.replace(story.calls["c8"], number=99, headers={}, method="PATCH")
        ),
    ),
    "an acknowledged write twice": ("applied_twice", _twice_and_the_last),
    "an unknown outcome twice": ("unknown_twice", lambda story: again(story, "c9")),
    "an event_id twice": ("id_repeated", lambda story: setattr(entry(story, "c9"), "first_event_id", 4)),
    "the id of an episode twice": ("id_repeated", _same_id),
    "an event_id left out": ("gap", lambda story: setattr(entry(story, "c9"), "first_event_id", 7)),
    "an answer with an id of nothing": ("id_never_given", lambda story: tell(story.calls["c8"], event_id=99)),
    "a batch's answer with an id of nothing": (
        "id_never_given",
        lambda story: tell(story.calls["c11"], event_ids=[77]),
    ),
    "a refused write with events": ("refused_effect", lambda story: refuse(story.calls["c9"], 503, "unavailable")),
    "two effects under one key": ("key_two_effects", _second_effect),
    "an item's key recorded twice": ("key_two_effects", _item_key_again),
    "half of a batch": ("half_batch", lambda story: entry(story, "c12").events.pop()),
    "a read in the midst of a batch": ("half_batch", lambda story: tell(story.calls["c18"], event_id=1)),
    "a write before one that was answered earlier": ("out_of_order", lambda story: _late(story.calls["c6"])),
    "an answer that the state does not explain": ("unexplained", lambda story: refuse(story.calls["c5"], 410, "gone")),
    "an answer with another body": ("unexplained", lambda story: tell(story.calls["c4"], description="old")),
    "an event that the request does not explain": (
        "unexplained",
        lambda story: entry(story, "c9").events[0][1]["changes"].update(status="failed"),
    ),
    "an error of the service": ("unexplained", lambda story: setattr(story.calls["c9"], "status", 500)),
    "a read behind one through the same gateway": ("read_back", lambda story: tell(story.calls["c14"], event_id=5)),
    "a read behind its X-Min-Event-Id": ("read_missed", lambda story: tell(story.calls["c15"], event_id=5)),
    "a read of what was never written": (
        "read_unwritten",
        lambda story: tell(story.calls["c13"], description="never"),
    ),
    "a read of what is written later": ("read_unwritten", lambda story: _early(story.calls["c13"])),
    "a page that repeats": ("page", _repeat_page),
    "a page that skips": ("page", lambda story: tell(story.calls["c17"], episodes=[])),
    "a page that miscounts": ("page", lambda story: tell(story.calls["c16"], total=4)),
    "an older state than X-Event-Id says": (
        "generations_mixed",
        lambda story: tell(story.calls["c13"], description=None, updatedAt=instant(_at("c1"))),
    ),
    "a list with an older item than X-Event-Id says": ("generations_mixed", _older_item),
    "a document that does not follow from the log": (
        "models_differ",
        lambda story: setattr(story, "spoil", _wrong_document),
    ),
    "read models behind the log": ("models_differ", lambda story: setattr(story, "spoil", _behind)),
}


def test_nothing_is_found_in_a_clean_history(story: Story) -> None:
    assert story.findings() == set()


@pytest.mark.parametrize("what", ALTERATIONS)
def test_exactly_that_is_found(story: Story, what: str) -> None:
    kind, alter = ALTERATIONS[what]
    alter(story)
    assert story.findings() == {kind}


@pytest.mark.parametrize(("shift", "kind"), [(1, "gap"), (-2, "id_repeated")])
def test_a_position_that_is_not_the_next_one_is_found_and_what_stands_there_is_lost(
    story: Story, shift: int, kind: str
) -> None:
    last = entry(story, "c12")
    last.first_position = len(_log(story).events[0]) - len(last.events) + shift
    assert story.findings() == {kind, "lost"}


def test_every_kind_of_finding_is_shown_here() -> None:
    assert {kind for kind, _ in ALTERATIONS.values()} == set(KINDS)


def test_a_history_is_read_as_it_was_written(story: Story, tmp_path: Path) -> None:
    history = History(tmp_path / "history.ndjson")
    for operation in story.calls.values():
        history.append(operation)
    history.close()
    with (tmp_path / "history.ndjson").open("ab") as file:
        file.write(b'{"number": 1, "cli')
    assert History.read(tmp_path / "history.ndjson") == [*story.calls.values()]
