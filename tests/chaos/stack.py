"""The whole service as real processes on a real Kafka and MongoDB, with a proxy on every way between two of them.

Methods that start and stop block, and are for `asyncio.to_thread`; the `async` ones of `ChaosStack` do so themselves.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from local.process import OWNER, ROOT, Managed, ManagedProcess
from local.servers import HOST, REPLICA_SET, KafkaServer, MongoServer, free_port, mongodb_url
from local.services import SERVICES, api_keys_setting, make_service
from tests.chaos.proxy import Proxy

JWT_SECRET = "a-secret-of-the-chaos-suite-that-is-long-enough"
API_KEY = "key-of-the-chaos-suite"
PARTITIONS = 4
MIB = 1024 * 1024
STATE_DISK = 128 * MIB
LOG_DISK = 256 * MIB
KAFKA_DISK = 1024 * MIB

LINKS = (
    "client-gateway",
    "gateway-kafka",
    "ingestor-kafka",
    "projector-kafka",
    "gateway-mongodb",
    "projector-mongodb",
)
"""The ways that have proxies. With three members, all that goes to MongoDB takes one way, "any-mongodb"."""

FAKETIME = next(
    (
        file
        for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib", "/usr/local/lib")
        if (file := Path(folder) / "faketime" / "libfaketimeMT.so.1").exists()
    ),
    None,
)
"""libfaketime, by which a process can be told another time; `None` where it is not installed."""

_CUSTOM = """
import threading, time
time.sleep = lambda seconds: None if threading.Event().wait(seconds) else None
"""
"""libfaketime 0.9.10 breaks clock_nanosleep on a clock that it leaves alone, and so Python's time.sleep."""

_CLUSTER = urlsafe_b64encode(b"episodes-chaos01").decode().rstrip("=")


@dataclass(frozen=True)
class Layout:
    """How many of what, and whose code."""

    gateways: int = 2
    ingestors: int = 2
    projectors: int = 2
    brokers: int = 1
    members: int = 1
    code: Path = ROOT
    """The folder with the packages of the service."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for all processes of the service."""

    @property
    def names(self) -> list[str]:
        """The processes of the service at the beginning."""
        return [
            f"{kind}-{number}"
            for kind, count in zip(SERVICES, (self.gateways, self.ingestors, self.projectors), strict=True)
            for number in range(1, count + 1)
        ]


class SmallDisk:
    """A folder on a file system of its own, if this user may mount one, that can be filled to the last byte."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size
        self.mounted = False

    def mount(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "episodes-chaos", str(self.folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(options, capture_output=True, check=False).returncode == 0

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)
            self.mounted = False

    def fill(self) -> None:
        """Leave no room, also for what is written a moment later."""
        with (self.folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(MIB))
        with (self.folder / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(512))

    def free(self) -> None:
        """Make room again."""
        (self.folder / "filler").unlink(missing_ok=True)


class Broker(KafkaServer):
    """One node of Kafka, with a listener for each kind of client that leads back to that kind's proxy."""

    def __init__(self, folder: Path, number: int, ports: Sequence[Mapping[str, int]], env: Mapping[str, str]) -> None:
        self._own = ports[number]
        super().__init__(folder, port=self._own["direct"], controller_port=self._own["controller"], env=env)
        self.name = f"kafka-{number + 1}"
        self.number = number
        self.disk = SmallDisk(self._data, KAFKA_DISK)
        listeners = {"PLAINTEXT": "direct"} | {kind.upper(): kind for kind in SERVICES}
        voters = ",".join(f"{index + 1}@{HOST}:{each['controller']}" for index, each in enumerate(ports))
        own = self._own
        self.cluster = _CLUSTER
        self.settings |= {
            "node.id": str(number + 1),
            "controller.quorum.voters": voters,
            "listeners": ",".join(
                [f"{name}://{HOST}:{own[key]}" for name, key in listeners.items()]
                + [f"CONTROLLER://{HOST}:{own['controller']}"]
            ),
            "advertised.listeners": ",".join(
                f"{name}://{HOST}:{own.get(f'{key}-proxy', own[key])}" for name, key in listeners.items()
            ),
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in (*listeners, "CONTROLLER")),
            "inter.broker.listener.name": "PLAINTEXT",
        }
        if len(ports) > 1:
            self.settings |= {
                "default.replication.factor": "3",
                "min.insync.replicas": "2",
                "offsets.topic.replication.factor": "3",
                "transaction.state.log.replication.factor": "3",
                "transaction.state.log.min.isr": "2",
                "share.coordinator.state.topic.replication.factor": "3",
                "share.coordinator.state.topic.min.isr": "2",
                "replica.lag.time.max.ms": "5000",
                "leader.imbalance.check.interval.seconds": "10",  # 300 by default: leaders go home while we look
                "leader.imbalance.per.broker.percentage": "0",
            }


class Member(MongoServer):
    """One member of the replica set."""

    def __init__(self, folder: Path, number: int, *, port: int, alone: bool, env: Mapping[str, str]) -> None:
        super().__init__(folder, port=port, env=env)
        self.name = f"mongodb-{number + 1}"
        self._alone = alone
        # a transaction whose client is gone: 60 s by default
        self.argv = (*self.argv, "--setParameter", "transactionLifetimeLimitSeconds=20")

    def missing(self) -> str | None:
        if self._alone:
            return super().missing()
        if not self.running:
            return "it does not run"
        return None if self.hello() is not None else "it does not answer yet"

    def command(self, *command: Any, database: str = "admin", **options: Any) -> dict[str, Any]:
        """Run a command on this very member.

        Raises:
            PyMongoError: it does not answer, or says no.
        """
        with MongoClient[dict[str, Any]](
            self.url, serverSelectionTimeoutMS=500, connectTimeoutMS=500, socketTimeoutMS=10_000
        ) as client:
            answer: dict[str, Any] = client[database].command(*command, **options)
            return answer

    def hello(self) -> dict[str, Any] | None:
        """Say what it is at present; `None` if it does not answer."""
        try:
            return self.command("hello")
        except PyMongoError:
            return None

    @property
    def is_primary(self) -> bool:
        return bool((self.hello() or {}).get("isWritablePrimary"))


class ChaosStack:
    """Everything, as an `async with` block. A process that ends by itself is started again, and noted."""

    def __init__(self, folder: Path, layout: Layout | None = None) -> None:
        self.folder = folder
        self.layout = layout or Layout()
        self.jwt_secret = JWT_SECRET
        self.api_key = API_KEY
        self.processes: dict[str, ManagedProcess] = {}
        self.crashes: list[str] = []
        """One line for each process that ended by itself."""
        self.proxies: dict[str, list[Proxy]] = {}
        """By the name of the way, see `LINKS`; more than one where more than one server is at its end."""
        self.disks: dict[str, SmallDisk] = {}
        """By the name of the ingestor whose state is on it; and "logs", where the processes of the service log to."""
        self._env = {OWNER: str(folder)}
        self._wanted: set[str] = set()
        count = self.layout.brokers
        kinds = ("direct", "controller", *SERVICES, *(f"{kind}-proxy" for kind in SERVICES))
        self._taken: set[int] = set()
        self._ports = [{kind: self._free_port() for kind in kinds} for _ in range(count)]
        servers = folder / "servers"
        self.brokers = [
            Broker(servers / f"kafka-{number + 1}", number, self._ports, self._env) for number in range(count)
        ]
        alone = self.layout.members == 1
        self.members = [
            Member(servers / f"mongodb-{number + 1}", number, port=self._free_port(), alone=alone, env=self._env)
            for number in range(self.layout.members)
        ]
        self._addresses = [f"{HOST}:{self._free_port()}" for _ in self.members]

    # ---- what the workload and the checker are told ----

    def gateway_urls(self) -> Sequence[str]:
        """Give the gateways that are meant to run, as clients reach them."""
        return [self.url_of(name) for name in self.names("gateway")]

    def url_of(self, name: str) -> str:
        """Give the URL of one gateway, through its proxy."""
        return f"http://{HOST}:{self._client_proxies[name].port}"

    @property
    def kafka_bootstrap(self) -> str:
        """Kafka, past all proxies."""
        return ",".join(f"{HOST}:{ports['direct']}" for ports in self._ports)

    @property
    def mongodb_url(self) -> str:
        """MongoDB, past the proxies where that can be."""
        return self.members[0].url if len(self.members) == 1 else self._set_url

    # ---- processes ----

    def names(self, kind: str) -> list[str]:
        """Give the processes of a kind that belong to the stack at present."""
        return [name for name in self.processes if name.startswith(f"{kind}-")]

    async def add(self, name: str) -> ManagedProcess:
        """Make one more process of the service, named `<kind>-<number>`, and start it."""
        kind = name.partition("-")[0]
        port = self._free_port()
        if kind == "gateway":
            proxy = Proxy(port, name="client-gateway", port=self._free_port())
            await proxy.accept()
            self._client_proxies[name] = proxy
            self.proxies["client-gateway"].append(proxy)
        if kind == "ingestor" and name not in self.disks:
            self.disks[name] = disk = SmallDisk(self.folder / "state" / name, STATE_DISK)
            disk.mount()
        process = make_service(kind, self.folder, name=name, port=port, env=self._env_of(kind, name))
        process.argv = ("env", "-C", str(self.layout.code), *process.argv)  # its packages are found there, first
        self.processes[name] = process
        self.start(name)
        return process

    async def remove(self, name: str) -> None:
        """Stop a process in good order; it belongs to the stack no more."""
        process = self.processes.pop(name)
        self._wanted.discard(name)
        if (proxy := self._client_proxies.pop(name, None)) is not None:
            self.proxies["client-gateway"].remove(proxy)
        await asyncio.to_thread(process.stop)
        if proxy is not None:
            await proxy.close()

    def start(self, name: str) -> None:
        """Start a process of the service, or a server."""
        self.program(name).start()
        self._wanted.add(name)

    def kill(self, name: str) -> None:
        """End it by SIGKILL. It stays down until it is started."""
        self._wanted.discard(name)
        self.program(name).kill()

    def stop(self, name: str, timeout: float = 40) -> int | None:
        """Ask it to end, and wait for that. It stays down until it is started."""
        self._wanted.discard(name)
        return self.program(name).stop(timeout)

    def end(self, name: str) -> None:
        """Ask it to end, and note it if it does that badly. One that has hardly been started knows no better way."""
        program = self.program(name)
        code = self.stop(name)
        began = not isinstance(program, ManagedProcess) or program.has_spoken
        if code != 0 and (began or code != -signal.SIGTERM):
            self.crashes.append(f"{name} was asked to end and did so with exit code {code}")

    def expect_end(self, name: str) -> None:
        """Let it end by itself: it is not started again, nor noted, until it has been started here."""
        self._wanted.discard(name)

    def program(self, name: str) -> Managed:
        """Give a process of the service, or a server, by its name."""
        servers: list[Managed] = [*self.brokers, *self.members]
        return self.processes.get(name) or next(each for each in servers if each.name == name)

    def state_folder(self, ingestor: str) -> Path:
        """Where an ingestor keeps its state."""
        return self.folder / "state" / ingestor

    def set_clock(self, name: str, seconds: float) -> None:
        """Let the wall clock of a process be so far from the right time, from a second on; needs `FAKETIME`."""
        clock = self._clock(name)
        clock.with_suffix(".new").write_text(f"{seconds:+.0f}")
        clock.with_suffix(".new").replace(clock)

    async def run_command(self, *arguments: str, within: float = 240) -> tuple[int, str]:
        """Run `python -m …` as an operator would, past the proxies; give its exit status and what it said.

        Raises:
            TimeoutError: it took longer than `within` seconds, and was killed.
        """
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            cwd=self.layout.code,
            env={**os.environ, **self._env, **self._direct, "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said, _ = await asyncio.wait_for(child.communicate(), within)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            raise
        return child.returncode or 0, said.decode(errors="replace")

    # ---- the block ----

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as exits:
            self._client_proxies: dict[str, Proxy] = {}
            self.proxies = {link: [] for link in self.links}
            self.disks["logs"] = SmallDisk(self.folder / "logs", LOG_DISK)
            exits.push_async_callback(asyncio.to_thread, self._end)
            exits.push_async_callback(self._close_proxies)
            self.disks["logs"].mount()
            for broker in self.brokers:
                broker.disk.mount()
            await self._open_proxies()
            await asyncio.to_thread(self._start_servers)
            for name in self.layout.names:
                await self.add(name)
            for process in self.processes.values():
                await asyncio.to_thread(process.wait_ready)
            watch = asyncio.ensure_future(self._restart_crashed())
            exits.push_async_callback(_cancel, watch)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    @property
    def links(self) -> tuple[str, ...]:
        """The ways that have proxies here."""
        if len(self.members) == 1:
            return LINKS
        return (*(link for link in LINKS if not link.endswith("mongodb")), "any-mongodb")

    @property
    def _set_url(self) -> str:
        return f"mongodb://{','.join(self._addresses)}/?replicaSet={REPLICA_SET}"

    @property
    def _direct(self) -> dict[str, str]:
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap,
            "MONGODB_URL": self.mongodb_url,
            **self._topic_settings,
        }

    @property
    def _topic_settings(self) -> dict[str, str]:
        of_three = {"TOPICS_REPLICATION_FACTOR": "3", "TOPICS_MIN_INSYNC_REPLICAS": "2"}
        return {"TOPICS_PARTITIONS": str(PARTITIONS), **(of_three if len(self.brokers) > 1 else {})}

    def _env_of(self, kind: str, name: str) -> dict[str, str]:
        mongodb = self._set_url
        if len(self.members) == 1 and (proxies := self.proxies.get(f"{kind}-mongodb")):
            mongodb = mongodb_url(proxies[0].port)
        env = {
            "KAFKA_BOOTSTRAP_SERVERS": ",".join(f"{HOST}:{ports[f'{kind}-proxy']}" for ports in self._ports),
            "MONGODB_URL": mongodb,
            "JWT_SECRET": JWT_SECRET,
            "API_KEYS": api_keys_setting({API_KEY: ["*"]}),
            "INGESTOR_STATE_DIR": str(self.state_folder(name)),
            "PYTHONFAULTHANDLER": "1",  # SIGABRT shows where it is
            **self.layout.settings,
        }
        if FAKETIME is not None:
            self._clock(name).parent.mkdir(parents=True, exist_ok=True)
            self.set_clock(name, 0)
            custom = self._clock(name).parent / "sitecustomize.py"
            if not custom.exists():  # written again, a process that starts just then could find it empty
                custom.write_text(_CUSTOM)
            env |= {
                "PYTHONPATH": str(self._clock(name).parent),
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(self._clock(name)),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "DONT_FAKE_MONOTONIC": "1",
                "NO_FAKE_STAT": "1",
            }
        return env

    def _free_port(self) -> int:
        """Find a port that nobody uses, and that is nobody's here: many are not bound yet, or not all the time."""
        while (port := free_port()) in self._taken:
            pass
        self._taken.add(port)
        return port

    def _clock(self, name: str) -> Path:
        return self.folder / "clocks" / name

    async def _open_proxies(self) -> None:
        for number, ports in enumerate(self._ports):
            for kind in SERVICES:
                proxy = Proxy(ports[kind], name=f"{kind}-kafka-{number + 1}", port=ports[f"{kind}-proxy"])
                self.proxies[f"{kind}-kafka"].append(proxy)
        for member, address in zip(self.members, self._addresses, strict=True):
            assert member.port is not None
            if len(self.members) > 1:
                port = int(address.rpartition(":")[2])
                self.proxies["any-mongodb"].append(Proxy(member.port, name=f"any-{member.name}", port=port))
                continue
            for kind in ("gateway", "projector"):
                self.proxies[f"{kind}-mongodb"].append(
                    Proxy(member.port, name=f"{kind}-{member.name}", port=self._free_port())
                )
        for proxies in self.proxies.values():
            for proxy in proxies:
                await proxy.accept()

    async def _close_proxies(self) -> None:
        for proxies in self.proxies.values():
            for proxy in proxies:
                await proxy.close()

    def _start_servers(self) -> None:
        servers: list[Managed] = [*self.brokers, *self.members]
        for server in servers:
            self.start(server.name)
        for server in servers:
            server.wait_ready(90)
        if len(self.members) > 1:
            self._initiate()
        topics = make_service("topics", self.folder, env=self._direct)
        topics.argv = ("env", "-C", str(self.layout.code), *topics.argv)
        topics.start()
        if topics.wait(90) != 0:
            raise RuntimeError(f"the topics were not created:\n{topics.log_tail()}")

    def _initiate(self) -> None:
        members = [{"_id": number, "host": address} for number, address in enumerate(self._addresses)]
        settings = {"electionTimeoutMillis": 3000, "heartbeatIntervalMillis": 500}
        self.members[0].command("replSetInitiate", {"_id": REPLICA_SET, "members": members, "settings": settings})
        with MongoClient[dict[str, Any]](self._set_url, serverSelectionTimeoutMS=60_000) as client:
            client.admin.command("ping")

    def _end(self) -> None:
        self._wanted.clear()
        for process in self.processes.values():
            process.resume()
            process.kill()
        for server in (*self.members, *self.brokers):
            server.kill()
        self.disks["logs"].free()
        kept = self.folder / "kept-logs"  # they must outlive the disk
        kept.mkdir(exist_ok=True)
        for log in self.folder.glob("**/logs/*.log*"):
            owner = log.parent.parent  # of a server's log, the folder is named after it: they are all alike
            shutil.copyfile(log, kept / (log.name if owner == self.folder else f"{owner.name}.log"))
        for disk in (*self.disks.values(), *(broker.disk for broker in self.brokers)):
            disk.unmount()

    async def _restart_crashed(self) -> None:
        """Do what the supervisor of any real deployment does."""
        while True:
            await asyncio.sleep(0.25)
            for name in [*self._wanted]:
                program = self.program(name)
                if not program.running and name in self._wanted:
                    self.crashes.append(
                        f"{name} ended by itself with exit code {program.exit_code}: {_last_words(program)}"
                    )
                    await asyncio.sleep(0.5)
                    with contextlib.suppress(KeyError, StopIteration):
                        self.start(name)


def _last_words(program: Managed) -> str:
    return " | ".join(line[:200] for line in program.log_tail(3).splitlines())


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


@contextlib.asynccontextmanager
async def chaos_stack(folder: Path, layout: Layout | None = None) -> AsyncIterator[ChaosStack]:
    """Run a stack in a folder; what it starts is ended even if this process is killed. The folder stays."""
    watch = [sys.executable, "-c", _SURVIVORS, str(folder)]
    with subprocess.Popen(watch, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True):  # noqa: ASYNC220 - at once over
        async with ChaosStack(folder, layout) as stack:
            yield stack


_SURVIVORS = """
import subprocess, sys
from pathlib import Path
from local import survivors
folder = sys.argv[1]
sys.stdin.read()
survivors.end(survivors.find(Path(folder)), grace=0)
for mount in Path("/proc/mounts").read_text().splitlines():
    if mount.startswith(f"episodes-chaos {folder}/"):
        subprocess.run(["umount", "-l", mount.split()[1]])
"""
