"""Quix Streams' MongoDBSink: its installation by pip, and one run of it as a process of its own."""

import asyncio
import hashlib
import json
import shutil
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.harness import CACHE, LeftOutError
from bench.peers.installing import run_installer

HERE = Path(__file__).parent
COMMIT_EVERY = 5_000
CONFIGURATION = (
    f"quixstreams 3.28.1, one process; Application(commit_every={COMMIT_EVERY}, processing_guarantee='at-least-once'), "
    "JSON deserializer; MongoDBSink(update_method='UpdateOne', upsert=True, default matcher on _id = Kafka key, "
    "w='majority', journal=True): one ordered bulk_write of upserts per commit"
)


@dataclass(frozen=True)
class Measured:
    """Seconds, and CPU seconds of the peer's process, from the first record to the end of the last write."""

    seconds: float
    cpu: float


def install() -> Path:
    """Give the Python of the peer's own environment; the first time, pip fills it.

    Raises:
        LeftOutError: it cannot be installed here.
    """
    pins = HERE / "requirements.txt"
    place = CACHE / "quix" / hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        shutil.rmtree(place, ignore_errors=True)
        run_installer("quix", [sys.executable, "-m", "venv", str(place)])
        run_installer("quix", [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(pins)])
        (place / "complete").touch()
    return python


async def project(
    python: Path, bootstrap: str, mongodb_url: str, topic: str, database: str, collection: str, records: int
) -> Measured:
    """Read all records of the topic under a new group into the collection.

    Raises:
        LeftOutError: the peer ended with an error, told with its last words.
    """
    mongodb = urlsplit(mongodb_url)
    settings = {
        "bootstrap": bootstrap,
        "topic": topic,
        "group": f"quix-{uuid.uuid4()}",
        "mongo-host": mongodb.hostname,
        "mongo-port": mongodb.port,
        "database": database,
        "collection": collection,
        "count": records,
        "commit-every": COMMIT_EVERY,
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        python, HERE / "sink.py", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    printed, complaint = await process.communicate()
    if process.returncode:
        raise LeftOutError(f"quix ended with {process.returncode}: {complaint.decode()[-500:]}")
    return Measured(**json.loads(printed.splitlines()[-1]))
