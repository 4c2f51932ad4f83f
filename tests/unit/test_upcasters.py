"""Upcasters: chained, and blind to what they do not change."""

import msgspec
import pytest
from msgspec import Raw

from shared.upcasters import UPCASTERS, Data, current_version, upcast


def _gets_a_size(data: Data) -> Data:
    return {**data, "size": Raw(b"1")}


def _size_becomes_sizes(data: Data) -> Data:
    return {**{key: value for key, value in data.items() if key != "size"}, "sizes": Raw(b"[%b]" % data["size"])}


STEPS = (_gets_a_size, _size_becomes_sizes)


def test_each_step_goes_one_version_up() -> None:
    assert upcast(STEPS, Raw(b'{"id":"x"}')) == b'{"id":"x","sizes":[1]}'
    assert upcast(STEPS[1:], Raw(b'{"id":"x","size":7}')) == b'{"id":"x","sizes":[7]}'


def test_what_a_step_does_not_touch_stays_as_it_was_written() -> None:
    metadata = b'{"big": 18446744073709551616, "tiny":1e-400, "z":1, "a":[1.0]}'
    assert upcast(STEPS[:1], Raw(b'{"metadata":%b}' % metadata)) == b'{"metadata":%b,"size":1}' % metadata


def test_a_key_that_its_version_always_had_and_that_is_not_there_is_an_error_in_the_data() -> None:
    with pytest.raises(msgspec.ValidationError, match="missing required field 'size'"):
        upcast(STEPS[1:], Raw(b"{}"))


def test_an_event_is_at_the_version_that_its_last_step_makes() -> None:
    assert current_version("NamespaceCreated") == 1
    assert {event: current_version(event) for event in UPCASTERS} == {"FolderCreated": 2}
