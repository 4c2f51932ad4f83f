"""The programs of this repository as the stack runs them: their commands and their settings."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jwt

from local.process import OWNER, ManagedProcess
from local.servers import HOST

COMMANDS: Mapping[str, Sequence[str]] = {
    "topics": ("python", "-m", "shared.topics"),
    "gateway": ("python", "-m", "gateway"),
    "ingestor": ("python", "-m", "ingestor"),
    "projector": ("python", "-m", "projector", "run"),
}
"""What is run, here and in docker-compose.yml."""

SERVICES = ("gateway", "ingestor", "projector")
PORT_SETTING = {
    "gateway": "GATEWAY_PORT",
    "ingestor": "INGESTOR_PROBE_PORT",
    "projector": "PROJECTOR_PROBE_PORT",
}


def make_service(
    kind: str, folder: Path, *, env: Mapping[str, str], port: int | None = None, name: str | None = None
) -> ManagedProcess:
    """Make one of the programs, not started. `env` holds what all of them share; the rest follows from the name."""
    name = name or kind
    settings = {
        OWNER: str(folder),
        "PYTHONUNBUFFERED": "1",
        "LOG_FORMAT": os.environ.get("LOG_FORMAT", "console"),
        "NO_COLOR": "1",
        "GATEWAY_HOST": HOST,
        "PROBE_HOST": HOST,
        f"{kind.upper()}_INSTANCE_ID": name,
        "INGESTOR_STATE_DIR": str(folder / name),
    }
    if port is not None:
        settings[PORT_SETTING[kind]] = str(port)
    python, *arguments = COMMANDS[kind]
    assert python == "python"  # noqa: S101 - the interpreter that runs this, with its virtual environment
    return ManagedProcess(
        name,
        [sys.executable, *arguments],
        env={**settings, **env},
        log=folder / "logs" / f"{name}.log",
        port=port,
        probe=None if port is None else f"http://{HOST}:{port}/readyz",
    )


def api_keys_setting(tenants_of_key: Mapping[str, Sequence[str]]) -> str:
    """Give the value of API_KEYS: the gateway is told the keys' hashes, never the keys."""
    return json.dumps({hashlib.sha256(key.encode()).hexdigest(): [*tenants] for key, tenants in tenants_of_key.items()})


def make_token(secret: str, username: str, *, lifetime: float = 12 * 3600, **claims: Any) -> str:
    """Make a JWT for the projects API, good for `lifetime` seconds. `claims` are added or take the place of these."""
    now = int(time.time())
    return jwt.encode(
        {"sub": username, "username": username, "iat": now, "exp": now + round(lifetime), **claims},
        secret,
        algorithm="HS256",
    )
