"""One program under our control: started, stopped, killed, frozen, and asked whether it is ready."""

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
"""Where the packages are: the working directory of every process, so that `python -m gateway` finds its code."""

OWNER = "EPISODES_STACK"
"""Environment variable that every process of a stack carries, with the stack's folder as its value.

A pid alone may have been given to somebody else since it was written down; this mark may not.
"""

LOG_LIMIT = 32 * 1024 * 1024


class NotReadyError(Exception):
    """A program died or took too long; the message holds the end of its log."""


class Managed(ABC):
    """What the stack and the tests can do with a program, be it a process or a container."""

    def __init__(self, name: str, log: Path, port: int | None = None) -> None:
        self.name = name
        self.log = log
        self.port = port

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The process id while it runs, else `None`."""

    @property
    @abstractmethod
    def exit_code(self) -> int | None:
        """How the last run ended (minus the number of a signal); `None` while it runs or if it never did."""

    @abstractmethod
    def start(self) -> None:
        """Start it and return at once."""

    @abstractmethod
    def stop(self, timeout: float = 30) -> int | None:
        """Ask it to end, wait, and kill it if `timeout` seconds were not enough. Give the exit code."""

    @abstractmethod
    def kill(self) -> None:
        """End it as a power cut would (SIGKILL)."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze it (SIGSTOP): it keeps its sockets and answers nobody."""

    @abstractmethod
    def resume(self) -> None:
        """Let a frozen one go on (SIGCONT)."""

    def missing(self) -> str | None:
        """Say what it still waits for, or `None` when it is ready. Never takes longer than about a second."""
        return None if self.running else "it does not run"

    def log_tail(self, lines: int = 30) -> str:
        """Give the last lines that it wrote."""
        return tail(self.log, lines)

    @property
    def running(self) -> bool:
        """Whether there is a live process, frozen or not."""
        return self.pid is not None

    def restart(self) -> None:
        """Stop it in good order and start it again."""
        self.stop()
        self.start()

    def wait_ready(self, timeout: float = 60) -> Self:
        """Wait until nothing is missing, or raise `NotReadyError`."""
        deadline = time.monotonic() + timeout
        while (missing := self.missing()) is not None:
            if not self.running:
                raise NotReadyError(f"{self.name} ended with exit code {self.exit_code}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise NotReadyError(f"{self.name} is not ready after {timeout:.0f} s: {missing}\n{self.log_tail()}")
            time.sleep(0.05)
        return self


class ManagedProcess(Managed):
    """A child process that writes to a log file.

    It runs in a session of its own, so a Ctrl-C at the terminal is for its parent to handle.
    `probe` is the URL that answers 200 once the process is ready.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        port: int | None = None,
        probe: str | None = None,
    ) -> None:
        super().__init__(name, log, port)
        self.argv = tuple(argv)
        self.env = dict(env)
        self.probe = probe
        self._child: subprocess.Popen[bytes] | None = None
        self._log_began_at = 0

    @property
    def has_spoken(self) -> bool:
        """Whether it has written to its log since it was started."""
        return self.log.exists() and self.log.stat().st_size > self._log_began_at

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        return None if self._child is None else self._child.poll()

    def start(self) -> None:
        if self.running:
            return
        self.prepare()
        rotate(self.log)
        with self.log.open("ab") as log:
            self._log_began_at = log.tell()
            self._child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                cwd=ROOT,
                start_new_session=True,
            )

    def prepare(self) -> None:
        """Make what must exist before the process starts."""
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def stop(self, timeout: float = 30) -> int | None:
        if self._child is None:
            return None
        self.signal(signal.SIGCONT)  # a frozen process would not hear the request
        self.signal(signal.SIGTERM)
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._child.returncode

    def wait(self, timeout: float = 60) -> int | None:
        """Wait for it to end by itself, and give the exit code."""
        return None if self._child is None else self._child.wait(timeout)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._child is not None:
            self._child.wait()

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        if self._child is not None:
            self._child.send_signal(number)  # polls first, so never reaches a stranger with a reused pid

    def missing(self) -> str | None:
        if not self.running:
            return super().missing()
        return None if self.probe is None else ask(self.probe)


def ask(probe: str, timeout: float = 1) -> str | None:
    """Ask a readiness URL: `None` for a 200, else what it says is missing."""
    try:
        with urllib.request.urlopen(probe, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return _reason(error.code, error.read(65536))
    except OSError:
        return "it does not answer yet"


def _reason(status: int, body: bytes) -> str:
    """Make one line of what /readyz answers: `waiting_for` {what: how that shows}, `partitions` {number: state}."""
    text = body.decode(errors="replace").strip()
    try:
        answer = json.loads(text)
        waits = [f"{what} ({how})" for what, how in answer.get("waiting_for", {}).items()]
        halted = {number: how for number, how in answer.get("partitions", {}).items() if how != "running"}
    except (ValueError, AttributeError):
        return f"{status} {text[:200]}"
    waits += [f"partition {number}: {how}" for number, how in halted.items()]
    return ", ".join(waits) or str(answer.get("detail", f"{status} {text[:200]}"))


def tail(log: Path, lines: int = 30) -> str:
    """Give the last lines of a file, reading no more than its last 64 kB."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def rotate(log: Path, limit: int = LOG_LIMIT) -> None:
    """Move a log that has outgrown `limit` bytes aside, over the one moved before.

    It is copied and cut, not renamed: its writer has it open for appending and goes on at the new end.
    """
    if log.exists() and log.stat().st_size > limit:
        shutil.copyfile(log, log.with_suffix(log.suffix + ".1"))
        os.truncate(log, 0)
