"""What several want at the same moment, asked for at once."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from shared.threads import until_over

A = TypeVar("A")
R = TypeVar("R")


class Together(Generic[A, R]):
    """Calls that come while one is under way go together as the next one (group commit, as databases know it).

    ``work`` is called in a thread, for one or for many. What it returns or raises is told to each of them.
    """

    def __init__(self, work: Callable[[Sequence[A]], R], threads: Executor) -> None:
        self._work = work
        self._threads = threads
        self._waiting: dict[asyncio.Future[R], A] = {}
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, wanted: A) -> R:
        """What the work came to in which this had a part. Cancelled, this waits until that is over."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[R] = loop.create_future()
        self._waiting[told] = wanted
        if self._worker is None:
            self._worker = loop.create_task(self._go_on())
        try:
            return await asyncio.shield(told)
        except asyncio.CancelledError:
            if self._waiting.pop(told, None) is None:
                await until_over(told)
            raise

    async def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.sleep(0)  # whoever is ready in this turn of the loop comes along
            while self._waiting:
                waiting, self._waiting = self._waiting, {}
                try:
                    done = await loop.run_in_executor(self._threads, self._work, [*waiting.values()])
                except Exception as error:  # noqa: BLE001 - it is theirs
                    for told in waiting:
                        told.set_exception(error)
                else:
                    for told in waiting:
                        told.set_result(done)
        finally:
            self._worker = None
