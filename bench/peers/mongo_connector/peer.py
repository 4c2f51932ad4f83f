"""MongoDB's Kafka sink connector: its jars by Maven, a standalone Connect worker, and one connector on it a run."""

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from pymongo import MongoClient

from bench.harness import CACHE, LeftOutError
from bench.peers.installing import run_installer
from local.prerequisites import MissingPrerequisiteError, find_java
from local.process import ROOT, tail
from local.servers import HOST, free_port

HERE = Path(__file__).parent
SINK: dict[str, str] = json.loads((HERE / "sink.json").read_text())
CONFIGURATION = (
    "mongo-kafka-connect 2.0.1 on connect-runtime 4.3.1, one standalone worker (-Xmx1g) that stays up over all rounds, "
    "connection.uri with w=majority and journal=true; " + ", ".join(f"{name}={value}" for name, value in SINK.items())
)
_READY_SECONDS = 90.0
_PROJECT_SECONDS = 300.0
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Measured:
    """Documents, seconds and CPU seconds of the worker, from its first visible write to its last."""

    records: int
    seconds: float
    cpu: float


def install() -> Path:
    """Give the folder of the jars; the first time, Maven fetches them (some 70 files, 41 MB).

    Raises:
        LeftOutError: they cannot be fetched here.
    """
    pom = HERE / "pom.xml"
    jars = CACHE / "mongo_connector" / hashlib.sha256(pom.read_bytes()).hexdigest()[:12]
    if not (jars / "complete").exists():
        copy = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        run_installer("mongo_connector", ["mvn", "-q", "-B", "-f", str(pom), *copy])
        (jars / "complete").touch()
    return jars


@dataclass(frozen=True)
class Worker:
    """A Connect worker that answers."""

    url: str
    pid: int
    mongodb_url: str
    log: Path

    async def project(self, topic: str, database: str, collection: str, records: int, *, last_key: str) -> Measured:
        """Read all records of the topic into the collection, until the document ``last_key`` is there.

        The start of the connector is not in the time: it begins with the first documents that are seen, and they do
        not count.

        Raises:
            LeftOutError: it failed, or took too long.
        """
        name = f"sink-{uuid.uuid4()}"
        uri = f"{self.mongodb_url}{'&' if '?' in self.mongodb_url else '?'}w=majority&journal=true"
        place = {"connection.uri": uri, "topics": topic, "database": database, "collection": collection}
        async with httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False) as worker:
            made = await worker.post("/connectors", json={"name": name, "config": {**SINK, **place}})
            if not made.is_success:
                raise LeftOutError(f"the Connect worker refuses the connector: {made.text}")
            try:
                return await asyncio.to_thread(self._watch, database, collection, records, last_key)
            finally:
                await worker.delete(f"/connectors/{name}")

    def _watch(self, database: str, collection: str, records: int, last_key: str) -> Measured:
        process, deadline = psutil.Process(self.pid), time.monotonic() + _PROJECT_SECONDS
        with MongoClient[dict[str, Any]](self.mongodb_url, readConcernLevel="majority") as client:
            documents = client[database][collection]
            while not (before := documents.estimated_document_count()):
                self._wait(deadline)
            began, cpu = time.perf_counter(), _cpu(process)
            while documents.find_one({"_id": last_key}) is None:
                self._wait(deadline)
            return Measured(records - before, time.perf_counter() - began, _cpu(process) - cpu)

    def _wait(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise LeftOutError(f"the connector is not done after {_PROJECT_SECONDS:.0f} s:\n{tail(self.log, 5)}")
        time.sleep(_POLL_SECONDS)


@asynccontextmanager
async def open_worker(jars: Path, bootstrap: str, mongodb_url: str, folder: Path) -> AsyncIterator[Worker]:
    """A worker for the length of the block, with its files in the folder.

    Raises:
        LeftOutError: it does not come up.
    """
    try:
        java = find_java()
    except MissingPrerequisiteError as error:
        raise LeftOutError(str(error)) from error
    url, properties, log = f"http://{HOST}:{free_port()}", folder / "worker.properties", folder / "connect.log"
    settings = {
        "bootstrap.servers": bootstrap,
        "listeners": url,
        "key.converter": "org.apache.kafka.connect.storage.StringConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "offset.storage.file.filename": str(folder / "connect.offsets"),
        "plugin.discovery": "only_scan",
        "plugin.path": str(jars.parent),
    }
    properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    logging = f"-Dlog4j2.configurationFile={ROOT / 'local' / 'kafka' / 'log4j2.properties'}"
    command = [java, "-Xmx1g", logging, "-cp", f"{jars}/*", "org.apache.kafka.connect.cli.ConnectStandalone"]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, str(properties), stdout=output, stderr=asyncio.subprocess.STDOUT, cwd=folder
        )
    try:
        await _answers(process, url, log)
        yield Worker(url, process.pid, mongodb_url, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
        while True:
            try:
                if (await http.get(f"{url}/connectors")).is_success:
                    return
            except httpx.HTTPError:
                pass
            if process.returncode is not None or time.monotonic() > deadline:
                raise LeftOutError(f"the Connect worker does not come up:\n{tail(log, 10)}")
            await asyncio.sleep(0.1)


def _cpu(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)
