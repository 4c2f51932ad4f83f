"""Throw-away servers and processes for tests: the real Kafka and MongoDB, and the three programs on top of them.

`conftest.py` makes fixtures of these. All methods block: an async test that must go on meanwhile uses
`asyncio.to_thread`.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from local.process import OWNER, ROOT, Managed, ManagedProcess
from local.servers import (
    KafkaContainer,
    KafkaServer,
    ManagedContainer,
    MongoContainer,
    MongoServer,
    free_port,
    make_servers,
)
from local.services import SERVICES, api_keys_setting, make_service, make_token

JWT_SECRET = "a-secret-of-the-tests-that-is-long-enough-for-hs256"
TENANTS_OF_KEY = {
    "key-for-all": ["*"],
    "key-for-acme": ["acme"],
    "key-for-acme-and-globex": ["acme", "globex"],
    "key-for-my-app": ["my-app"],
}

RUNNING: list[Managed] = []
"""What runs now, for the report of a test that fails."""


class ThrowAwayServers:
    """A Kafka and a MongoDB of a test run's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = {name: free_port() for name in ("kafka", "kafka_controller", "mongodb")}
        made = make_servers(folder, ports=ports, env={OWNER: str(folder)}, containers_first=True)
        self.kafka: KafkaServer | KafkaContainer = made.kafka
        self.mongodb: MongoServer | MongoContainer = made.mongodb
        self.kafka_bootstrap = self.kafka.bootstrap
        self.mongodb_url = self.mongodb.url

    @property
    def env(self) -> dict[str, str]:
        """The settings by which a process finds them."""
        return {"KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap, "MONGODB_URL": self.mongodb_url}


class Cluster:
    """Gateway, ingestor and projector as processes, on servers that may be shared."""

    def __init__(self, servers: ThrowAwayServers, folder: Path, settings: Mapping[str, str]) -> None:
        self.servers = servers
        self.folder = folder
        self.jwt_secret = JWT_SECRET
        self.api_key = self.api_key_for(["*"])
        self.env = {
            **servers.env,
            "JWT_SECRET": JWT_SECRET,
            "API_KEYS": api_keys_setting(TENANTS_OF_KEY),
            **settings,
        }
        self.processes: dict[str, ManagedProcess] = {}

    @property
    def url(self) -> str:
        """Where the first gateway listens."""
        return self.url_of("gateway")

    def url_of(self, name: str) -> str:
        """Give the URL of a process: a gateway's API, or the probes of another."""
        return f"http://127.0.0.1:{self.processes[name].port}"

    def token(self, username: str, **claims: Any) -> str:
        """Give a bearer token for the projects API."""
        return make_token(self.jwt_secret, username, **claims)

    def api_key_for(self, tenants: Sequence[str]) -> str:
        """Give the key that is good for exactly these tenants; there are those of `TENANTS_OF_KEY`."""
        return next(key for key, granted in TENANTS_OF_KEY.items() if granted == list(tenants))

    def add_process(self, kind: str, name: str, env: Mapping[str, str] | None = None) -> ManagedProcess:
        """Make one more process, with a port and a state of its own. It is not started."""
        port = free_port()
        process = make_service(kind, self.folder, name=name, port=port, env={**self.env, **(env or {})})
        self.processes[name] = process
        RUNNING.append(process)
        return process

    def run_topics(self) -> None:
        """Create the topics, and wait until that is done."""
        topics = make_service("topics", self.folder, env=self.env)
        topics.start()
        if topics.wait() != 0:
            raise RuntimeError(f"the topics were not created:\n{topics.log_tail()}")

    def stop(self) -> None:
        """Stop all processes, frozen ones too."""
        for process in self.processes.values():
            process.stop(timeout=20)
            RUNNING.remove(process)


@contextlib.contextmanager
def throw_away_servers() -> Iterator[ThrowAwayServers]:
    """Run a Kafka and a MongoDB for the length of the block, in a folder that is then deleted."""
    with _folder() as folder:
        servers = ThrowAwayServers(folder)
        both: list[Managed] = [servers.mongodb, servers.kafka]
        RUNNING.extend(both)
        try:
            for server in both:
                server.start()
            for server in both:
                server.wait_ready()
            yield servers
        finally:
            for server in both:
                RUNNING.remove(server)
                server.kill()
                if isinstance(server, ManagedContainer):
                    server.remove_with_data()


@contextlib.contextmanager
def throw_away_cluster(
    servers: ThrowAwayServers | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    ready_seconds: float = 60,
) -> Iterator[Cluster]:
    """Run the three processes for the length of the block, ready to be used; on servers of their own if none are given.

    `settings` are environment variables for all of them. Each may take `ready_seconds` to be ready.
    """
    with contextlib.ExitStack() as stack:
        on = servers or stack.enter_context(throw_away_servers())
        cluster = Cluster(on, stack.enter_context(_folder()), settings or {})
        stack.callback(cluster.stop)
        cluster.run_topics()
        for kind in SERVICES:
            cluster.add_process(kind, kind).start()
        for process in cluster.processes.values():
            process.wait_ready(ready_seconds)
        yield cluster


def wait_until(found: Callable[[], Any], timeout: float = 20) -> Any:
    """Wait for something to be true, and give it."""
    deadline = time.monotonic() + timeout
    while not (result := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {timeout:.0f} s")
        time.sleep(0.02)
    return result


def run_local(folder: Path, *arguments: str, timeout: float = 60, **env: str) -> "subprocess.CompletedProcess[str]":
    """Say something on the command line to the local stack in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "local", *arguments],
        env={**os.environ, "LOCAL_DIR": str(folder), **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder; a watcher deletes it and ends its processes as soon as this process lets go of it or dies."""
    folder = Path(tempfile.mkdtemp(prefix="episodes-test-")).resolve()
    watch = [sys.executable, "-m", "local.survivors", str(folder)]
    with subprocess.Popen(watch, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True):
        yield folder
