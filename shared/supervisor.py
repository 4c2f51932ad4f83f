"""Which partitions are ours, by consumer-group membership, and one task for each of them.

Membership is about liveness only. Two owners of one partition are harmless: the log fences writers, and the
checkpoint's compare-and-set keeps projectors apart. So a rebalance stops nothing that goes on being ours.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import structlog
from aiokafka import TopicPartition
from aiokafka.abc import ConsumerRebalanceListener

from shared.errors import EpisodesError, Fenced, PoisonRecord, RecordsLost, Unavailable
from shared.kafka import SESSION_TIMEOUT_MS, open_membership, translated
from shared.probes import Status
from shared.settings import KafkaSettings

RunPartition = Callable[[int], Coroutine[Any, Any, None]]
"""Work on one partition until cancelled. Sets ``status.partitions[partition]`` to running when it is."""

_log = structlog.get_logger(__name__)

_LONGEST_REBALANCE_SECONDS = 3 * SESSION_TIMEOUT_MS / 1000
"""aiokafka waits for the end of one without a limit, and while the group's coordinator is away there is none."""
_END_SECONDS = 10.0
"""Longer than any orderly end takes."""


class _Wish(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Notes which partitions the group gave us, and no more: aiokafka sends no heartbeats while a listener runs."""

    def __init__(self) -> None:
        self.partitions: frozenset[int] | None = None
        """None until the group has given us some, or none."""

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        pass  # eager rebalances revoke everything, mostly to give it back: only the next assignment counts

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self.partitions = frozenset(tp.partition for tp in assigned)


async def supervise(
    settings: KafkaSettings, *, topic: str, group: str, instance_id: str, status: Status, run_partition: RunPartition
) -> None:
    """Keep one ``run_partition`` going for every partition of ``topic`` that the group gives us, until cancelled."""
    running: dict[int, asyncio.Task[None]] = {}
    attempt = 0
    status.waiting_for["partitions"] = f"the group {group} has not answered yet"
    async with asyncio.TaskGroup() as tasks:
        while True:
            wish = _Wish()
            try:
                async with open_membership(settings, topic, group, instance_id, wish) as member:
                    while True:
                        with translated(f"being a member of {group}"):
                            async with asyncio.timeout(_LONGEST_REBALANCE_SECONDS):
                                await member.getmany(timeout_ms=250)
                        if running_ahead := member.assignment() - member.paused():
                            member.pause(*running_ahead)
                        if wish.partitions is None:
                            continue
                        attempt = 0
                        status.waiting_for.pop("kafka", None)
                        status.waiting_for.pop("partitions", None)
                        for partition in running.keys() - wish.partitions:
                            await end_task(running.pop(partition))
                            status.partitions.pop(partition, None)
                        for partition in wish.partitions - running.keys():
                            running[partition] = tasks.create_task(keep_running(partition, run_partition, status))
            except Unavailable as error:
                status.waiting_for["kafka"] = str(error)
                _log.warning("waiting for Kafka", reason=str(error))
                attempt += 1
                await asyncio.sleep(backoff(attempt))


def backoff(attempt: int, *, first: float = 0.1, most: float = 2.0) -> float:
    """Seconds to wait before attempt 1, 2, 3 …: doubling, bounded, with jitter so that rivals do not march in step."""
    return random.uniform(0.5, 1.0) * min(most, first * 2.0 ** min(attempt - 1, 16))  # noqa: S311 - jitter, not a secret


def gravest(group: ExceptionGroup) -> Exception:
    """The one error of a task group to act on: a bug before what is expected to go wrong now and then."""
    leaves = list(_leaves(group))
    return next((error for error in leaves if not isinstance(error, EpisodesError)), leaves[0])


def _leaves(group: ExceptionGroup) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel the task and wait until it has ended; again, should it take no notice."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_END_SECONDS)


async def keep_running(partition: int, run_partition: RunPartition, status: Status) -> None:
    """Run one partition again whenever it is interrupted; stand still, with the reason shown, once it stops."""
    attempt = 0
    while True:
        status.partitions[partition] = "starting"
        error = await error_of(run_partition(partition))
        if isinstance(error, PoisonRecord | RecordsLost):
            status.partitions[partition] = f"stopped: {error}"
            _log.error("partition stopped", partition=partition, reason=str(error))
            await asyncio.Event().wait()
        elif isinstance(error, Unavailable | Fenced):
            if status.partitions[partition] == Status.RUNNING:
                attempt = 0
            attempt += 1
            status.partitions[partition] = f"waiting: {error}"
            _log.warning("partition interrupted", partition=partition, reason=str(error))
            # After a fence, give the group time to tell us that the partition is somebody else's.
            await asyncio.sleep(backoff(attempt, first=1.0) if isinstance(error, Fenced) else backoff(attempt))
        else:
            raise error or RuntimeError(f"the work on partition {partition} ended without an error")


async def error_of(work: Coroutine[Any, Any, None]) -> BaseException | None:
    """The error with which the work ended, None if it ended without one.

    It runs in a task of its own: a cancellation that comes out of it, of a library's own making or while an error was
    on its way out, must neither end us without a word nor be taken for one that was meant for us.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await end_task(task)
        raise
    if task.cancelled():
        return RuntimeError("the work was cancelled, and by nobody here")
    return task.exception()
