"""One client of Kafka for all partitions of a process.

With a client for each partition, Kafka is asked for each by itself: with eight partitions and 64 callers of single
writes that was nearly half of what an ingestor did (ADR 20).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Lent(Generic[T]):
    """What is opened for the first who needs it, and closed after the last.

    Who leaves with an error may leave it broken: it goes on for those who have it, and who comes later gets a new one.
    """

    def __init__(self, opener: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._opener = opener
        self._current: _Lease[T] | None = None

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[T]:
        """Have it for the length of the block.

        Raises:
            Unavailable: or whatever else the opener raises, to all who wait for it.
        """
        lease = self._current
        if lease is None:
            lease = self._current = _Lease(self._opener())
        lease.users += 1
        left_with: BaseException | None = None
        try:
            yield await asyncio.shield(lease.opening)
        except BaseException as error:
            left_with = error
            raise
        finally:
            lease.users -= 1
            if isinstance(left_with, Exception) or not lease.users:
                self._retire(lease)
            if not lease.users:
                await lease.close(left_with)

    def _retire(self, lease: "_Lease[T]") -> None:
        if self._current is lease:
            self._current = None


class _Lease(Generic[T]):
    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self.users = 0
        self._stack = AsyncExitStack()
        self.opening = asyncio.ensure_future(self._stack.enter_async_context(manager))

    async def close(self, error: BaseException | None) -> None:
        """Close it as a block is left with ``error``, or with none."""
        if not self.opening.done():
            self.opening.cancel()
            await asyncio.wait([self.opening])
        if not self.opening.cancelled() and self.opening.exception() is None:
            await self._stack.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
