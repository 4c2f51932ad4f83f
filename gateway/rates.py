"""How many requests a second one caller may send."""

import math
import time

from limits import RateLimitItem
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from gateway.auth import Authenticator, Caller
from gateway.problems import rate_limited


class RateLimitedAuthenticator:
    """Knows whom the one inside knows, and sends those away who come too often. Counts in this process only."""

    def __init__(self, inner: Authenticator, rate: RateLimitItem) -> None:
        self._inner = inner
        self._rate = rate
        self._counted = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def caller(self, authorization: str | None) -> Caller:
        """The caller.

        Raises:
            Problem: 401, or 429 with the time until there is room again.
            Unavailable: who it is cannot be told now.
        """
        caller = await self._inner.caller(authorization)
        if not await self._counted.hit(self._rate, caller.actor):
            window = await self._counted.get_window_stats(self._rate, caller.actor)
            wait = max(1, math.ceil(window.reset_time - time.time()))
            raise rate_limited(f"You may send {self._rate}", retry_after=wait)
        return caller
