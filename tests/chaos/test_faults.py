"""The schedule of faults and the harm it does to files, without servers."""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from tests.chaos.canary import Canary, NoService
from tests.chaos.faults import KINDS, Fault, Kind, Pace, Schedule, cut_files, delete_files, swap_files
from tests.chaos.stack import MIB, ChaosStack, SmallDisk

AT_ONCE = Pace(outage=(0, 0), freeze=(0, 0), rest=(0, 0))
NO_STACK = cast(ChaosStack, None)


class FakeCanary(Canary):
    """Finds the service serving, or not."""

    def __init__(self, *, serves: bool = True) -> None:
        self.serves = serves

    async def wait_service(self, since: float, *, within: float = 90) -> float:
        if not self.serves:
            raise NoService("nobody home")
        return 1.5


class Journal:
    """Kinds of faults that do nothing but note what they do."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.active: list[str] = []
        self.together = 0

    def kind(self, name: str, uses: str) -> Kind:
        async def inject() -> None:
            assert uses not in self.active
            self.active.append(uses)
            self.together = max(self.together, len(self.active))
            self.lines.append(f"{name} begins")
            await asyncio.sleep(0)

        async def heal() -> None:
            self.active.remove(uses)
            self.lines.append(f"{name} ends")

        def make(stack: ChaosStack, draw: random.Random, pace: Pace) -> Fault:
            return Fault(name, f"number {draw.randrange(1000)}", frozenset({uses}), 0, inject, heal)

        return Kind(name, make, lambda _: None)


def schedule(kinds: Sequence[Kind], *, seed: int = 1, serves: bool = True) -> Schedule:
    canary = FakeCanary(serves=serves)
    return Schedule(NO_STACK, canary, seed=seed, kinds=kinds, pace=AT_ONCE, say=lambda _: None)


async def test_every_kind_is_injected_and_healed_once() -> None:
    journal = Journal()
    made = schedule([journal.kind(f"k{number}", f"thing {number}") for number in range(20)])
    await made.run_once_each()
    expected = [f"k{number} {what}" for number in range(20) for what in ("begins", "ends")]
    assert sorted(journal.lines) == sorted(expected)
    assert journal.together == 2, "some at once"
    assert {record.kind for record in made.records if not record.alone}
    assert all(record.from_fault == record.from_heal == 1.5 for record in made.records)
    assert made.problems == []


async def test_two_that_touch_the_same_are_never_at_once() -> None:
    journal = Journal()
    await schedule([journal.kind(f"k{number}", "the only thing") for number in range(20)]).run_once_each()
    assert journal.together == 1


async def test_a_seed_makes_the_same_faults_again() -> None:
    async def drawn(seed: int) -> list[tuple[str, str, bool]]:
        made = schedule([Journal().kind(f"k{number}", f"thing {number}") for number in range(20)], seed=seed)
        await made.run_once_each()
        return [(record.kind, record.where, record.alone) for record in made.records]

    assert await drawn(1) == await drawn(1)
    assert await drawn(1) != await drawn(2)


async def test_a_service_that_stays_away_is_a_problem_and_names_the_fault() -> None:
    made = schedule([Journal().kind("k", "thing")], serves=False)
    await made.run_once_each()
    [problem] = made.problems
    assert problem.startswith("after k of number")
    [record] = made.records
    assert record.from_fault is record.from_heal is None


def test_all_kinds_of_the_plan_are_there() -> None:
    for service in ("gateway", "ingestor", "projector"):
        assert {f"{what}-{service}" for what in ("kill", "term", "stop", "clock")} <= KINDS.keys()
    for server in ("kafka", "mongodb"):
        assert {f"{what}-{server}" for what in ("kill", "term", "stop")} <= KINDS.keys()
    for end in ("gateway", "kafka", "mongodb"):
        toxics = ("delay", "cut", "half-open", "late", "drip", "reset")
        assert {f"{what}-{end}" for what in toxics} <= KINDS.keys()
    disks = {"full-disk-state", "full-disk-logs", "full-disk-kafka"}
    states = {"state-deleted", "state-cut", "state-swapped", "state-old"}
    operators = {"rebuild", "scale-gateway", "scale-ingestor", "rolling-restart"}
    of_three = {"step-down", "roll-back", "move-leaders"}
    assert disks | states | operators | of_three <= KINDS.keys()


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """The state of two ingestors, with two partitions each."""
    for ingestor, partitions in (("ingestor-1", (0, 2)), ("ingestor-2", (1, 3))):
        for partition in partitions:
            place = tmp_path / ingestor / f"partition-{partition}"
            place.mkdir(parents=True)
            (place / "data.mdb").write_bytes(bytes([partition]) * 40_000)
            (place / "stamp").write_text("2 boot")
    return tmp_path


def data_of(states: Path, *partitions: int) -> list[bytes | None]:
    files = [next(states.glob(f"*/partition-{partition}")) / "data.mdb" for partition in partitions]
    return [file.read_bytes() if file.exists() else None for file in files]


@pytest.mark.parametrize("harm", [cut_files, delete_files, swap_files])
def test_harm_comes_to_every_partition_of_one_ingestor_only(
    states: Path, harm: Callable[[Path, random.Random], None]
) -> None:
    before = {file: file.read_bytes() for file in states.rglob("*") if file.is_file()}
    harm(states / "ingestor-1", random.Random(1))  # noqa: S311 - no secret
    after = {file: file.read_bytes() for file in states.rglob("*") if file.is_file()}
    changed = {file for file in before if after.get(file) != before[file]}
    assert {file.parent.name for file in changed} == {"partition-0", "partition-2"}
    assert {file.parent.parent.name for file in changed} == {"ingestor-1"}


def test_swapped_state_is_whole_and_of_another_partition(states: Path) -> None:
    whole = data_of(states, 0, 1, 2, 3)
    swap_files(states / "ingestor-1", random.Random(1))  # noqa: S311 - no secret
    for before, after in zip(data_of(states, 1, 3), whole[1::2], strict=True):
        assert before == after
    for partition in (0, 2):
        [now] = data_of(states, partition)
        assert now in [content for index, content in enumerate(whole) if index != partition]


def test_a_full_disk_takes_nothing_until_it_is_freed(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "small", 2 * MIB)
    disk.mount()
    if not disk.mounted:
        pytest.skip("this user may not mount a file system")
    try:
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "file").write_bytes(b"x")
        disk.free()
        (disk.folder / "file").write_bytes(b"x")
    finally:
        disk.unmount()
