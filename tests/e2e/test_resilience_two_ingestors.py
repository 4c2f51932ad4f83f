"""Two ingestors that both believe they own a partition: the log decides whose writes happened."""

import asyncio
import functools
from collections.abc import Iterator

import pytest

from local.process import ManagedProcess
from tests.cluster import RUNNING, Cluster, throw_away_cluster
from tests.e2e.load import Load, assert_accounts_agree, eventually, running_load

TAKEOVER_SECONDS = 45
"""The group gives a silent member's partitions away after its session of 10 s."""


@pytest.fixture(scope="module")
def breakable() -> Iterator[Cluster]:
    with throw_away_cluster() as running:
        yield running


@pytest.fixture
def second(breakable: Cluster) -> Iterator[ManagedProcess]:
    """Return another ingestor, not started."""
    with_state_of_its_own = breakable.add_process("ingestor", "ingestor-2")
    yield with_state_of_its_own
    forget(breakable, with_state_of_its_own)


@pytest.fixture
def twin(breakable: Cluster) -> Iterator[ManagedProcess]:
    """Return another ingestor, not started, that takes itself for the first: same instance id, same state folder."""
    first = breakable.processes["ingestor"].env
    same = {key: first[key] for key in ("INGESTOR_INSTANCE_ID", "INGESTOR_STATE_DIR")}
    twin = breakable.add_process("ingestor", "ingestor-twin", same)
    yield twin
    forget(breakable, twin)


async def test_a_frozen_ingestor_that_wakes_up_harms_nobody(breakable: Cluster, second: ManagedProcess) -> None:
    first = breakable.processes["ingestor"]
    async with running_load(breakable) as load:
        await freeze_and_replace(first, second, load)
        first.resume()
        await load.progress(10)
        for ingestor in (first, second):
            await eventually(functools.partial(is_ready, ingestor), what=f"{ingestor.name} is ready again")
        await load.progress(10)
    log = await assert_accounts_agree(breakable, load.acknowledged)
    assert {"ingestor", "ingestor-2"} <= set(log.owners)
    assert log.dropped > 0, "the frozen one was to write when it woke up, or this test shows nothing"


async def test_a_frozen_ingestor_and_its_twin_harm_nobody(breakable: Cluster, twin: ManagedProcess) -> None:
    first = breakable.processes["ingestor"]
    async with running_load(breakable) as load:
        await freeze_and_replace(first, twin, load)
        first.resume()
        await load.progress(10)
        # While both run they take the membership from each other. One of them alone is well, and so is what it stored.
        first.kill()
        await load.progress(10)
        await eventually(functools.partial(is_ready, twin), what="the twin is ready")
        twin.kill()
        first.start()
        await load.progress(5)
    await assert_accounts_agree(breakable, load.acknowledged)


async def freeze_and_replace(first: ManagedProcess, second: ManagedProcess, load: Load) -> None:
    """Freeze the first under load; return when writes succeed everywhere through the second."""
    first.pause()
    second.start()
    await load.progress(5, within=TAKEOVER_SECONDS)


async def is_ready(process: ManagedProcess) -> bool:
    return await asyncio.to_thread(process.missing) is None


def forget(breakable: Cluster, process: ManagedProcess) -> None:
    """Stop it, and see to it that the first ingestor is alone and ready for the next test."""
    process.kill()
    RUNNING.remove(breakable.processes.pop(process.name))
    first = breakable.processes["ingestor"]
    first.kill()
    first.start()
    first.wait_ready()
