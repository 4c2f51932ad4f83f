"""The checker of the resilience tests can fail: every fault that it is there to find is found in a made-up log."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.e2e.ledger import (
    Acknowledged,
    Documents,
    Fact,
    Record,
    check_answers,
    check_documents,
    read_log,
)

STREAM = "tenant:acme"
ANSWERS = (
    Acknowledged(STREAM, "key-1", 2, (Fact(1, "TenantEpisodeRecorded", "ep_1", "one"),)),
    Acknowledged(STREAM, "key-2", 3, (Fact(3, "TenantEpisodeRecorded", "ep_3", "three"),)),
)


def cloud_event(kind: str, **attributes: Any) -> Mapping[str, Any]:
    return {"type": f"episodes.{kind}.v1", "time": "2026-03-15T09:00:00Z", **attributes}


def fence(owner: str = "ingestor") -> Mapping[str, Any]:
    return cloud_event("WriterFenced", data={"owner": owner, "nonce": "n"})


def event(
    number: int, text: str, *, writer: int = 0, position: int | None = None, command: int = 1, done: bool = True
) -> Mapping[str, Any]:
    """Return the recording of an episode with event_id `number`; `done` if it is its command's last."""
    last = {"completes": "RecordEpisodes", "idempotencykey": f"key-{command}"} if done else {}
    return cloud_event(
        "TenantEpisodeRecorded",
        streamid=STREAM,
        eventid=number,
        position=number if position is None else position,
        writer=writer,
        commandid=f"command-{command}",
        commandoffset=command,
        data={"id": f"ep_{number}", "type": "message", "content": text},
        **last,
    )


def note(position: int, command: int, *, writer: int = 0) -> Mapping[str, Any]:
    data = {"command_offset": command, "refusals": []}
    return cloud_event("CommandsRefused", position=position, writer=writer, commandoffset=command, data=data)


def records(*cloud_events: Mapping[str, Any], first: int = 0) -> list[Record]:
    return [Record(offset, json.dumps(each).encode()) for offset, each in enumerate(cloud_events, first)]


GOOD = (
    fence(),
    event(1, "one", done=False),
    event(2, "two"),
    event(3, "three", command=2),
)


def faults(*cloud_events: Mapping[str, Any]) -> list[str]:
    log = read_log({0: records(*cloud_events)})
    return [*log.violations, *check_answers(log, ANSWERS)]


def documents(*numbers: int, position: int = 3, **changes: Any) -> Documents:
    texts = {1: "one", 2: "two", 3: "three", 4: "four"}
    none = dict.fromkeys(("namespace", "source", "author", "channel"))
    return {
        **{name: [] for name in ("namespaces", "projects", "folders", "project_episodes", "entities")},
        "tenant_episodes": [
            {
                "_id": f"ep_{number}",
                "tenant_id": "acme",
                "event_id": number,
                "type": "message",
                "content": texts[number],
                **none,
                **changes,
            }
            for number in numbers
        ],
        "streams": [{"_id": STREAM, "event_id": max(numbers)}],
        "checkpoints": [{"_id": 0, "position": position}],
    }


# ---- the log and the answers -----------------------------------------------------------------------------------------


def test_a_good_log_has_no_faults() -> None:
    assert faults(*GOOD) == []
    assert faults(*GOOD, note(4, 3), fence(), event(4, "four", writer=5, position=5, command=4)) == []


def test_a_lost_write_is_found() -> None:
    assert faults(*GOOD[:3]) == ["lost: tenant:acme, key key-2: acknowledged, but not in the log"]


def test_an_answer_with_another_id_is_found() -> None:
    found = faults(*GOOD[:3], event(3, "other", command=2))
    assert any("key-2: the answer said" in fault for fault in found), found
    renumbered = Acknowledged(STREAM, "key-1", 1, ())
    assert check_answers(read_log({0: records(*GOOD)}), [renumbered]) == [
        "tenant:acme, key key-1: the answer ended with event_id 1, the log 2"
    ]


def test_a_duplicate_event_id_is_found() -> None:
    assert "tenant:acme: a repeat: event_id 3 where 4 was next" in faults(
        *GOOD, event(3, "three again", position=4, command=3)
    )


def test_a_gap_of_event_ids_is_found() -> None:
    assert "tenant:acme: a gap: event_id 5 where 4 was next" in faults(*GOOD, event(5, "five", position=4, command=3))


def test_a_gap_of_positions_is_found() -> None:
    assert "episodes.events/0 at offset 4: a gap: position 5 after 3" in faults(
        *GOOD, event(4, "four", position=5, command=3)
    )


@pytest.mark.parametrize(
    "after", [(), (fence(),), (event(3, "three", command=2),), (note(3, 2),)], ids=["end", "fence", "command", "note"]
)
def test_half_a_command_is_found(after: tuple[Mapping[str, Any], ...]) -> None:
    found = faults(fence(), event(1, "one", done=False), event(2, "two", done=False), *after)
    assert any("half a command: command-1 breaks off" in fault for fault in found), found


def test_a_command_applied_twice_is_found() -> None:
    again = (event(4, "one", command=1), note(5, 1))
    found = faults(*GOOD, *again)
    assert "applied 2 times: ('command', 'command-1')" in found
    assert "applied 2 times: ('tenant:acme', 'Idempotency-Key', 'key-1')" in found
    assert "tenant:acme, key key-1: 'one' was made 2 times" in found
    assert "episodes.events/0 at offset 4: command 1 was judged after 2" in found
    assert "episodes.events/0 at offset 5: command 1 was judged after 1" in found


def test_an_id_given_twice_is_found() -> None:
    twice = {**event(4, "four", command=3), "data": {"id": "ep_1", "type": "message", "content": "four"}}
    assert "applied 2 times: ('id', 'ep_1')" in faults(*GOOD, twice)


def test_an_item_key_applied_twice_is_found() -> None:
    keyed = {"type": "message", "content": "four", "idempotency_key": "item"}
    found = faults(
        *GOOD,
        {**event(4, "four", command=3, done=False), "data": {"id": "ep_4", **keyed}},
        {**event(5, "five", command=3), "data": {"id": "ep_5", **keyed}},
    )
    assert found == ["applied 2 times: ('tenant:acme', 'item key', 'item')"]


def test_time_that_runs_backwards_is_found() -> None:
    earlier = {**event(4, "four", command=3), "time": "2026-03-15T08:59:59.999Z"}
    assert faults(*GOOD, earlier) == ["tenant:acme: event_id 4 is older than the one before it"]


def test_a_stream_in_two_partitions_is_found() -> None:
    log = read_log({0: records(*GOOD), 1: records(fence(), event(4, "four", position=1, command=1))})
    assert "tenant:acme: in partitions 0 and 1" in log.violations


def test_an_answer_by_a_fenced_writer_is_found() -> None:
    zombie = event(3, "three", command=2)
    assert faults(*GOOD[:3], fence(), zombie) == ["lost: tenant:acme, key key-2: acknowledged, but not in the log"]


def test_what_a_fenced_writer_left_did_not_happen() -> None:
    log = read_log({0: records(*GOOD, fence(), event(4, "zombie", command=3), event(4, "four", writer=4, command=3))})
    assert (log.violations, log.dropped, log.positions) == ([], 1, {0: 4})
    assert [each.text for each in log.events] == ["one", "two", "three", "four"]


def change(number: int, kind: str, **data: Any) -> Mapping[str, Any]:
    """Return an event of a project, as a command of its own."""
    place = {"type": f"episodes.{kind}.v1", "streamid": "namespace:a", "data": data}
    return {**event(number, "", command=number), **place}


@pytest.mark.parametrize(
    ("again", "fault"),
    [
        (change(4, "ProjectCreated", id="q", slug="robotics"), "a name again: ProjectCreated ('robotics',)"),
        (change(4, "FolderCreated", id="g", project_id="p", path="/a"), "a name again: folder ('p', '/a')"),
        (
            change(4, "ProjectEpisodeCreated", id="e2", project_id="p", name="run", ordinal=2),
            "a name again: episode ('p', 'run')",
        ),
        (change(4, "ProjectEpisodeCreated", id="e2", project_id="p", name="other", ordinal=1), "has ordinal 1"),
    ],
)
def test_a_decision_by_a_writer_who_had_forgotten_is_found(again: Mapping[str, Any], fault: str) -> None:
    before = (
        change(1, "ProjectCreated", id="p", slug="robotics"),
        change(2, "FolderCreated", id="f", project_id="p", path="/a"),
        change(3, "ProjectEpisodeCreated", id="e", project_id="p", name="run", ordinal=1),
    )
    renamed = (
        change(4, "ProjectEpisodeRevised", id="e", project_id="p", name="run", changes={"name": "other"}),
        change(5, "ProjectEpisodeCreated", id="h", project_id="p", name="run", ordinal=2),
    )
    assert read_log({0: records(fence(), *before, *renamed)}).violations == []
    (violation,) = read_log({0: records(fence(), *before, again)}).violations
    assert fault in violation


# ---- the documents ---------------------------------------------------------------------------------------------------


def test_good_documents_have_no_faults() -> None:
    assert check_documents(read_log({0: records(*GOOD)}), documents(1, 2, 3)) == []


def test_a_document_that_is_missing_is_found() -> None:
    assert check_documents(read_log({0: records(*GOOD)}), documents(1, 3)) == ["tenant_episodes: lost: ep_2"]


def test_a_document_that_a_fenced_writer_left_is_found() -> None:
    log = read_log({0: records(*GOOD, fence(), event(4, "four", command=3))})
    assert set(check_documents(log, documents(1, 2, 3, 4, position=4))) == {
        "tenant_episodes: not in the log: ep_4",
        "streams tenant:acme: event_id is 4, should be 3",
        "checkpoints 0: position is 4, should be 3",
    }


def test_a_document_that_differs_is_found() -> None:
    (fault,) = check_documents(read_log({0: records(fence(), event(1, "one"))}), documents(1, position=1, content="no"))
    assert fault == "tenant_episodes ep_1: content is 'no', should be 'one'"


def test_a_wrong_counter_is_found() -> None:
    project = {"namespace": "a", "slug": "robotics", "name": "robotics"}
    episode: dict[str, Any] = {"project_id": "p", "description": None, "tags": [], "folder": None}
    first, second = {**episode, "name": "run", "ordinal": 1}, {**episode, "name": "other", "ordinal": 2}
    log = read_log(
        {
            0: records(
                fence(),
                change(1, "ProjectCreated", id="p", slug="robotics", name="robotics"),
                change(2, "ProjectEpisodeCreated", id="e", **first),
                change(3, "ProjectEpisodeCreated", id="f", **second),
                change(4, "ProjectEpisodeDeleted", id="f"),
            )
        }
    )
    assert log.violations == []
    stored = {**documents(1, position=4), "tenant_episodes": [], "streams": [{"_id": "namespace:a", "event_id": 4}]}
    stored["project_episodes"] = [
        {"_id": "e", "namespace": "a", **first, "deleted": False, "event_id": 2},
        {"_id": "f", "namespace": "a", **second, "deleted": True, "event_id": 4},
    ]
    assert check_documents(log, {**stored, "projects": [{"_id": "p", **project, "total": 1, "blocks": [1]}]}) == []
    assert check_documents(log, {**stored, "projects": [{"_id": "p", **project, "total": 2, "blocks": [2]}]}) == [
        "projects p: total is 2, should be 1",
        "projects p: blocks is [2], should be [1]",
    ]
