"""The service behind passwords and ACLs: the rights in docs/security.md are enough, and no secret is told."""

import asyncio
import contextlib
import functools
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.protocol.admin import CreateAclsRequest
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from local.prerequisites import missing_for_processes
from local.process import OWNER, ROOT, ManagedProcess
from local.servers import free_port
from local.services import make_token
from shared.kafka import client_options
from shared.settings import KafkaSettings
from tests.cluster import RUNNING, Cluster, ThrowAwayServers, _folder, wait_until
from tests.e2e.client import Http, Project, Tenant, a_project, a_tenant, assert_problem, body_of, open_http
from tests.e2e.ledger import COMMANDS, DEAD_LETTERS, EVENTS, REPLIES
from tests.e2e.load import eventually
from tests.e2e.secured import ADMIN, MECHANISM, Certificate, SecuredKafka, SecuredMongo

PAGE = (ROOT / "docs" / "security.md").read_text()
PRINCIPALS = ("gateway", "ingestor", "projector", "topics")
KAFKA_PASSWORDS = {name: f"secret-kafka-password-of-{name}" for name in (*PRINCIPALS, ADMIN)}
MONGODB_PASSWORDS = {name: f"secret-mongodb-password-of-{name}" for name in ("gateway", "projector", ADMIN)}
JWT_SECRETS = ("secret-that-signs-tokens-first-of-two", "secret-that-signs-tokens-second-of-two")
TOPICS = (COMMANDS, EVENTS, REPLIES, DEAD_LETTERS)

if (_missing := missing_for_processes()) is not None:
    pytest.skip(f"Kafka with passwords runs as a process only: {_missing}", allow_module_level=True)


# ---- the rights in the document --------------------------------------------------------------------------------------

_RESOURCES = {"topic": 2, "group": 3, "cluster": 4}
_OPERATIONS = {"READ": 3, "WRITE": 4, "CREATE": 5, "DESCRIBE": 8, "DESCRIBE_CONFIGS": 10}
_ALLOW, _LITERAL, _PREFIXED = 3, 3, 4


class Right(NamedTuple):
    principal: str
    resource: str
    name: str
    prefix: bool
    operation: str


def documented_rights() -> list[Right]:
    """Read the rights from the table in docs/security.md."""
    rows = re.findall(r"^\| `User:(\w+)` \| (\w+) `([\w.-]+)`( \(prefix\))? \| ([A-Z_, ]+) \|$", PAGE, re.MULTILINE)
    rights = [
        Right(user, resource, name, bool(prefix), operation)
        for user, resource, name, prefix, operations in rows
        for operation in operations.split(", ")
    ]
    assert {right.principal for right in rights} == set(PRINCIPALS), "the table is not what this test reads"
    return rights


def documented_roles() -> dict[str, list[str]]:
    """Read the roles of MongoDB's users from the table in docs/security.md."""
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+AnyDatabase`(?:, )?)+) \|", PAGE, re.MULTILINE)
    roles = {user: re.findall(r"\w+", granted) for user, granted in rows}
    assert set(roles) == {"gateway", "projector"}, "the table is not what this test reads"
    return roles


def has(user: str, operation: str, topic: str) -> bool:
    return any(
        right.principal == user and right.operation == operation and right.resource == "topic" and right.name == topic
        for right in documented_rights()
    )


# ---- the servers -----------------------------------------------------------------------------------------------------


def as_user(servers: ThrowAwayServers, name: str) -> dict[str, Any]:
    """What a client of Kafka needs to be this user."""
    return client_options(
        KafkaSettings(
            bootstrap_servers=servers.kafka_bootstrap,
            security_protocol="SASL_SSL",
            sasl_mechanism=MECHANISM,
            sasl_username=name,
            sasl_password=KAFKA_PASSWORDS[name],
            ssl_cafile=str(servers.folder / "ca.pem"),
        )
    )


async def allow(servers: ThrowAwayServers, rights: Sequence[Right]) -> None:
    """Give these rights, as soon as the broker knows its users."""

    async def connected() -> AIOKafkaAdminClient | None:
        admin = AIOKafkaAdminClient(**as_user(servers, ADMIN))
        try:
            await admin.start()
        except KafkaConnectionError:
            await admin.close()
            return None
        return admin

    admin = await eventually(connected, what="the broker lets its administrator in")
    try:
        for right in rights:
            pattern = _PREFIXED if right.prefix else _LITERAL
            resource = _RESOURCES[right.resource], right.name, pattern
            request = CreateAclsRequest(*resource, f"User:{right.principal}", "*", _OPERATIONS[right.operation], _ALLOW)
            response = await admin._send_request(request)
            assert response.creation_responses[0][0] == 0, response
    finally:
        await admin.close()


@pytest.fixture(scope="module")
async def secured() -> AsyncIterator[Cluster]:
    """The service with a user for each process, both servers behind TLS and passwords, and keys in files."""
    with _folder() as folder:
        servers, certificate, env = ThrowAwayServers(folder), Certificate(folder), {OWNER: str(folder)}
        ports = {"port": free_port(), "controller_port": free_port()}
        kafka = SecuredKafka(folder, certificate=certificate, passwords=KAFKA_PASSWORDS, env=env, **ports)
        mongodb = SecuredMongo(folder, certificate=certificate, port=free_port(), env=env)
        servers.kafka, servers.mongodb, servers.kafka_bootstrap = kafka, mongodb, kafka.bootstrap
        RUNNING.extend([kafka, mongodb])
        try:
            for server in (kafka, mongodb):
                server.start()
            for server in (kafka, mongodb):
                server.wait_ready()
            mongodb.add_users(documented_roles(), MONGODB_PASSWORDS)
            await allow(servers, documented_rights())
            with _service(servers, mongodb) as running:
                yield running
        finally:
            for server in (kafka, mongodb):
                RUNNING.remove(server)
                server.kill()


@contextlib.contextmanager
def _service(servers: ThrowAwayServers, mongodb: SecuredMongo) -> Iterator[Cluster]:
    secrets = servers.folder / "jwt-secrets"
    secrets.write_text("\n".join(JWT_SECRETS))
    urls = {name: mongodb.url_for(name, MONGODB_PASSWORDS[name]) for name in documented_roles()}
    settings = {
        "MONGODB_URL": urls["gateway"],
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SSL_CAFILE": str(servers.folder / "ca.pem"),
        "KAFKA_SASL_MECHANISM": MECHANISM,
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": "json",
        "GATEWAY_REPLY_TIMEOUT": "3",
        "JWT_SECRETS_FILE": str(secrets),
    }
    cluster = Cluster(servers, servers.folder, settings)
    cluster.jwt_secret = JWT_SECRETS[1]
    cluster.env |= _kafka_user("topics")
    cluster.run_topics()
    try:
        cluster.add_process("gateway", "gateway", _kafka_user("gateway"))
        cluster.add_process("ingestor", "ingestor", _kafka_user("ingestor") | {"MONGODB_URL": "mongodb://nowhere"})
        cluster.add_process("projector", "projector", _kafka_user("projector") | {"MONGODB_URL": urls["projector"]})
        for process in cluster.processes.values():
            process.start()
        for process in cluster.processes.values():
            process.wait_ready()
        yield cluster
    finally:
        cluster.stop()


def _kafka_user(name: str) -> dict[str, str]:
    return {"KAFKA_SASL_USERNAME": name, "KAFKA_SASL_PASSWORD": KAFKA_PASSWORDS[name]}


@pytest.fixture(scope="module")
async def http(secured: Cluster) -> AsyncIterator[Http]:
    async with open_http(secured.url) as http:
        yield http


@pytest.fixture
def project(http: Http, secured: Cluster) -> Project:
    return a_project(http, secured)


@pytest.fixture
def tenant(http: Http, secured: Cluster) -> Tenant:
    return a_tenant(http, secured)


# ---- rights ----------------------------------------------------------------------------------------------------------


async def test_the_documented_rights_are_enough(secured: Cluster, project: Project, tenant: Tenant) -> None:
    await project.given("run-042", folder="/a/b")
    body_of(await project.patch("run-042", tags=["a"]), HTTPStatus.OK)
    assert await project.names() == ["run-042"]
    assert (await tenant.recorded(content="A word."))["content"] == "A word."
    # A command that nobody can read is put aside: the ingestor may do that too.
    producer = AIOKafkaProducer(**as_user(secured.servers, ADMIN))
    await producer.start()
    await producer.send_and_wait(COMMANDS, b"no JSON", key=b"x")
    await producer.stop()
    await project.given("run-043")
    ingestor = secured.processes["ingestor"]
    ingestor.stop()
    ingestor.start()
    ingestor.wait_ready()
    await project.given("run-044")


async def test_the_documented_roles_are_enough_for_a_rebuild_and_the_gateways_does_not_write(
    secured: Cluster, project: Project
) -> None:
    await project.given("run-042")
    env = {**os.environ, **secured.processes["projector"].env}
    for command in ("rebuild", "rollback", "verify"):
        argv = [sys.executable, "-m", "projector", command, *(["--workers", "1"] if command != "rollback" else [])]
        tool = await asyncio.to_thread(subprocess.run, argv, env=env, cwd=ROOT, capture_output=True, text=True)
        assert tool.returncode == 0, tool.stdout + tool.stderr
    assert await project.names() == ["run-042"]
    with MongoClient[dict[str, Any]](secured.env["MONGODB_URL"]) as client:
        assert client["episodes_meta"]["pointers"].find_one() is not None
        with pytest.raises(OperationFailure, match="not authorized"):
            client["episodes_meta"]["pointers"].insert_one({})


@pytest.mark.parametrize("user", PRINCIPALS)
async def test_nobody_may_do_more_than_is_documented(secured: Cluster, user: str) -> None:
    options = as_user(secured.servers, user) | {"request_timeout_ms": 2_000}

    async def refused(topic: str) -> None:
        if not has(user, "WRITE", topic):
            async with _started(AIOKafkaProducer(**options)) as producer:
                with pytest.raises(KafkaError, match=r"(?i)authori|metadata"):
                    await asyncio.wait_for(producer.send_and_wait(topic, b"forged", partition=0), 20)
        if not has(user, "READ", topic):
            async with _started(AIOKafkaConsumer(**options, auto_offset_reset="earliest")) as consumer:
                if topic not in await consumer.topics():
                    return  # it may not even know of it
                consumer.assign([TopicPartition(topic, 0)])
                with pytest.raises(KafkaError, match=r"(?i)authori"):
                    await asyncio.wait_for(consumer.getone(), 20)

    await asyncio.gather(*map(refused, TOPICS))
    if user != "topics":
        admin = AIOKafkaAdminClient(**options)
        await admin.start()
        try:
            created = await admin.create_topics([NewTopic(f"episodes.of-{user}", 1, 1)])
            assert created.topic_errors[0][1] != 0
        finally:
            await admin.close()


class _started:  # noqa: N801 - used as a function
    """An aiokafka client for the length of the block."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def __aenter__(self) -> Any:
        await self._client.start()
        return self._client

    async def __aexit__(self, *_: object) -> None:
        # A broker that does not answer TLS's good-bye is waited for for 30 s.
        await asyncio.wait([asyncio.ensure_future(self._client.stop())], timeout=1)


# ---- secrets ---------------------------------------------------------------------------------------------------------


async def test_no_secret_is_told_in_a_log_or_an_answer(secured: Cluster, project: Project, tenant: Tenant) -> None:
    answers = await errors_and_pages(secured, project, tenant)
    for server in (secured.servers.mongodb, secured.servers.kafka):
        await asyncio.to_thread(server.stop)
        for _ in range(2):
            answers += await errors_and_pages(secured, project, tenant)
        server.start()
        await asyncio.to_thread(server.wait_ready)
    for process in secured.processes.values():
        await asyncio.to_thread(process.wait_ready)
    answers += await errors_and_pages(secured, project, tenant)
    for name, settings in WRONG_SETTINGS.items():
        answers += await pages_of_one_that_is_told_wrong(secured, name, settings(secured.env))

    secrets = {*KAFKA_PASSWORDS.values(), *MONGODB_PASSWORDS.values(), *JWT_SECRETS, *SENT}
    secrets |= {project.token, secured.api_key, "secret-wrong"}
    told = [(process.name, process.log.read_text()) for process in secured.processes.values()]
    assert all(text for _, text in told), "a log is empty: it cannot have been looked at"
    for name, text in (*told, *(("an answer", answer) for answer in answers)):
        for secret in secrets:
            assert secret not in text, f"{name} tells {secret}: …{text[: text.index(secret) + 100][-400:]}"


SENT = ("secret-body", "secret-query")


async def errors_and_pages(secured: Cluster, project: Project, tenant: Tenant) -> list[str]:
    """Make good and bad requests. Give all answers but the good ones: those hold what was sent."""
    token, key = project.token, secured.api_key
    batch = {"tenant_id": tenant.tenant_id, "episodes": [{"content": ["secret-body"]}]}
    requests: list[tuple[str, str, str, Any]] = [
        ("POST", project.target, token, {"name": "run", "metadata": {"a": "secret-body"}}),
        ("POST", project.target, token, {"name": ["secret-body"]}),
        ("POST", project.target, token[:-2], {"name": "run"}),
        ("POST", project.target, key, {"name": "run"}),
        ("GET", f"{project.target}?page=0&token=secret-query", token, None),
        ("GET", "/namespaces/somebody/projects/else/episodes", token, None),
        ("POST", "/v1/episodes?key=secret-query", key, batch),
        ("POST", "/v1/episodes", token, batch),
        ("PUT", "/v1/episodes", key, None),
        ("GET", "/nowhere?secret-query", token, None),
    ]
    async with httpx.AsyncClient(base_url=secured.url, timeout=30, trust_env=False) as client:

        async def ask(method: str, target: str, credentials: str, body: Any) -> httpx.Response:
            return await client.request(method, target, json=body, headers={"Authorization": f"Bearer {credentials}"})

        given = await asyncio.gather(*(ask(*request) for request in requests))
        answers = [f"{answer.headers} {answer.text}" for answer in given if not answer.is_success]
        pages = ["/healthz", "/readyz", "/openapi.json", "/docs"]
        pages += [secured.url_of(name) + page for name in ("ingestor", "projector") for page in ("/healthz", "/readyz")]
        answers += [(await client.get(page)).text for page in pages]
    return answers


WRONG_SETTINGS: dict[str, Callable[[Mapping[str, str]], dict[str, str]]] = {
    "password": lambda _: {"KAFKA_SASL_PASSWORD": "secret-wrong"},
    "user": lambda env: {"MONGODB_URL": env["MONGODB_URL"].replace("gateway:", "nobody:")},
    "url": lambda env: {"MONGODB_URL": env["MONGODB_URL"].replace("127.0.0.1", "127.0.0.1:x:y")},
    "secret": lambda _: {"JWT_SECRET": "secret-wrong"},
    "keys": lambda _: {"API_KEYS": '{"secret-wrong": ["*"]}'},
    "json": lambda _: {"API_KEYS": '{"secret-wrong"'},
}


async def pages_of_one_that_is_told_wrong(secured: Cluster, name: str, settings: Mapping[str, str]) -> list[str]:
    """Run a gateway and a projector with these settings until they say what is missing, or end."""

    async def page(kind: str) -> str:
        process = secured.add_process(kind, f"{kind}-with-wrong-{name}", {**_kafka_user(kind), **settings})
        process.start()
        await asyncio.to_thread(wait_until, functools.partial(_is_known, process))
        told = ""
        with contextlib.suppress(httpx.TransportError):  # it may end at any moment, and in the log stands why
            async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
                told = (await client.get(f"http://127.0.0.1:{process.port}/readyz")).text
        await asyncio.to_thread(process.stop, 10)
        return told

    return [*await asyncio.gather(page("gateway"), page("projector"))]


def _is_known(process: ManagedProcess) -> bool:
    """Whether it answers, or has ended."""
    if not process.running:
        return True
    try:
        httpx.get(f"http://127.0.0.1:{process.port}/readyz", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


async def test_a_replaced_secret_is_good_and_the_old_one_is_not_without_a_restart(
    secured: Cluster, project: Project
) -> None:
    pid = secured.processes["gateway"].pid
    first = project.beside(token=project.token)
    await first.given("run-042")
    secrets = Path(secured.env["JWT_SECRETS_FILE"])
    third = "secret-that-signs-tokens-third-of-three"
    new = project.beside(token=make_token(third, project.namespace))
    assert_problem(await new.list(), HTTPStatus.UNAUTHORIZED)
    try:
        _replaced(secrets, f"{third}\n{JWT_SECRETS[1]}")
        await _becomes(new, HTTPStatus.OK)
        await _becomes(first, HTTPStatus.OK)
        _replaced(secrets, third)
        await _becomes(first, HTTPStatus.UNAUTHORIZED)
        await _becomes(new, HTTPStatus.OK)
    finally:
        _replaced(secrets, "\n".join(JWT_SECRETS))
    await _becomes(first, HTTPStatus.OK)
    assert secured.processes["gateway"].pid == pid


def _replaced(file: Path, text: str) -> None:
    other = file.with_suffix(".new")
    other.write_text(text)
    other.replace(file)


async def _becomes(project: Project, status: HTTPStatus) -> None:
    answers: list[httpx.Response] = []

    async def so() -> bool:
        answers.append(await project.list())
        return answers[-1].status_code == status

    try:
        await eventually(so, what=f"the token is answered {int(status)}")
    except AssertionError as error:
        error.add_note(f"of {len(answers)} answers the last was {answers[-1].status_code} {answers[-1].text}")
        raise
