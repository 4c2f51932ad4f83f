"""How the programs of a stack are doing, asked of each of them now, and shown as a table."""

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import psutil
from rich.table import Table
from rich.text import Text

from local import survivors
from local.process import ask
from local.servers import HOST, kafka_missing, mongodb_missing
from local.services import SERVICES
from local.stack import NAMES, SUPERVISOR, Stack


@dataclass(frozen=True)
class Row:
    """One program: how it is, and how it died if it did."""

    name: str
    port: int | None
    restarts: int
    pid: int | None = None
    uptime: float | None = None
    missing: str | None = None
    done: bool = False
    last_exit: str | None = None
    last_log: str = ""

    @property
    def ready(self) -> bool:
        """Whether it does its work, or has done it."""
        return self.done or (self.pid is not None and self.missing is None)

    @property
    def state(self) -> str:
        """Say it in a few words."""
        if self.done:
            return "done"
        if self.pid is None:
            return f"not running: {self.last_exit}" if self.last_exit else "not running"
        return "ready" if self.missing is None else f"waits: {self.missing}"


def look(stack: Stack) -> list[Row]:
    """Look at the supervisor and all programs."""
    pids, state, ports = stack.pids(), stack.state(), stack.ports()
    rows = [_look_at(stack, name, pids.get(name), ports.get(name), state.get(name, {})) for name in NAMES]
    return [_look_at(stack, SUPERVISOR, pids.get(SUPERVISOR), None, {}), *rows]


def table(rows: list[Row]) -> Table:
    """Show the rows to a person."""
    shown = Table("name", "pid", "state", "uptime", "restarts", "port", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        colour = "green" if row.ready else "yellow" if row.pid else "red"
        shown.add_row(
            row.name,
            str(row.pid or "-"),
            Text(row.state, style=colour),
            "-" if row.uptime is None else duration(row.uptime),
            str(row.restarts),
            str(row.port or "-"),
        )
    return shown


def duration(seconds: float) -> str:
    """Give a time span in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _look_at(stack: Stack, name: str, pid: int | None, port: int | None, state: dict[str, Any]) -> Row:
    exits = state.get("exits", [])
    row = Row(
        name,
        port,
        restarts=state.get("restarts", 0),
        done=state.get("done", False),
        last_exit=_ended(exits[-1]) if exits else None,
        last_log=exits[-1]["log"] if exits else "",
    )
    if pid is not None and state.get("container"):  # its pid may be that of another machine
        return replace(row, pid=pid, missing=_missing(stack, name, port))
    try:
        process = psutil.Process(pid) if pid is not None else None
        if process is None or not survivors.is_ours(process, stack.folder):
            return row
        uptime = time.time() - process.create_time()
        stopped = process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return row
    missing = "it is frozen (SIGSTOP)" if stopped else _missing(stack, name, port)
    return replace(row, pid=pid, uptime=uptime, missing=missing)


def _missing(stack: Stack, name: str, port: int | None) -> str | None:
    settings = stack.settings()
    if name in SERVICES:
        return ask(f"http://{HOST}:{port}/readyz")
    match name:
        case "kafka":
            return kafka_missing(settings["KAFKA_BOOTSTRAP_SERVERS"])
        case "mongodb":
            return mongodb_missing(settings["MONGODB_URL"])
        case "topics":
            return "it is creating the topics"
        case _:
            return None


def _ended(last: Mapping[str, Any]) -> str:
    at = datetime.fromisoformat(last["at"]).astimezone().strftime("%H:%M:%S")
    match last["code"]:
        case None:
            return f"could not be started at {at}"
        case int(code) if code < 0:
            return f"killed by {signal.Signals(-code).name} at {at}"
        case code:
            return f"ended with exit code {code} at {at}"
