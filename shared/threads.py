"""Work in threads that is never left behind."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(threads: Executor | None, work: Callable[..., T], *arguments: Any) -> T:
    """What the work comes to in one of the threads, of the loop's own if none are given.

    Cancelled, this waits until it is over: what it uses may not be used by others, or closed, meanwhile.
    """
    running = asyncio.get_running_loop().run_in_executor(threads, partial(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await until_over(running)
        raise


async def until_over(work: asyncio.Future[Any]) -> None:
    """Wait for it, whatever it comes to, however often we are cancelled."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([work])
    if not work.cancelled():
        work.exception()  # it was looked at
