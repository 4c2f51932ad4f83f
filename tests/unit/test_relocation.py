"""A record at another place in another log is the same record: nothing that a version wrote is rewritten."""

from pathlib import Path

import msgspec
import pytest

from shared.codec import decode_record, relocate_event
from shared.errors import Fenced
from shared.events import LoggedEvent
from shared.ids import Position
from shared.log import check_place

SAMPLES = sorted((Path(__file__).parents[1] / "samples").glob("episodes.*.json"))
PLACE = {"position": 7, "writer": 0, "commandoffset": -1}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_only_the_place_of_an_event_changes(sample: Path) -> None:
    value = msgspec.json.format(sample.read_bytes(), indent=-1)
    if not isinstance(decode_record(value), LoggedEvent):
        return
    moved = relocate_event(value, position=Position(7), writer=0, command_offset=-1)
    parts, moved_parts = (msgspec.json.decode(text, type=dict[str, msgspec.Raw]) for text in (value, moved))
    assert list(moved_parts) == list(parts), "the order too"
    assert {name: msgspec.json.decode(moved_parts[name]) for name in PLACE} == PLACE
    for name in parts.keys() - PLACE:
        assert bytes(moved_parts[name]) == bytes(parts[name])


def test_a_batch_happened_only_at_its_one_offset() -> None:
    check_place(41, Position(17), fence=40, position_at_fence=Position(17))
    check_place(44, Position(20), fence=40, position_at_fence=Position(17))
    for offset in (40, 42, 17, -1):
        with pytest.raises(Fenced, match=f"landed at offset {offset} and not at 41"):
            check_place(offset, Position(17), fence=40, position_at_fence=Position(17))
