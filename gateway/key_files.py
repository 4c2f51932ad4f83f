"""Keys in a file that may change while the gateway runs: it is read again, and nothing is restarted."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

LOOK_SECONDS = 1.0
"""The longest time after which a change is seen."""

_log = structlog.get_logger(__name__)


class KeyFile(Generic[T]):
    """What is in a file, as it is now. A change that cannot be used is told in the log, and what was before stays."""

    def __init__(
        self, path: Path, read: Callable[[bytes], T], setting: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the file for the first time. ``read`` raises `ValueError` for what it cannot use.

        Raises:
            ValueError: the file cannot be used. The message begins with the name of the setting.
        """
        self._path = path
        self._read = read
        self._setting = setting
        self._clock = clock
        self._looked_at = clock()
        try:
            self._seen: tuple[int, int, int] | None = self._state()
            self._value = read(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{setting}: {error}") from error

    def value(self) -> T:
        """What is in the file, or was `LOOK_SECONDS` ago."""
        if self._clock() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = self._clock()
            self._look()
        return self._value

    def _look(self) -> None:
        before = self._seen
        try:
            self._seen = None
            self._seen = self._state()
            if self._seen != before:
                self._value = self._read(self._path.read_bytes())
                _log.info("keys read again", setting=self._setting)
        except (OSError, ValueError) as error:
            if self._seen != before:
                _log.error("keys not read again: those of before stay good", setting=self._setting, reason=str(error))

    def _state(self) -> tuple[int, int, int]:
        """What is another when the file is: it may be written, or another one put in its place."""
        found = self._path.stat()
        return found.st_ctime_ns, found.st_size, found.st_ino
