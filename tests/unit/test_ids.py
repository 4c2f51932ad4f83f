"""`shared.ids`: what identifiers are made of."""

import re
import time

import pytest

from shared.ids import CommandId, derived_id, episode_id, new_command_id


def test_what_is_made_later_has_the_greater_id() -> None:
    earlier = CommandId("01980e5a-7c00-7000-8000-0000000000ff")
    later = CommandId("01980e5a-8000-7000-8000-000000000000")  # 1,024 ms after it
    assert max(derived_id(earlier, index) for index in range(100)) < min(
        derived_id(later, index) for index in range(100)
    )


def test_an_id_begins_with_the_second_of_its_command() -> None:
    before = int(time.time())
    second = int(episode_id(new_command_id(), 0)[3:11], 16)
    assert before <= second <= time.time()


@pytest.mark.parametrize("command_id", ["01980e5a-7c00-7000-8000-000000000001", "c1", "", "ü" * 36, "-" * 36])
def test_the_same_command_always_makes_the_same_ids_and_all_of_one_form(command_id: str) -> None:
    made = [derived_id(CommandId(command_id), index) for index in range(1_000)]
    assert made == [derived_id(CommandId(command_id), index) for index in range(1_000)]
    assert len(set(made)) == 1_000
    assert all(re.fullmatch("[0-9a-f]{24}", each) for each in made)


def test_commands_of_one_moment_make_different_ids() -> None:
    ids = {episode_id(CommandId(f"01980e5a-7c00-7000-8000-{number:012d}"), 0) for number in range(1_000)}
    assert len(ids) == 1_000
