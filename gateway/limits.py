"""How much of something there may be at once. Past it the caller is told to come again.

Nobody gets all of it: a caller may hold as much as is free (dynamic thresholds; Choudhury and Hahne, IEEE/ACM
Transactions on Networking 6(2), 1998). So one caller alone has half, two that want too much have a third each, and
whoever asks for little always finds something.
"""

import asyncio
from collections import Counter

from shared.errors import EpisodesError, Unavailable

_MOST_KEPT = 4096
FEW = 8
"""Of these nobody has too many."""
_FASTEST_FALL, _SLOWEST_FALL = 1 / 4, 3 / 4


class ShareExceeded(EpisodesError):
    """The caller holds so much that others would come short."""


class TooMany(Unavailable):
    """There is no room for one more, whoever asks."""


class Brake:
    """Keeps those a while who ask for too much, before they are refused.

    A client that asks again at once would use the service up with refusals alone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept = 0

    async def hold(self) -> None:
        """Wait, unless so many wait that this alone would be too much."""
        if self._kept >= _MOST_KEPT:
            return
        self._kept += 1
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self._kept -= 1


class Limit:
    """So much and no more."""

    def __init__(self, most: int, what: str) -> None:
        self.taken = 0
        self.most = most
        self._what = what
        self._held: Counter[str] = Counter()

    def check(self, caller: str, amount: int = 1) -> None:
        """See whether ``caller`` could take ``amount`` now.

        Raises:
            TooMany: that is more than there may be.
            ShareExceeded: it is more than this caller may have.
        """
        free = self.most - self.taken
        if amount > free:
            raise TooMany(f"Too many {self._what} are under way")
        if self._held[caller] + amount > free:
            raise ShareExceeded(f"You have more than your share of {self._what} under way")

    def take(self, caller: str, amount: int = 1) -> None:
        """Count ``amount`` in.

        Raises:
            TooMany: that is more than there may be.
            ShareExceeded: it is more than this caller may have.
        """
        self.check(caller, amount)
        self._held[caller] += amount
        self.taken += amount

    def give_back(self, caller: str, amount: int = 1) -> None:
        """Count ``amount`` out."""
        self.taken -= amount
        self._held[caller] -= amount
        if self._held[caller] == 0:
            del self._held[caller]


class AdaptiveSize:
    """As much at once as can be done within a time. Begins with ``least``, and is between that and ``greatest``.

    What takes longer than ``target`` seconds waits behind others: with fewer at once just as many get done. How many
    fewer, Little's law says. While somebody wants more and nobody waits, it grows by one for each, as TCP begins.
    """

    def __init__(self, *, least: int, greatest: int, target: float) -> None:
        self.most = self._least = min(least, greatest)
        self.greatest = greatest
        self._target = target
        self._changed_at = float("-inf")

    def observe(self, began_at: float, ended_at: float, used: int) -> None:
        """Note how long one took while so much was used. Times are the loop's."""
        used = min(self.most, used)
        if ended_at - began_at <= self._target:
            if used == self.most < self.greatest:
                self.most += 1
        elif began_at >= self._changed_at:  # those that began before tell of the size before
            factor = min(max(self._target / (ended_at - began_at), _FASTEST_FALL), _SLOWEST_FALL)
            self.most = max(self._least, round(used * factor))
            self._changed_at = ended_at


class LatencyLimit(Limit):
    """So much as is done within a time.

    When it falls, more is out than there may be; who holds a few goes on all the same, until as much is out as there
    may ever be.
    """

    def __init__(self, what: str, size: AdaptiveSize) -> None:
        super().__init__(size.most, what)
        self._size = size

    def check(self, caller: str, amount: int = 1) -> None:
        few = self._held[caller] + amount <= FEW and self.taken + amount <= self._size.greatest
        if not few:
            super().check(caller, amount)

    def observe(self, began_at: float, ended_at: float) -> None:
        """Note how long one took, before it is given back. Times are the loop's."""
        self._size.observe(began_at, ended_at, 2 * self.taken)  # one caller alone never holds more than half
        self.most = self._size.most
