"""The folder of a stack: its settings, made once and kept, and the programs that they describe."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from local import survivors
from local.prerequisites import Say
from local.process import OWNER, ROOT, Managed
from local.servers import HOST, Servers, free_port, make_servers, mongodb_url, port_is_free
from local.services import SERVICES, api_keys_setting, make_service

PORTS = {
    "gateway": "GATEWAY_PORT",
    "kafka": "KAFKA_PORT",
    "kafka_controller": "KAFKA_CONTROLLER_PORT",
    "mongodb": "MONGODB_PORT",
    "ingestor": "INGESTOR_PROBE_PORT",
    "projector": "PROJECTOR_PROBE_PORT",
}
"""Whose port is held, and may be set, under which name."""

SUPERVISOR = "supervisor"
NAMES = ("kafka", "mongodb", "topics", *SERVICES)


class PortInUseError(Exception):
    """A port that was asked for belongs to another program."""


@dataclass(frozen=True)
class Stack:
    """One stack: everything it has lies in `folder`."""

    folder: Path

    @property
    def env_file(self) -> Path:
        """Where a person's scripts find the addresses and secrets."""
        return self.folder / "env"

    @property
    def pids_file(self) -> Path:
        """The process ids by name, for scripts."""
        return self.folder / "pids.json"

    @property
    def state_file(self) -> Path:
        """What the supervisor knows: see `supervisor.Watched.as_json`."""
        return self.folder / "state.json"

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self.folder / "logs" / f"{name}.log"

    def settings(self) -> dict[str, str]:
        """Read the settings file; empty if there is none yet."""
        if not self.env_file.exists():
            return {}
        lines = self.env_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def ports(self) -> dict[str, int]:
        """Give the port of each program."""
        settings = self.settings()
        return {name: int(settings[variable]) for name, variable in PORTS.items() if variable in settings}

    def configure(self) -> None:
        """Make the settings, or bring them up to date, for a stack that does not run.

        Secrets stay as they are. So do ports, unless the environment names another or somebody else took one.
        """
        old = self.settings()
        ports = {name: _choose_port(variable, old.get(variable)) for name, variable in PORTS.items()}
        settings = {
            "GATEWAY_URL": f"http://{HOST}:{ports['gateway']}",
            "JWT_SECRET": old.get("JWT_SECRET") or secrets.token_urlsafe(32),
            "API_KEY": old.get("API_KEY") or secrets.token_urlsafe(24),
            "KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{ports['kafka']}",
            "MONGODB_URL": mongodb_url(ports["mongodb"]),
            **{variable: str(ports[name]) for name, variable in PORTS.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.env_file, "".join(f"{name}={value}\n" for name, value in settings.items()))

    def make_servers(self, say: Say = lambda _: None) -> Servers:
        """Make Kafka and MongoDB, not started; what they need is fetched, or found missing, here."""
        return make_servers(self.folder, ports=self.ports(), env={OWNER: str(self.folder)}, say=say)

    def make_programs(self) -> list[Managed]:
        """Make all programs in the order in which they are started."""
        settings = self.settings()
        ports = self.ports()
        shared = {name: settings[name] for name in ("KAFKA_BOOTSTRAP_SERVERS", "MONGODB_URL", "JWT_SECRET")}
        shared["API_KEYS"] = api_keys_setting({settings["API_KEY"]: ["*"]})
        servers = self.make_servers()
        services = [make_service(kind, self.folder, env=shared, port=ports[kind]) for kind in SERVICES]
        return [servers.mongodb, servers.kafka, make_service("topics", self.folder, env=shared), *services]

    def supervisor(self) -> psutil.Process | None:
        """Give the supervisor if it lives."""
        pid = self.pids().get(SUPERVISOR)
        with contextlib.suppress(psutil.Error):
            if pid is not None and survivors.is_ours(process := psutil.Process(pid), self.folder):
                return process
        return None

    def pids(self) -> dict[str, int]:
        """Read the process ids by name. They may be out of date if the supervisor was killed."""
        pids: dict[str, int] = _read(self.pids_file)
        return pids

    def state(self) -> dict[str, Any]:
        """Read what the supervisor last wrote about each program."""
        state: dict[str, Any] = _read(self.state_file)
        return state

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Be the only process that holds this lock of this stack; wait for it if need be. It ends with the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def this_stack() -> Stack:
    """Give the stack in the folder that LOCAL_DIR names, else in .local beside the Makefile."""
    return Stack(Path(os.environ.get("LOCAL_DIR") or ROOT / ".local").resolve())


def write(file: Path, text: str) -> None:
    """Replace a file's content at once, so that nobody ever reads half of it; it is for its owner's eyes only."""
    unfinished = file.with_suffix(".new")
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a file's content with JSON."""
    write(file, json.dumps(content, indent=1) + "\n")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}


def _choose_port(variable: str, kept: str | None) -> int:
    if wanted := os.environ.get(variable):
        if not port_is_free(int(wanted)):
            raise PortInUseError(f"Port {wanted} ({variable}) is in use by another program: stop that or name another.")
        return int(wanted)
    return int(kept) if kept and port_is_free(int(kept)) else free_port()
