"""What load is put on: our three processes, the bare relay, and the peers, all on the same Kafka and MongoDB."""

import asyncio
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import httpx
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.floors import relay
from bench.harness import CACHE, LeftOutError, Sample, cpu_seconds, say
from bench.load.bodies import batch, single
from bench.load.generators import Request, closed_loop, open_loop
from bench.peers.installing import run_installer
from local.process import OWNER, ManagedProcess
from local.servers import free_port
from shared.topics import REPLY_PARTITIONS, TopicSettings
from tests.cluster import Cluster, ThrowAwayServers, throw_away_cluster, throw_away_servers, wait_until

STREAMS = 16
"""So many namespaces, or tenants, are written to, over all partitions."""
PARTITIONS = TopicSettings().partitions
BATCH_BODIES_BYTES = 8 * 1024 * 1024
NESTJS = Path(__file__).parent / "peers" / "nestjs"
_PROJECTED_SECONDS = 300.0


async def nothing_to_wait_for() -> None:
    pass


@dataclass(frozen=True)
class Service:
    """Something that takes writes."""

    name: str
    url: str
    processes: Sequence[ManagedProcess]
    singles: Sequence[Request]
    """Writes of one episode each, with a new name each time."""
    batches: Callable[[int], Sequence[Request]]
    """Writes of so many episodes each."""
    settle: Callable[[], Awaitable[None]] = nothing_to_wait_for
    """Waits until what was written can be read."""
    configuration: str = ""

    @property
    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [pid for process in self.processes if (pid := process.pid) is not None]

    def cpu(self) -> dict[str, float]:
        """Process → CPU seconds so far."""
        return {process.name: cpu_seconds([process.pid or 0]) for process in self.processes}


@dataclass(frozen=True)
class Bench:
    """Servers with our processes on them, and whatever else is started there."""

    servers: ThrowAwayServers
    cluster: Cluster
    started: list[ManagedProcess] = field(default_factory=list)

    def start(
        self, name: str, argv: Sequence[str], env: Mapping[str, str], *, port: int | None = None
    ) -> ManagedProcess:
        """Start a process that ends with the bench."""
        process = ManagedProcess(
            name,
            argv,
            env={OWNER: str(self.servers.folder), "PYTHONUNBUFFERED": "1", **env},
            log=self.servers.folder / "logs" / f"{name}.log",
            port=port,
            probe=None if port is None else f"http://127.0.0.1:{port}/healthz",
        )
        self.started.append(process)
        process.start()
        return process


@contextlib.contextmanager
def running() -> Iterator[Bench]:
    """Run servers and our three processes for the length of the block."""
    with throw_away_servers() as servers, throw_away_cluster(servers) as cluster:
        bench = Bench(servers, cluster)
        try:
            yield bench
        finally:
            for process in bench.started:
                process.stop()


def ours(bench: Bench) -> Service:
    """Gateway, ingestor and projector, one process each, with authentication."""
    cluster = bench.cluster
    users, tenants = _users(), _tenants()
    headers = {user: {"Authorization": f"Bearer {cluster.token(user)}"} for user in users}
    key = {"Authorization": f"Bearer {cluster.api_key}"}

    async def settle() -> None:
        """Write once more to each stream, and wait until that can be read."""
        asked = [Request(_path(user), headers[user], b'{"name":"last"}') for user in users]
        asked += [Request("/v1/episodes", key, batch(0, 1, tenant)) for tenant in tenants]
        await wait_projected(cluster.url, asked)

    return Service(
        "ours",
        cluster.url,
        [*cluster.processes.values()],
        [Request(_path(user), headers[user], single(number)) for number, user in enumerate(users)],
        lambda items: [Request("/v1/episodes", key, body) for _, body in _batches(items)],
        settle,
        f"one gateway, ingestor and projector; {PARTITIONS} partitions, {STREAMS} streams; JWT and API keys checked",
    )


async def wait_projected(url: str, requests: Sequence[Request]) -> float:
    """Send each until it says that it can be read; seconds until the last one did.

    Raises:
        TimeoutError: the projector does not get there.
    """

    async def send(http: httpx.AsyncClient, request: Request) -> None:
        while True:
            answer = await http.post(
                request.path, params={"wait": "projected"}, content=request.body, headers=request.all_headers
            )
            if answer.is_success and answer.headers["X-Projected"] == "true":
                return
            if not answer.is_success:
                await asyncio.sleep(0.2)  # too busy

    began = time.perf_counter()
    limits = httpx.Limits(max_connections=2 * STREAMS)
    async with (
        asyncio.timeout(_PROJECTED_SECONDS),
        httpx.AsyncClient(base_url=url, timeout=30, trust_env=False, limits=limits) as http,
        asyncio.TaskGroup() as tasks,
    ):
        for request in requests:
            tasks.create_task(send(http, request))
    return time.perf_counter() - began


async def bare_relay(bench: Bench, *, split: bool = False) -> Service:
    """The floor: `bench.floors.relay`, one gateway and one relay process."""
    kafka, port = bench.servers.kafka_bootstrap, free_port()
    names = (
        (relay.SPLIT_COMMANDS, relay.SPLIT_EVENTS, relay.SPLIT_REPLIES)
        if split
        else (relay.COMMANDS, relay.EVENTS, relay.REPLIES)
    )
    await make_topics(kafka, dict(zip(names, (PARTITIONS, PARTITIONS, REPLY_PARTITIONS), strict=True)))
    name = "split-relay" if split else "bare-relay"
    script = [sys.executable, "-m", "bench.floors.relay"]
    options = ["--bootstrap", kafka, *(["--split"] if split else [])]
    behind = bench.start(f"{name}-behind", [*script, "relay", *options], {})
    front = bench.start(f"{name}-front", [*script, "gateway", "--port", str(port), *options], {}, port=port)
    front.wait_ready()
    await asyncio.to_thread(wait_until, lambda: "ready" in behind.log_tail())
    return Service(
        "relay, one record an event" if split else "bare relay",
        f"http://127.0.0.1:{port}",
        [front, behind],
        [Request(f"/{user}", {}, single(number)) for number, user in enumerate(_users())],
        lambda items: [Request(f"/{tenant}", {}, body) for tenant, body in _batches(items)],
        configuration="bench/floors/relay.py; the same partitions, acks=all, idempotent producers, batches to 900 kB",
    )


async def nestjs(bench: Bench) -> Service:
    """The peer for single writes: a NestJS gateway and a service that answers.

    Raises:
        LeftOutError: npm cannot install it here.
    """
    folder = await asyncio.to_thread(_installed_nestjs)
    kafka, port = bench.servers.kafka_bootstrap, free_port()
    await make_topics(kafka, {"nestjs.episodes": PARTITIONS, "nestjs.episodes.reply": PARTITIONS})
    env = {"BROKER": kafka, "PORT": str(port), "NODE_ENV": "production", "KAFKAJS_NO_PARTITIONER_WARNING": "1"}
    behind = bench.start("nestjs-service", ["node", str(folder / "dist" / "service.js")], env)
    front = bench.start("nestjs-gateway", ["node", str(folder / "dist" / "gateway.js")], env, port=port)
    front.wait_ready()
    service = Service(
        "NestJS",
        f"http://127.0.0.1:{port}",
        [front, behind],
        [Request(_path(user), {}, single(number)) for number, user in enumerate(_users())],
        lambda _: [],
        configuration=(
            f"{_versions(folder)}; ClientKafka.send on Fastify, @MessagePattern in a service of its own (bench/peers/"
            "nestjs); its documentation's defaults, so acks=all; NODE_ENV=production; no authentication or validation, "
            "nothing recorded but question and answer"
        ),
    )
    await _answers(service)
    return service


async def crud(bench: Bench) -> Service:
    """The peer without a log: FastAPI and Motor, straight into MongoDB."""
    port = free_port()
    env = {
        "MONGODB_URL": bench.servers.mongodb_url,
        "JWT_SECRET": bench.cluster.jwt_secret,
        "API_KEY": bench.cluster.api_key,
    }
    argv = [sys.executable, "-m", "uvicorn", "bench.peers.crud.app:app", "--port", str(port), "--no-access-log"]
    process = bench.start("crud", [*argv, "--log-level", "warning"], env, port=port)
    process.wait_ready()
    key = {"Authorization": f"Bearer {bench.cluster.api_key}"}
    return Service(
        "CRUD peer",
        f"http://127.0.0.1:{port}",
        [process],
        [
            Request(_path(user), {"Authorization": f"Bearer {bench.cluster.token(user)}"}, single(number))
            for number, user in enumerate(_users())
        ],
        lambda items: [Request("/v1/episodes", key, body) for _, body in _batches(items)],
        configuration=(
            "bench/peers/crud: FastAPI with pydantic models, Motor, uvicorn with uvloop and httptools, one process; "
            "the same authentication and indexes; w: majority, j: true; insert_many for batches, an upsert for the rest"
        ),
    )


async def make_topics(bootstrap: str, partitions: Mapping[str, int]) -> None:
    """Create topics of one replica."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, number, 1) for name, number in partitions.items()])
    finally:
        await admin.close()


async def sample_writes(
    service: Service,
    requests: Sequence[Request],
    *,
    callers: int,
    seconds: float,
    events: int = 1,
    open_rate: float | None = None,
) -> Sample:
    """Throughput from a closed loop; latency from an open one if its rate is given; CPU until all can be read.

    ``events`` are in each request, and are what the sample counts.
    """
    before = service.cpu()
    load = await closed_loop(service.url, requests, callers=callers, seconds=seconds)
    began = time.perf_counter()
    await service.settle()
    settled = time.perf_counter() - began
    used = {name: cpu - before[name] for name, cpu in service.cpu().items()}
    done = load.rate * max(1, round(seconds)) * events
    extra = {"closed_p50_ms": load.latency.p50 * 1e3, "closed_p99_ms": load.latency.p99 * 1e3}
    extra |= {"generator_cores": load.generator_cores, "refused": load.refused}
    if service.settle is not nothing_to_wait_for:
        extra["readable_after_s"] = settled
        extra |= {f"cpu_{name}": cpu / done * 1_000 for name, cpu in used.items() if done}
    latency = None
    if open_rate is not None:
        opened = await open_loop(service.url, requests, rate=open_rate, seconds=seconds)
        latency = opened.latency
        extra |= {"open_rate": open_rate, "open_refused": opened.refused}
        await service.settle()
    return Sample(load.rate * events, sum(used.values()) / done * 1_000 if done else None, latency, extra)


async def _answers(service: Service) -> None:
    """Wait until a write is answered: consumers join their groups in their own time."""
    request = service.singles[0]
    async with asyncio.timeout(60), httpx.AsyncClient(base_url=service.url, timeout=3, trust_env=False) as http:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await http.post(request.path, content=request.body, headers=request.all_headers)
                if answer.status_code == HTTPStatus.CREATED:
                    return
            await asyncio.sleep(0.2)


def _installed_nestjs() -> Path:
    """Where it is installed and compiled."""
    folder = CACHE / "nestjs"
    lock = NESTJS / "package-lock.json"
    done = folder / "dist" / "service.js"
    if done.exists() and (folder / lock.name).read_bytes() == lock.read_bytes() and not _changed(folder):
        return folder
    if shutil.which("node") is None:
        raise LeftOutError("NestJS: there is no `node` on this machine")
    say("installing NestJS with npm")
    shutil.copytree(NESTJS, folder, dirs_exist_ok=True)
    run_installer("NestJS", ["npm", "--prefix", str(folder), "ci", "--no-audit", "--no-fund"])
    run_installer("NestJS", ["npm", "--prefix", str(folder), "run", "build"])
    return folder


def _changed(folder: Path) -> bool:
    sources = (source.relative_to(NESTJS) for source in (NESTJS / "src").iterdir())
    return any(
        not (folder / name).exists() or (folder / name).read_bytes() != (NESTJS / name).read_bytes() for name in sources
    )


def _versions(folder: Path) -> str:
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    named = ("@nestjs/core", "@nestjs/microservices", "@nestjs/platform-fastify", "kafkajs")
    return ", ".join(f"{name} {packages[f'node_modules/{name}']['version']}" for name in named)


def _users() -> list[str]:
    return [f"user-{number}" for number in range(STREAMS)]


def _tenants() -> list[str]:
    return [f"tenant-{number}" for number in range(STREAMS)]


def _path(user: str) -> str:
    return f"/namespaces/{user}/projects/robotics/episodes"


def _batches(items: int) -> list[tuple[str, bytes]]:
    """Tenants and bodies: each tenant as often as another."""
    rounds = max(1, BATCH_BODIES_BYTES // (STREAMS * items * 500))
    return [
        (tenant, batch(STREAMS * number + index, items, tenant))
        for number in range(rounds)
        for index, tenant in enumerate(_tenants())
    ]
