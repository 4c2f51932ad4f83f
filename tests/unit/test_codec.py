"""Bytes and messages: what was written once decodes for ever, and what is not ours is poison."""

import json
import re
from pathlib import Path

import msgspec
import pytest
from msgspec import Raw

from shared import events
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
from tests.builders import batch, delete, item, patch, restore, upsert

SAMPLES = Path(__file__).parents[1] / "samples"


def the_samples() -> list[Path]:
    return sorted(SAMPLES.glob("*.json"))


def test_every_event_type_has_a_sample() -> None:
    written = {*events.Event.__args__, events.WriterFenced, events.CommandsRefused}
    assert {path.name for path in the_samples()} >= {f"episodes.{cls.__name__}.v1.json" for cls in written}


@pytest.mark.parametrize("sample", the_samples(), ids=lambda path: path.stem)
def test_a_record_written_by_an_earlier_version_decodes_for_ever(sample: Path) -> None:
    value = sample.read_bytes().strip()
    record = decode_record(value)
    assert json.loads(encode_record(record)) == json.loads(value) or isinstance(record, LoggedFence)
    assert decode_record(encode_record(record)) == record


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


def test_an_unknown_event_type_says_what_to_do() -> None:
    sample = msgspec.json.decode((SAMPLES / "episodes.NamespaceCreated.v1.json").read_bytes())
    with pytest.raises(PoisonRecord, match="upgrade the projector first"):
        decode_record(msgspec.json.encode(sample | {"type": "episodes.NamespaceSplit.v1"}))


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
    assert examples == {path.stem: json.loads(path.read_bytes()) for path in the_samples()}
