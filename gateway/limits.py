"""How much of something there may be at once. Beyond that the caller is told to come again, not kept waiting."""

from shared.errors import Unavailable


class Limit:
    """So much and no more."""

    def __init__(self, most: int, what: str) -> None:
        self.taken = 0
        self._most = most
        self._what = what

    def take(self, amount: int = 1) -> None:
        """Count ``amount`` in.

        Raises:
            Unavailable: that is more than there may be.
        """
        if self.taken + amount > self._most:
            raise Unavailable(f"Too many {self._what} are under way")
        self.taken += amount

    def give_back(self, amount: int = 1) -> None:
        """Count ``amount`` out."""
        self.taken -= amount
