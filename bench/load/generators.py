"""Load from compiled generators: wrk for callers who wait for their answers, vegeta for so many requests a second.

wrk is a closed loop: it tells how much is done. vegeta is an open one: it begins a request when its time has come,
whatever became of those before, so what it tells of waiting is not flattered by a service that stalls. Both run on the
machine that is measured; `Load.generator_cores` says how much of it they took.
"""

import asyncio
import base64
import functools
import hashlib
import itertools
import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.harness import CACHE, Latency, LeftOutError, say

HERE = Path(__file__).parent
COUNTER = "@" * 12
"""In a body: becomes another number in each request."""
_NUMBERS = itertools.count(1)
_NUMBERS_A_RUN = 10_000_000


@dataclass(frozen=True)
class Request:
    """What is sent."""

    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """With a body it is a POST of JSON, without one a GET."""

    @property
    def method(self) -> str:
        """The HTTP method."""
        return "GET" if self.body is None else "POST"

    @property
    def all_headers(self) -> dict[str, str]:
        """The headers, with the type of the body."""
        return {**self.headers, **({} if self.body is None else {"Content-Type": "application/json"})}


@dataclass(frozen=True)
class Load:
    """What a generator saw."""

    rate: float
    """Good answers a second."""
    latency: Latency
    refused: float
    """The share of requests that got no 2xx, or no answer."""
    generator_cores: float
    """Cores that the generator itself used, on average."""


def need_wrk() -> str:
    """The command of wrk.

    Raises:
        LeftOutError: there is none.
    """
    found = shutil.which("wrk")
    if found is None:
        raise LeftOutError("wrk is not installed (Debian: apt-get install wrk)")
    return found


@functools.cache
def need_vegeta() -> str:
    """The command of vegeta, built the first time from the versions in go.mod.

    Raises:
        LeftOutError: Go is missing, or it cannot be built.
    """
    digest = hashlib.sha256((HERE / "go.sum").read_bytes()).hexdigest()[:12]
    binary = CACHE / f"vegeta-{digest}"
    if not binary.exists():
        go = shutil.which("go")
        if go is None:
            raise LeftOutError("vegeta is built with Go 1.24 or newer, and there is no `go` on the PATH")
        say("building vegeta")
        CACHE.mkdir(parents=True, exist_ok=True)
        argv = [go, "build", "-mod=readonly", "-o", str(binary), "github.com/tsenart/vegeta/v12"]
        done = subprocess.run(argv, cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LeftOutError(f"vegeta cannot be built: {done.stderr.strip()[-300:]}")
    return str(binary)


async def closed_loop(url: str, requests: Sequence[Request], *, callers: int, seconds: float) -> Load:
    """Let so many callers ask, each again once it has its answer, for so long."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requests")
        await asyncio.to_thread(_write_raw, file, url, requests)
        first = str(next(_NUMBERS) * _NUMBERS_A_RUN)
        argv = [need_wrk(), "-t1", f"-c{callers}", f"-d{max(1, round(seconds))}s", "--timeout", "20s"]
        argv += ["-s", str(HERE / "wrk.lua"), url, str(file), first]
        output, cpu = await _run(argv)
    told = json.loads(output.splitlines()[-1])
    took = told["microseconds"] / 1e6
    asked, bad = told["requests"], told["refused"] + told["broken"]
    latency = Latency(*(told[part] / 1e6 for part in ("p50", "p95", "p99", "max")))
    return Load((asked - told["refused"]) / took, latency, bad / max(1, asked), cpu / took)


async def open_loop(url: str, requests: Sequence[Request], *, rate: float, seconds: float) -> Load:
    """Begin so many requests a second, for so long."""
    with tempfile.TemporaryDirectory() as folder:
        targets, results = Path(folder, "targets"), Path(folder, "results")
        await asyncio.to_thread(write_targets, targets, url, requests, round(rate * seconds))
        argv = [need_vegeta(), "attack", "-format=json", f"-targets={targets}", f"-output={results}"]
        argv += [f"-rate={round(rate * 10)}/10s", f"-duration={seconds}s", "-timeout=20s", "-max-body=0"]
        _, cpu = await _run(argv)
        output, _ = await _run([need_vegeta(), "report", "-type=json", str(results)])
    told = json.loads(output)
    good = sum(number for code, number in told["status_codes"].items() if code.startswith("2"))
    latency = Latency(*(told["latencies"][part] / 1e9 for part in ("50th", "95th", "99th", "max")))
    took = (told["duration"] + told["wait"]) / 1e9
    return Load(good / took, latency, 1 - good / told["requests"], cpu / took)


def _write_raw(file: Path, url: str, requests: Iterable[Request]) -> None:
    host = url.removeprefix("http://")
    with file.open("wb") as out:
        for request in requests:
            headers = {"Host": host, **request.all_headers}
            if request.body is not None:
                headers["Content-Length"] = str(len(request.body))
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            raw = f"{request.method} {request.path} HTTP/1.1\r\n{head}\r\n".encode() + (request.body or b"")
            out.write(b"%d\n" % len(raw) + raw)


def write_targets(file: Path, url: str, requests: Sequence[Request], most: int) -> None:
    # vegeta begins again at the first once it has sent them all: as many as there are is enough if none counts up.
    counts_up = any(request.body and COUNTER.encode() in request.body for request in requests)
    number = next(_NUMBERS) * _NUMBERS_A_RUN
    with file.open("w") as out:
        for request in itertools.islice(itertools.cycle(requests), max(1, most) if counts_up else len(requests)):
            number += 1
            target: dict[str, object] = {"method": request.method, "url": url + request.path}
            target["header"] = {name: [value] for name, value in request.all_headers.items()}
            if request.body is not None:
                body = request.body.replace(COUNTER.encode(), b"%012d" % number)
                target["body"] = base64.b64encode(body).decode()
            out.write(json.dumps(target) + "\n")


async def _run(argv: Sequence[str]) -> tuple[str, float]:
    """What a command prints, and its CPU seconds."""
    before = _cpu_of_ended_children()
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        printed, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(
            f"{argv[0]} ended with {process.returncode}: {complaint.decode()[-500:]}{printed.decode()[-500:]}"
        )
    return printed.decode(), _cpu_of_ended_children() - before


def _cpu_of_ended_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
