"""The process that starts all others, starts those again that die, and keeps the record of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from local.process import OWNER, ROOT, Managed, rotate
from local.servers import ManagedContainer
from local.stack import SUPERVISOR, Stack, write_json

TICK = 0.1
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
STEADY_AFTER = 30.0
"""Seconds after which a program that dies is started again as if it had never died before."""

STOP_ORDER = ("gateway", "ingestor", "projector", "topics", "kafka", "mongodb")
EXITS_KEPT = 5


class Watched:
    """A program and its story so far."""

    def __init__(self, program: Managed, *, once: bool = False) -> None:
        self.program = program
        self.once = once
        self.done = False
        self.restarts = 0
        self.exits: list[dict[str, Any]] = []
        self._failures = 0
        self._started_at: float | None = None
        self._next_start_at = 0.0

    def tick(self, now: float) -> None:
        """Start it if it is time to, note its end if it ended."""
        if self.done or self.program.running:
            return
        if self._started_at is not None:
            self._note_end(now, self.program.exit_code, self.program.log_tail(15))
        elif now >= self._next_start_at:
            self._start(now)

    def as_json(self) -> dict[str, Any]:
        """Give what `status` shows of it beyond the process itself."""
        container = isinstance(self.program, ManagedContainer)
        return {"restarts": self.restarts, "done": self.done, "container": container, "exits": self.exits}

    def _start(self, now: float) -> None:
        self.restarts += bool(self.exits)
        self._started_at = now
        try:
            self.program.start()
        except (OSError, subprocess.CalledProcessError) as error:
            self._note_end(now, None, f"it could not be started: {error}\n{self.program.log_tail(15)}")

    def _note_end(self, now: float, code: int | None, log: str) -> None:
        if self.once and code == 0:
            self.done = True
            return
        if self._started_at is not None and now - self._started_at > STEADY_AFTER:
            self._failures = 0
        self._started_at = None
        self._next_start_at = now + min(FIRST_PAUSE * 2**self._failures, LONGEST_PAUSE)
        self._failures += 1
        note = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "code": code, "log": log}
        self.exits = [*self.exits, note][-EXITS_KEPT:]


class Supervisor:
    """Keeps the programs of one stack running until it is told to stop."""

    def __init__(self, stack: Stack, programs: Sequence[Managed]) -> None:
        self._stack = stack
        self._watched = {program.name: Watched(program, once=program.name == "topics") for program in programs}
        self._unsettled = {"mongodb"}
        self._stopping = False
        self._written: tuple[Any, Any] = ({}, {})

    def run(self, own_pid: int) -> None:
        """Start everything, keep it running; stop it in good order after SIGTERM, SIGINT or the loss of the folder."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        try:
            self._record(own_pid)
            while not self._stopping and self._stack.folder.exists():
                for watched in self._watched.values():
                    watched.tick(time.monotonic())
                    self._record(own_pid)
                    self._settle(watched)
                    rotate(watched.program.log)
                time.sleep(TICK)
        finally:
            self._shut_down(own_pid)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _settle(self, watched: Watched) -> None:
        """Ask MongoDB whether it is ready until it says so, for asking is what makes its replica set."""
        name = watched.program.name
        if not watched.program.running:
            self._unsettled |= {name} & {"mongodb"}
        elif name in self._unsettled and watched.program.missing() is None:
            self._unsettled.discard(name)

    def _record(self, own_pid: int) -> None:
        pids = {SUPERVISOR: own_pid}
        pids |= {name: it.program.pid for name, it in self._watched.items() if it.program.pid is not None}
        state = {name: watched.as_json() for name, watched in self._watched.items()}
        if (pids, state) != self._written:
            write_json(self._stack.state_file, state)
            write_json(self._stack.pids_file, pids)
            self._written = (pids, state)

    def _shut_down(self, own_pid: int) -> None:
        for name in sorted(self._watched, key=STOP_ORDER.index):
            print(f"stopping {name}", flush=True)
            self._watched[name].program.stop()
            with contextlib.suppress(OSError):  # the folder may be gone, the processes must be
                self._record(own_pid)
        with contextlib.suppress(OSError):
            write_json(self._stack.pids_file, {})


def start_supervisor(stack: Stack) -> subprocess.Popen[bytes]:
    """Start the supervisor of a stack as a process that outlives this one."""
    log = stack.log(SUPERVISOR)
    log.parent.mkdir(parents=True, exist_ok=True)
    rotate(log)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "local", "supervise"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "LOCAL_DIR": str(stack.folder), OWNER: str(stack.folder)},
            cwd=ROOT,
            start_new_session=True,
        )
