"""The real Kafka and the real MongoDB as plain processes or, where those cannot run, as containers."""

import contextlib
import hashlib
import os
import random
import socket
import struct
import subprocess
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from local.prerequisites import (
    MissingPrerequisiteError,
    Say,
    class_archive,
    docker_answers,
    filled_once,
    find_java,
    find_mongod,
    kafka_jars,
    missing_for_processes,
)
from local.process import ROOT, Managed, ManagedProcess

KAFKA_IMAGE = "apache/kafka:4.4.0"
MONGODB_IMAGE = "mongo:7.0"
REPLICA_SET = "episodes"
HOST = "127.0.0.1"

KAFKA_SETTINGS = {
    # one record may hold a whole batch of commands or events: room for 64 MiB
    "message.max.bytes": "67108864",
    "replica.fetch.max.bytes": "67108864",
    "socket.request.max.bytes": "134217728",
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "log.cleaner.dedupe.buffer.size": "8388608",  # 128 MiB by default, a quarter of this heap
    # a broker that was killed may come back once its old session has run out: 9 s by default
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
}
KAFKA_HEAP = "-Xmx512m"
MONGODB_CACHE_GB = "0.5"


class KafkaServer(ManagedProcess):
    """A Kafka of one node, broker and controller in one process, with its data in `folder`/kafka."""

    def __init__(
        self, folder: Path, *, port: int, controller_port: int, env: Mapping[str, str], say: Say = lambda _: None
    ) -> None:
        self.bootstrap = f"{HOST}:{port}"
        self._data = folder / "kafka"
        self._properties = folder / "kafka.properties"
        # never a "-" first: an option
        self.cluster = f"E{urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:].rstrip('=')}"
        self.settings: dict[str, str] = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{HOST}:{controller_port}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{HOST}:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "log.dirs": str(self._data),
            **KAFKA_SETTINGS,
        }
        self.format_options: list[str] = []
        java, jars = find_java(), kafka_jars(say)
        self._classes = class_archive(java, jars)
        self._java = [
            java,
            KAFKA_HEAP,
            *os.environ.get("KAFKA_JVM_PERFORMANCE_OPTS", "").split(),
            "-Djava.awt.headless=true",
            "-cp",
            f"{jars}/*",
        ]
        self._java += [f"-Dlog4j2.configurationFile={ROOT / 'local' / 'kafka' / 'log4j2.properties'}"]
        argv = [*self._java, f"-XX:SharedArchiveFile={self._classes}", "kafka.Kafka", str(self._properties)]
        super().__init__("kafka", argv, env=env, log=folder / "logs" / "kafka.log", port=port)

    def prepare(self) -> None:
        super().prepare()
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in self.settings.items()))
        if not (self._data / "meta.properties").exists():
            tool = ["kafka.tools.StorageTool", "format", "-t", self.cluster, "-c", str(self._properties)]
            with self.log.open("ab") as log, self._class_option() as option:
                subprocess.run([*self._java, option, *tool, *self.format_options], stdout=log, stderr=log, check=True)

    @contextlib.contextmanager
    def _class_option(self) -> Iterator[str]:
        """Let Java use the archive of Kafka's classes, or the first time make it. With it a start takes two thirds."""
        if self._classes.exists():
            yield f"-XX:SharedArchiveFile={self._classes}"
        else:
            with filled_once(self._classes) as archive:
                yield f"-XX:ArchiveClassesAtExit={archive}"

    def missing(self) -> str | None:
        return super().missing() or kafka_missing(self.bootstrap)


class MongoServer(ManagedProcess):
    """A MongoDB replica set of one member, with its data in `folder`/mongodb."""

    def __init__(self, folder: Path, *, port: int, env: Mapping[str, str]) -> None:
        self.url = mongodb_url(port)
        self._data = folder / "mongodb"
        argv = [find_mongod(), "--replSet", REPLICA_SET, "--bind_ip", HOST, "--port", str(port)]
        argv += ["--dbpath", str(self._data), "--wiredTigerCacheSizeGB", MONGODB_CACHE_GB, "--setParameter"]
        argv += ["diagnosticDataCollectionEnabled=false", "--nounixsocket", "--quiet"]
        super().__init__("mongodb", argv, env=env, log=folder / "logs" / "mongodb.log", port=port)

    def prepare(self) -> None:
        super().prepare()
        self._data.mkdir(parents=True, exist_ok=True)

    def missing(self) -> str | None:
        return super().missing() or mongodb_missing(self.url)


class ManagedContainer(Managed):
    """A container of the local Docker engine under the same control as a process.

    Its data is in a named volume and outlives it. Testcontainers' reaper removes the container should this process die.
    """

    def __init__(self, name: str, log: Path, port: int, image: str, *, unique: str, data: str) -> None:
        from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - slow, and most never need it

        super().__init__(name, log, port)
        self._unique = f"{unique}-{name}"
        self._container = cast(Any, DockerContainer(image).with_name(self._unique))
        self._container.with_volume_mapping(self._unique, data, "rw")
        self._container.ports[str(port)] = (HOST, port)
        self._created = False

    @property
    def pid(self) -> int | None:
        state = self._state()
        return state["Pid"] if state.get("Running") else None

    @property
    def exit_code(self) -> int | None:
        state = self._state()
        return None if not state or state["Running"] else state["ExitCode"]

    def fetch(self, say: Say) -> None:
        """Pull the image if it is not here yet."""
        images = self._engine.images
        if not any(self._container.image in image.tags for image in images.list()):
            say(f"pulling {self._container.image}")
            images.pull(self._container.image)

    def start(self) -> None:
        if self.running:
            return
        if self._created:
            self._container.get_wrapped_container().start()
        else:
            self._remove_namesake()
            self._container.start()
            self._created = True

    def stop(self, timeout: float = 30) -> int | None:
        if self.running:
            self.resume()
            self._container.get_wrapped_container().stop(timeout=round(timeout))
        return self.exit_code

    def kill(self) -> None:
        if self.running:
            self._container.get_wrapped_container().kill()
            self._container.get_wrapped_container().wait()

    def pause(self) -> None:
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        if self._state().get("Paused"):
            self._container.get_wrapped_container().unpause()

    def remove_with_data(self) -> None:
        """Remove the container and its volume."""
        self._remove_namesake()
        for volume in self._engine.volumes.list(filters={"name": self._unique}):
            volume.remove(force=True)
        self._engine.close()

    def log_tail(self, lines: int = 30) -> str:
        if not self._state():
            return ""
        said: bytes = self._container.get_wrapped_container().logs(tail=lines)
        return said.decode(errors="replace")

    @property
    def _engine(self) -> Any:
        return self._container.get_docker_client().client

    def _state(self) -> dict[str, Any]:
        """Ask the engine; a container that somebody removed was never created."""
        if not self._created:
            return {}
        container = self._container.get_wrapped_container()
        try:
            container.reload()
        except OSError:  # what docker-py's errors of the engine are, and those of the way to it
            self._created = False
            return {}
        state: dict[str, Any] = container.attrs["State"]
        return state

    def _remove_namesake(self) -> None:
        for container in self._engine.containers.list(all=True, filters={"name": f"^/?{self._unique}$"}):
            container.remove(force=True)
        self._created = False


class KafkaContainer(ManagedContainer):
    """The same Kafka from its official image."""

    def __init__(self, folder: Path, *, port: int, unique: str) -> None:
        data = "/var/lib/kafka/data"
        super().__init__("kafka", folder / "logs" / "kafka.log", port, KAFKA_IMAGE, unique=unique, data=data)
        self.bootstrap = f"{HOST}:{port}"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": "1@localhost:9093",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://:{port},CONTROLLER://:9093",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "log.dirs": data,
            **KAFKA_SETTINGS,
        }
        for key, value in settings.items():
            self._container.with_env(kafka_variable(key), value)
        self._container.with_env("KAFKA_HEAP_OPTS", KAFKA_HEAP)
        self._container.with_env("CLUSTER_ID", "ZXBpc29kZXMtbG9jYWwwMQ")

    def missing(self) -> str | None:
        return super().missing() or kafka_missing(self.bootstrap)


class MongoContainer(ManagedContainer):
    """The same MongoDB from its official image."""

    def __init__(self, folder: Path, *, port: int, unique: str) -> None:
        log = folder / "logs" / "mongodb.log"
        super().__init__("mongodb", log, port, MONGODB_IMAGE, unique=unique, data="/data/db")
        self.url = mongodb_url(port)
        # it listens on the same port inside and outside, so that the set's member has one address for all
        argv = ["mongod", "--replSet", REPLICA_SET, "--bind_ip_all", "--port", str(port)]
        self._container.with_command([*argv, "--wiredTigerCacheSizeGB", MONGODB_CACHE_GB])

    def missing(self) -> str | None:
        return super().missing() or mongodb_missing(self.url)


class Servers(NamedTuple):
    """A Kafka and a MongoDB, of one kind."""

    kafka: KafkaServer | KafkaContainer
    mongodb: MongoServer | MongoContainer


def make_servers(
    folder: Path,
    *,
    ports: Mapping[str, int],
    env: Mapping[str, str],
    containers_first: bool = False,
    say: Say = lambda _: None,
) -> Servers:
    """Make both servers, not started: as processes if this machine can, else as containers; or the other way round.

    `ports` holds `kafka`, `kafka_controller` and `mongodb`.
    """
    missing = missing_for_processes()
    if missing is None and not (containers_first and docker_answers()):
        kafka = KafkaServer(folder, port=ports["kafka"], controller_port=ports["kafka_controller"], env=env, say=say)
        return Servers(kafka, MongoServer(folder, port=ports["mongodb"], env=env))
    if not docker_answers():
        raise MissingPrerequisiteError(f"{missing} Or start a Docker engine: none answers here.")
    say("Kafka and MongoDB run as containers")
    unique = "episodes-" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    kafka_container = KafkaContainer(folder, port=ports["kafka"], unique=unique)
    mongo_container = MongoContainer(folder, port=ports["mongodb"], unique=unique)
    kafka_container.fetch(say)
    mongo_container.fetch(say)
    return Servers(kafka_container, mongo_container)


def kafka_variable(setting: str) -> str:
    """Give the environment variable by which Kafka's image takes a setting."""
    return "KAFKA_" + setting.upper().replace(".", "_")


def mongodb_url(port: int) -> str:
    """Give the URL of a one-member set; `directConnection` spares the drivers looking for other members."""
    return f"mongodb://{HOST}:{port}/?directConnection=true"


def kafka_missing(bootstrap: str, timeout: float = 1) -> str | None:
    """Say what keeps a broker from serving; it is asked for the API versions it speaks, as every client does first."""
    host, _, port = bootstrap.partition(":")
    body = struct.pack(">hhih", 18, 0, 1, -1)  # ApiVersions, version 0, correlation id 1, no client id
    try:
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(struct.pack(">i", len(body)) + body)
            return None if connection.recv(4) else "the broker is starting"
    except OSError:
        return "the broker does not listen yet"


def mongodb_missing(url: str) -> str | None:
    """Say what keeps the replica set from taking writes; make the set, or give it its new address, where need be."""
    with MongoClient[dict[str, Any]](
        url, serverSelectionTimeoutMS=500, connectTimeoutMS=500, socketTimeoutMS=1000
    ) as it:
        try:
            hello = it.admin.command("hello")
            if hello.get("isWritablePrimary"):
                return None
            address = "{}:{}".format(*it.address) if it.address else ""
            return _settle(it, address)
        except PyMongoError:
            return "it does not answer yet"


def _settle(client: MongoClient[dict[str, Any]], address: str) -> str:
    """Bring a member that is no primary nearer to being one, and say what it is waiting for."""
    config: dict[str, Any] = {"_id": REPLICA_SET, "members": [{"_id": 0, "host": address}]}
    try:
        current = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure:
        client.admin.command("replSetInitiate", config)
        return "the replica set is being made"
    if current["members"][0]["host"] != address:
        config = {**current, "members": [{**current["members"][0], "host": address}]}
        client.admin.command("replSetReconfig", config, force=True)
        return "the replica set is getting its new address"
    return "the replica set has no primary yet"


def free_port() -> int:
    """Find a free port below the range from which the system takes the ports of outgoing connections.

    Inside that range a client that keeps calling a stopped server can end up connected to itself, on the server's port.
    """
    while True:
        port = random.randint(15000, 32000)  # noqa: S311 - no secret
        if port_is_free(port):
            return port


def port_is_free(port: int) -> bool:
    """Say whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
