"""Worker processes for replays: one job each at a time, with a shared table of how far each job is.

A worker ends by itself when the process that started it is gone, even if that was killed.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from shared.process import tune_interpreter

_T = TypeVar("_T")
_LOOK_AFTER_PARENT_SECONDS = 0.5


@dataclass
class Table:
    """What parent and workers share."""

    done: "SynchronizedArray[int]"
    """Slot → how much of its job is done. A job with several parts has as many slots, one behind the other."""
    going: Event
    """Cleared while the workers should hold still."""

    def note(self, slot: int, done: int) -> None:
        """Tell how far a job is, or one part of it. Holds still while it should."""
        self.done[slot] = done
        self.going.wait()


table: Table
"""In a worker: the parent's."""


class Workers:
    """Runs jobs in up to ``count`` processes."""

    def __init__(self, executor: ProcessPoolExecutor, shared: Table) -> None:
        self._executor = executor
        self._shared = shared

    async def run(self, job: Callable[..., _T], arguments: Iterable[Sequence[Any]]) -> AsyncIterator[_T]:
        """The results of ``job`` for each of the argument lists, in the order in which they are ready.

        The first error is raised as it is; jobs that have not begun then never do.
        """
        loop = asyncio.get_running_loop()
        running = [loop.run_in_executor(self._executor, job, *each) for each in arguments]
        try:
            for ready in asyncio.as_completed(running):
                yield await ready
        finally:
            for future in running:
                future.cancel()

    def done(self, slots: range) -> list[int]:
        """How far the jobs with these slots are."""
        return list(self._shared.done[slots.start : slots.stop])

    def hold(self, *, still: bool) -> None:
        """Make the workers hold still, or go on."""
        if still:
            self._shared.going.clear()
        else:
            self._shared.going.set()


@asynccontextmanager
async def open_workers(count: int, slots: int) -> AsyncIterator[Workers]:
    """Workers that are started when needed and end on the way out, whatever they are doing."""
    context = multiprocessing.get_context("spawn")
    shared = Table(context.Array("q", slots), context.Event())
    shared.going.set()
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(shared, os.getpid()))
    try:
        yield Workers(executor, shared)
    finally:
        processes = list((executor._processes or {}).values())  # noqa: SLF001 - there is no public way to end them
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()  # whatever it waits for; what it had inserted stays, and is not inserted again


def _begin(shared: Table, parent: int) -> None:
    tune_interpreter()
    global table  # noqa: PLW0603 - a worker has one parent
    table = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of us; the parent ends its workers

    def look_after_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_AFTER_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=look_after_parent, daemon=True).start()
