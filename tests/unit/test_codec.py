"""Bytes and messages: what was written once decodes for ever, and what is not ours is poison."""

import json
import re
from pathlib import Path

import msgspec
import pytest
from msgspec import Raw

from shared import codec, events
from shared.codec import (
    decode_command,
    decode_receipt,
    decode_record,
    encode_command,
    encode_receipt,
    encode_record,
)
from shared.commands import Command, EpisodeFields
from shared.errors import PoisonRecord
from shared.events import LoggedEvent, LoggedFence, LogRecord
from shared.ids import CommandId, EventId, StreamId
from shared.receipts import EpisodesRecorded, Receipt
from shared.upcasters import Upcaster, current_version
from tests.builders import batch, delete, item, patch, restore, upsert

SAMPLES = Path(__file__).parents[1] / "samples"


def the_samples() -> list[Path]:
    return sorted(SAMPLES.glob("*.json"))


def the_present(cls: type) -> str:
    return f"episodes.{cls.__name__}.v{current_version(cls.__name__)}"


PRESENT = {the_present(cls) for cls in (*events.Event.__args__, events.WriterFenced, events.CommandsRefused)}


def test_every_version_of_every_event_type_has_a_sample() -> None:
    ever = {re.sub(r"\d+$", str(version), name) for name in PRESENT for version in range(1, int(name[-1]) + 1)}
    assert {path.stem for path in the_samples()} == ever


@pytest.mark.parametrize("sample", the_samples(), ids=lambda path: path.stem)
def test_a_record_written_by_an_earlier_version_decodes_for_ever(sample: Path) -> None:
    value = sample.read_bytes().strip()
    record = decode_record(value)
    assert decode_record(encode_record(record)) == record
    if sample.stem in PRESENT and not isinstance(record, LoggedFence):
        assert json.loads(encode_record(record)) == json.loads(value)


def test_a_folder_without_a_name_is_called_by_the_last_segment_of_its_path() -> None:
    first, second = (SAMPLES / f"episodes.FolderCreated.v{version}.json" for version in (1, 2))
    assert decode_record(first.read_bytes()) == decode_record(second.read_bytes())


def test_a_record_of_an_old_version_goes_through_the_rest_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def adding(digit: bytes) -> Upcaster:
        return lambda data: {**data, "slug": Raw(bytes(data["slug"])[:-1] + digit + b'"')}

    monkeypatch.setattr(codec, "UPCASTERS", {"NamespaceCreated": (adding(b"2"), adding(b"3"))})
    monkeypatch.setattr(codec, "_TYPE_OF", {events.NamespaceCreated: "episodes.NamespaceCreated.v3"})
    decoders = codec._decoders()
    data = Raw(b'{"id":"n","slug":"alice"}')
    assert decoders["episodes.NamespaceCreated.v1"](data) == events.NamespaceCreated("n", "alice23")
    assert decoders["episodes.NamespaceCreated.v2"](data) == events.NamespaceCreated("n", "alice3")


@pytest.mark.parametrize("data", [b"null", b"[]", b'{"id":"f1"}', b'{"path":7}', b'{"path":"/a"}'])
def test_data_that_an_old_version_never_wrote_is_poison(data: bytes) -> None:
    sample = (SAMPLES / "episodes.FolderCreated.v1.json").read_bytes()
    broken = re.sub(rb'"data":.*}', b'"data":' + data + b"}", sample)
    with pytest.raises(PoisonRecord, match="not a record of this log"):
        decode_record(broken)


def test_a_record_is_a_cloud_event() -> None:
    record = json.loads((SAMPLES / "episodes.ProjectEpisodeCreated.v1.json").read_bytes())
    assert record["specversion"] == "1.0"
    assert record["type"] == "episodes.ProjectEpisodeCreated.v1"
    assert record["source"] == "/streams/namespace:alice"
    assert record["id"] == str(record["eventid"])
    assert record["subject"] == record["data"]["id"]


@pytest.mark.parametrize(
    "command",
    [
        upsert("run-1", EpisodeFields(description=None, folder="/a", metadata=Raw(b'{"n":1e400}'))),
        patch("run-1", EpisodeFields(tags=()), new_name="run-2"),
        delete(),
        restore(idempotency_key="k"),
        batch(item("one", idempotency_key="k"), item("\x00\N{PILE OF POO}"), namespace="engineering"),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_command_survives_its_journey(command: Command) -> None:
    assert decode_command(encode_command(command)) == command


def test_a_receipt_survives_its_journey() -> None:
    receipt = Receipt(
        command_id=CommandId("c"),
        stream=StreamId("tenant:acme"),
        event_id=EventId(3),
        outcome=EpisodesRecorded((EventId(2), EventId(3)), ("ep_2", "ep_3"), ()),
    )
    assert decode_receipt(encode_receipt(receipt)) == receipt


NOT_OURS = [None, b"", b"\xff\xfe", b"null", b"[]", b"{}", b'{"type":"Nonsense"}', b"[" * 100_000]


@pytest.mark.parametrize("value", NOT_OURS)
def test_what_is_not_ours_is_poison(value: bytes | None) -> None:
    for decode in (decode_command, decode_receipt, decode_record):
        with pytest.raises(PoisonRecord):
            decode(value)


@pytest.mark.parametrize("unknown", ["episodes.NamespaceSplit.v1", "episodes.FolderCreated.v3", "FolderCreated", ""])
def test_an_unknown_event_type_says_what_to_do(unknown: str) -> None:
    sample = msgspec.json.decode((SAMPLES / "episodes.FolderCreated.v2.json").read_bytes())
    with pytest.raises(PoisonRecord, match="upgrade the projector first"):
        decode_record(msgspec.json.encode(sample | {"type": unknown}))


@pytest.mark.parametrize(
    "attribute", ["streamid", "eventid", "position", "writer", "commandid", "commandoffset", "actor"]
)
def test_an_event_without_its_place_is_poison(attribute: str) -> None:
    sample = msgspec.json.decode((SAMPLES / "episodes.NamespaceCreated.v1.json").read_bytes())
    del sample[attribute]
    with pytest.raises(PoisonRecord, match=attribute):
        decode_record(msgspec.json.encode(sample))


def test_the_samples_cover_whole_commands() -> None:
    records: list[LogRecord] = [decode_record(path.read_bytes()) for path in the_samples()]
    assert any(isinstance(record, LoggedEvent) and record.completes for record in records)


def test_the_documented_examples_are_the_samples() -> None:
    page = (SAMPLES.parents[1] / "docs" / "events.md").read_text()
    examples = {
        example["type"]: example for example in map(json.loads, re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    }
    assert examples == {path.stem: json.loads(path.read_bytes()) for path in the_samples() if path.stem in PRESENT}
