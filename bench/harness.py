"""What every row of the bench is made of: samples taken in turns, their spread, CPU seconds, targets, the machine."""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from pymongo import MongoClient

from local.prerequisites import kafka_jars
from local.process import ROOT
from local.servers import KAFKA_HEAP
from tests.cluster import ThrowAwayServers

CACHE = ROOT / ".local" / "bench"
"""Where peers and generators are put that are fetched once."""

_NEVER = str(2**63 - 1)
_LIBRARIES = (
    "aiokafka",
    "fastapi",
    "httptools",
    "lmdb",
    "motor",
    "msgspec",
    "pymongo",
    "starlette",
    "uvicorn",
    "uvloop",
)


class LeftOutError(Exception):
    """Something to compare with cannot be had here; the message is the sentence that says why."""


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    rounds: int = 5
    quick: bool = False
    """Tiny numbers: only to see that all of it runs."""

    def either(self, full: float, quick: float) -> float:
        """The number for this run."""
        return quick if self.quick else full

    def count(self, full: int, quick: int) -> int:
        """The whole number for this run."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Latency:
    """Seconds."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Sample:
    """One candidate in one round."""

    rate: float
    """Operations, or events, a second."""
    cpu: float | None = None
    """CPU seconds per 1,000 operations, of all processes of the service under test; not Kafka, MongoDB, the load."""
    latency: Latency | None = None
    """From an open-loop generator where latency is the claim."""
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """What several rounds gave."""

    median: float
    min: float
    max: float

    def text(self, form: str = ",.0f") -> str:
        """The median, with the least and the most where they differ."""
        if self.min == self.max:
            return f"{self.median:{form}}"
        return f"{self.median:{form}} ({self.min:{form}} to {self.max:{form}})"


@dataclass(frozen=True)
class Target:
    """One claim, and what came of it."""

    number: str
    """As in the list of targets; a letter follows where one has several parts: 3b."""
    what: str
    target: str
    measured: str
    met: bool


@dataclass(frozen=True)
class RowResult:
    """What one row of the bench found."""

    targets: list[Target]
    samples: dict[str, list[Sample]]
    """Candidate → its samples in the order of the rounds."""
    notes: list[str] = field(default_factory=list)
    configuration: dict[str, str] = field(default_factory=dict)
    """Candidate → how it was configured, in a sentence or as its settings."""
    unit: str = "operations"
    """What `Sample.rate` counts. A candidate that counts something else says so in its name."""


Row = Callable[[Options], Awaitable[RowResult]]
Candidate = Callable[[], Awaitable[Sample]]
Key = str | Callable[[Sample], float | None]
"""``rate``, ``cpu``, ``p50``, ``p95``, ``p99``, ``max``, a name in `Sample.extra`, or a function."""


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{datetime.now().astimezone():%H:%M:%S} {text}", flush=True)


async def interleave(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, list[Sample]]:
    """Take samples in turns, A B C, A B C, …, and print a line for each. One at a time."""
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for number in range(1, rounds + 1):
        for name, candidate in candidates.items():
            sample = await candidate()
            samples[name].append(sample)
            say(f"  {number}/{rounds} {name}: {_line(sample)}")
    return samples


def median_of(samples: Iterable[Sample], key: Key = "rate") -> Spread:
    """The median, the least and the most. Samples without the value are passed over.

    Raises:
        ValueError: no sample has the value.
    """
    return spread(value for sample in samples if (value := value_of(sample, key)) is not None)


def ratio_of(ours: Sequence[Sample], theirs: Sequence[Sample], key: Key = "rate") -> Spread:
    """Ours divided by theirs, round by round: what slows a whole round down does not count."""
    pairs = ((value_of(a, key), value_of(b, key)) for a, b in zip(ours, theirs, strict=True))
    return spread(a / b for a, b in pairs if a is not None and b)


def spread(values: Iterable[float]) -> Spread:
    """The median, the least and the most of some numbers.

    Raises:
        ValueError: there is none.
    """
    listed = [*values]
    if not listed:
        raise ValueError("there is nothing to take the median of")
    return Spread(statistics.median(listed), min(listed), max(listed))


def value_of(sample: Sample, key: Key) -> float | None:
    """One number of a sample, or `None` if it has no such number."""
    if not isinstance(key, str):
        return key(sample)
    if key in {"rate", "cpu"}:
        return sample.rate if key == "rate" else sample.cpu
    if key in {"p50", "p95", "p99", "max"}:
        return None if sample.latency is None else float(getattr(sample.latency, key))
    return sample.extra.get(key)


def latency_of(seconds: Sequence[float]) -> Latency:
    """The percentiles of single measurements."""
    ordered = sorted(seconds)

    def part(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Latency(part(0.5), part(0.95), part(0.99), ordered[-1])


def cpu_seconds(pids: Iterable[int]) -> float:
    """What processes and their children have used so far, user and system."""
    used = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    used += times.user + times.system
    return used


@dataclass
class Measured:
    """What a block took."""

    seconds: float = 0.0
    cpu: float = 0.0
    """CPU seconds of the processes."""


@contextlib.contextmanager
def measured(pids: Iterable[int] = ()) -> Iterator[Measured]:
    """Measure a block: its length, and the CPU seconds of processes that live throughout."""
    watched = [*pids]
    result = Measured()
    cpu, began = cpu_seconds(watched), time.perf_counter()
    yield result
    result.seconds = time.perf_counter() - began
    result.cpu = cpu_seconds(watched) - cpu


def host() -> dict[str, Any]:
    """The machine and the software on it, and how busy it is."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "java": _first_line("java", "-version"),
        "node": _first_line("node", "--version"),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


async def environment(servers: ThrowAwayServers | None = None) -> dict[str, Any]:
    """The machine, and what the servers say of their versions and of when they flush to disk."""
    found = host()
    if servers is not None:
        found["kafka"] = {"version": _kafka_version(), **await _kafka_settings(servers.kafka_bootstrap)}
        found["mongodb"] = await asyncio.to_thread(_mongodb_settings, servers.mongodb_url)
    return found


def as_json(value: object) -> Any:
    """Dataclasses as plain objects, for `json`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _line(sample: Sample) -> str:
    parts = [f"{sample.rate:,.0f}/s"]
    if sample.cpu is not None:
        parts.append(f"{sample.cpu:.3f} CPU s per 1,000")
    if (it := sample.latency) is not None:
        parts.append("ms p50 {:.1f} p95 {:.1f} p99 {:.1f} max {:.1f}".format(*(1e3 * s for s in _times(it))))
    parts += [f"{name} {value:,.4g}" for name, value in sample.extra.items()]
    return ", ".join(parts)


def _times(latency: Latency) -> tuple[float, float, float, float]:
    return latency.p50, latency.p95, latency.p99, latency.max


def _commit() -> str:
    git = ("git", "-C", str(ROOT))
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/benchmarks")
    return _first_line(*git, "rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def _first_line(*argv: str) -> str:
    return (_output(*argv).splitlines() or ["none"])[0]


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout or done.stderr  # Java tells its version on the second


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        if named := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return named[1]
    return platform.processor() or platform.machine()


def _kafka_version() -> str:
    jar = next(kafka_jars().glob("kafka_2.13-*.jar"), None)
    return "unknown" if jar is None else jar.stem.removeprefix("kafka_2.13-")


async def _kafka_settings(bootstrap: str) -> dict[str, str]:
    wanted = ("log.flush.interval.messages", "log.flush.interval.ms", "log.flush.scheduler.interval.ms")
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        broker = str((await admin.describe_cluster())["brokers"][0]["node_id"])
        [answer] = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, broker)])
    finally:
        await admin.close()
    given = {entry[0]: entry[1] for resource in answer.resources for entry in resource[-1]}
    by_itself = given.get(wanted[0]) != _NEVER or given.get(wanted[1]) is not None
    fsync = "as these settings say" if by_itself else "left to the operating system (Kafka's default)"
    return {"fsync": fsync, **{name: str(given.get(name)) for name in wanted}, "heap": KAFKA_HEAP, "brokers": "1"}


def _mongodb_settings(url: str) -> dict[str, Any]:
    with MongoClient[dict[str, Any]](url) as client:
        status = client.admin.command("serverStatus")
        concern = client.admin.command("getDefaultRWConcern").get("defaultWriteConcern", {})
        options = client.admin.command("getCmdLineOpts")["parsed"].get("storage", {})
        members = client.admin.command("replSetGetConfig")["config"]
    return {
        "version": status["version"],
        "storage_engine": status["storageEngine"]["name"],
        "journal": bool(status["storageEngine"]["persistent"]),
        "default_write_concern": {key: concern[key] for key in ("w", "j", "wtimeout") if key in concern},
        "w_majority_waits_for_the_journal": members["writeConcernMajorityJournalDefault"],
        "cache_gb": options.get("wiredTiger", {}).get("engineConfig", {}).get("cacheSizeGB"),
        "members": len(members["members"]),
    }


if __name__ == "__main__":
    sys.exit("This is a part of `python -m bench`.")
