"""In front of Kafka callers take turns, so that nobody waits behind all that somebody else has sent.

Kafka keeps the order in which it is given commands: whatever is in it already, a newcomer waits for. So only as much
goes there at once as is answered soon, and the rest waits here, where who comes next can be chosen.
"""

import asyncio
import heapq
import itertools
from typing import NamedTuple

from gateway.limits import AdaptiveSize
from shared.errors import Unavailable

_REMEMBERED_SECONDS = 1.0
"""So long after somebody else's last write a caller is not yet alone."""


class FairQueue:
    """Lets so much be under way at once; each caller with something to wait for gets as much of it as any other.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): what waits is let in by the time at which it would
    begin if each caller were served alone and at the same pace. Costs are in any unit that the size's is. A caller who
    has been alone for a while may have all they want under way: more gets done so, and there is nobody to wait for it.
    """

    def __init__(self, size: AdaptiveSize) -> None:
        self.under_way = 0
        self._size = size
        self._now = 0
        self._newest: str | None = None
        self._alone_from = float("inf")
        self._waiting: list[tuple[int, int, _Turn]] = []
        self._numbers = itertools.count()
        self._ends: dict[str, int] = {}
        """For each caller who waits, when the last of it would end."""

    async def enter(self, caller: str, cost: int) -> None:
        """Wait for a turn. Unless this raises, `leave` must follow.

        Raises:
            Unavailable: as `turn_away` was told.
        """
        if caller != self._newest:
            self._newest = caller
            self._alone_from = asyncio.get_running_loop().time() + _REMEMBERED_SECONDS
        if not self._waiting and self._has_room():
            self.under_way += cost
            return
        begins = max(self._now, self._ends.get(caller, 0))
        self._ends[caller] = begins + cost
        turn = _Turn(caller, cost, begins + cost, asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, (begins, next(self._numbers), turn))
        try:
            await turn.comes
        except asyncio.CancelledError:
            if not turn.comes.cancelled() and turn.comes.exception() is None:  # it had come
                self.under_way -= cost
                self._let_in()
            raise

    def leave(self, cost: int, entered_at: float) -> None:
        """End what was let in at a time of the loop."""
        self._size.observe(entered_at, asyncio.get_running_loop().time(), self.under_way)
        self.under_way -= cost
        self._let_in()

    def turn_away(self, reason: str) -> None:
        """Refuse all who wait."""
        for _, _, turn in self._waiting:
            if not turn.comes.done():
                turn.comes.set_exception(Unavailable(reason))
        self._waiting.clear()
        self._ends.clear()

    def _has_room(self) -> bool:
        return self.under_way < self._size.most or asyncio.get_running_loop().time() >= self._alone_from

    def _let_in(self) -> None:
        while self._waiting and self._has_room():
            self._now, _, turn = heapq.heappop(self._waiting)
            if self._ends[turn.caller] == turn.ends:
                del self._ends[turn.caller]
            if not turn.comes.done():
                self.under_way += turn.cost
                turn.comes.set_result(None)


class _Turn(NamedTuple):
    caller: str
    cost: int
    ends: int
    comes: asyncio.Future[None]
