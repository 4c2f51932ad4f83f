"""In front of Kafka callers take turns, so that nobody waits behind all that somebody else has sent.

Kafka keeps the order in which it is given commands: whatever is in it already, a newcomer waits for. So only as much
goes there at once as is answered soon, and the rest waits here, where who comes next can be chosen.
"""

import asyncio
import heapq
import itertools
from collections import deque
from typing import NamedTuple

from gateway.limits import FEW, AdaptiveSize, ShareExceeded, TooMany
from shared.errors import EpisodesError, Unavailable

_REMEMBERED_SECONDS = 1.0
"""So long after somebody else's last write a caller is not yet alone."""


class FairQueue:
    """Lets so much be under way at once; each caller with something to wait for gets as much of it as any other.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): what waits is let in by the time at which it would
    begin if each caller were served alone and at the same pace. Costs are in any unit that the size's is. A caller who
    has been alone for a while may have all they want under way: more gets done so, and there is nobody to wait for it.

    What has waited for more than ``patience`` seconds is refused, but only while answers come and others are let in for
    them: who waits for one that does not answer, or for what somebody who was alone has under way, goes on waiting.
    """

    def __init__(self, size: AdaptiveSize, patience: float) -> None:
        self.under_way = 0
        self._size = size
        self._patience = patience
        self._newest: str | None = None
        self._alone_from = float("inf")
        self._went_on_at = self._goes_on_since = float("-inf")
        self._now = 0
        self._lines: dict[str, deque[_Turn]] = {}
        """What waits, for each caller who waits or was let in of late."""
        self._heads: list[tuple[int, int, str]] = []
        """For each of these lines, when its first would begin."""
        self._numbers = itertools.count()
        self._by_age: deque[_Turn] = deque()

    async def enter(self, caller: str, cost: int) -> None:
        """Wait for a turn. Unless this raises, `leave` must follow.

        Raises:
            Unavailable: as `turn_away` was told.
            TooMany: too many wait.
            ShareExceeded: too much of this caller's waits.
        """
        now = _clock()
        if caller != self._newest:
            self._newest = caller
            self._alone_from = now + _REMEMBERED_SECONDS
        if not self._by_age and self._has_room(now):
            self.under_way += cost
            return
        if caller not in self._lines:
            self._lines[caller] = deque()
            heapq.heappush(self._heads, (self._now, next(self._numbers), caller))
        turn = _Turn(caller, cost, now, asyncio.get_running_loop().create_future())
        self._lines[caller].append(turn)
        self._by_age.append(turn)
        try:
            await turn.comes
        except asyncio.CancelledError:
            if not turn.comes.cancelled() and turn.comes.exception() is None:  # it had come
                self.under_way -= cost
            self._let_in(_clock())
            raise

    def leave(self, cost: int, entered_at: float | None) -> None:
        """End what was let in at a time of the loop; None if nobody answered it."""
        now = _clock()
        if entered_at is not None:
            self._size.observe(entered_at, now, self.under_way)
        self.under_way -= cost
        left = self.under_way
        self._let_in(now)
        if entered_at is None or self.under_way == left:
            return
        if now - self._went_on_at > self._patience:
            self._goes_on_since = now
        self._went_on_at = now
        while self._by_age and now - max(self._by_age[0].since, self._goes_on_since) > self._patience:
            self._refuse(self._by_age.popleft())

    def turn_away(self, reason: str) -> None:
        """Refuse all who wait."""
        while self._by_age:
            self._refuse(self._by_age.popleft(), Unavailable(reason))
        self._lines.clear()
        self._heads.clear()

    def _has_room(self, now: float) -> bool:
        return self.under_way < self._size.most or now >= self._alone_from

    def _let_in(self, now: float) -> None:
        while self._heads and self._has_room(now):
            begins, _, caller = heapq.heappop(self._heads)
            line = self._lines[caller]
            _drop_done(line)
            if not line:
                del self._lines[caller]
                continue
            turn = line.popleft()
            self._now = begins
            self.under_way += turn.cost
            turn.comes.set_result(None)
            heapq.heappush(self._heads, (begins + turn.cost, next(self._numbers), caller))
        _drop_done(self._by_age)

    def _refuse(self, turn: "_Turn", error: EpisodesError | None = None) -> None:
        if turn.comes.done():
            return
        line = self._lines[turn.caller]
        _drop_done(line)
        if error is None and len(line) > FEW:
            error = ShareExceeded("You have more than your share of writes waiting")
        turn.comes.set_exception(error or TooMany("Too many writes wait for their turn"))


def _clock() -> float:
    return asyncio.get_running_loop().time()


def _drop_done(turns: "deque[_Turn]") -> None:
    while turns and turns[0].comes.done():
        turns.popleft()


class _Turn(NamedTuple):
    caller: str
    cost: int
    since: float
    comes: asyncio.Future[None]
