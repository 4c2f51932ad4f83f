"""One partition's work, kept going: what is tried again, what stands still, and that an end is never overlooked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shared.errors import Fenced, PoisonRecord, RecordsLost, Unavailable
from shared.probes import Status
from shared.settings import KafkaSettings
from shared.supervisor import backoff, end_task, gravest, keep_running, supervise


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds
            await asyncio.sleep(0)


@pytest.mark.parametrize("error", [Unavailable("away"), Fenced("another writer")])
async def test_interrupted_work_is_begun_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.supervisor.backoff", lambda *_, **__: 0.0)
    status, runs = Status(), 0

    async def work(_: int) -> None:
        nonlocal runs
        runs += 1
        raise error

    task = asyncio.create_task(keep_running(0, work, status))
    await until(lambda: runs > 2)
    await end_task(task)
    assert task.cancelled()


@pytest.mark.parametrize("error", [PoisonRecord("junk"), RecordsLost("gone")])
async def test_work_that_cannot_go_on_stands_still_and_says_why(error: Exception) -> None:
    status, runs = Status(), 0

    async def work(_: int) -> None:
        nonlocal runs
        runs += 1
        raise error

    task = asyncio.create_task(keep_running(0, work, status))
    await until(lambda: status.partitions.get(0) == f"stopped: {error}")
    assert not status.ready
    await end_task(task)
    assert runs == 1


@pytest.mark.parametrize("error", [Fenced("another writer"), PoisonRecord("junk")])
async def test_work_that_ends_with_an_error_while_being_cancelled_ends(error: Exception) -> None:
    begun = asyncio.Event()

    async def work(_: int) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise error from None

    task = asyncio.create_task(keep_running(0, work, Status()))
    await begun.wait()
    async with asyncio.timeout(5):
        await end_task(task)
    assert task.cancelled()


async def test_a_cancellation_that_nobody_asked_for_is_a_bug_and_not_an_end() -> None:
    async def work(_: int) -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="by nobody here"):
        await keep_running(0, work, Status())


async def test_a_task_that_overhears_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.supervisor._END_SECONDS", 0.01)
    heard = 0

    async def stubborn() -> None:
        nonlocal heard
        while heard < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                heard += 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end_task(task)
    assert heard == 2


def test_a_bug_is_graver_than_what_goes_wrong_now_and_then() -> None:
    bug = ZeroDivisionError()
    assert gravest(ExceptionGroup("", [Unavailable("away"), ExceptionGroup("", [Fenced("late"), bug])])) is bug
    fenced = Fenced("late")
    assert gravest(ExceptionGroup("", [fenced])) is fenced


def test_waits_double_up_to_a_bound() -> None:
    assert 0.05 <= backoff(1) <= 0.1
    assert 0.2 <= backoff(3) <= 0.4
    assert 1.0 <= backoff(1_000) <= 2.0


class Rebalancing:
    """A member of a group whose rebalance never ends."""

    async def getmany(self, *, timeout_ms: int) -> None:
        await asyncio.Event().wait()


async def test_a_rebalance_without_an_end_is_told_and_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = 0

    @asynccontextmanager
    async def open_membership(*_: object) -> AsyncIterator[Rebalancing]:
        nonlocal opened
        opened += 1
        yield Rebalancing()

    async def never(_: int) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("shared.supervisor.open_membership", open_membership)
    monkeypatch.setattr("shared.supervisor._LONGEST_REBALANCE_SECONDS", 0.0)
    monkeypatch.setattr("shared.supervisor.backoff", lambda *_, **__: 0.0)
    status = Status()
    task = asyncio.create_task(
        supervise(KafkaSettings(), topic="t", group="g", instance_id="i", status=status, run_partition=never)
    )
    await until(lambda: opened > 2)
    assert "being a member of g" in status.waiting_for["kafka"]
    await end_task(task)
