"""Tokens that nobody honest makes, and good credentials on every route that they are not good for."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway import openapi
from tests.cluster import RUNNING, Cluster
from tests.e2e.client import Http, Project, Tenant, assert_problem, open_http, unique
from tests.e2e.hostile import assert_headers_are_safe, assert_tells_nothing_internal

pytest_plugins = ["tests.e2e.contract_fixtures"]

LATER = 4_000_000_000
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)


def part(value: Any) -> str:
    """Encode one part of a token; text and bytes as they are."""
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        value = json.dumps(value).encode()
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def signed(head: Any, claims: Any, secret: bytes) -> str:
    """Make a token by hand: no library would."""
    text = f"{part(head)}.{part(claims)}"
    return f"{text}.{part(hmac.digest(secret, text.encode(), hashlib.sha256))}"


HS256 = {"alg": "HS256", "typ": "JWT"}
CLAIMS = {
    "nobody": {},
    "names that are no text": {"sub": 7, "username": ["a"], "userName": {}},
    "an empty name": {"sub": "", "username": ""},
    "half a character": {"sub": "a\ud800"},
    "an end that is no number": {"sub": "me", "exp": "tomorrow"},
    "an end that is a list": {"sub": "me", "exp": [LATER]},
    "an end without end": '{"sub":"me","exp":1e400}',
    "an end of 5,000 digits": '{"sub":"me","exp":1' + "0" * 5_000 + "}",
    "an end that is not a number": '{"sub":"me","exp":NaN}',
    "no end": {"sub": "me", "exp": None},
    "an end in the past": {"sub": "me", "exp": 1},
    "a negative end": {"sub": "me", "exp": -LATER},
    "a beginning in the future": {"sub": "me", "nbf": LATER - 1},
    "a beginning that is none": {"sub": "me", "nbf": {}},
    "a beginning without end": '{"sub":"me","exp":4000000000,"nbf":1e400}',
    "no object": [1, 2],
    "text": '"me"',
    "nothing": "",
    "no JSON": "{'sub': 'me'}",
    "no text": b"\xff\xfe",
    "very deep": '{"a":' * 5_000 + "1" + "}" * 5_000,
}
HEADS = {
    "none": {"alg": "none"},
    "no algorithm": {"typ": "JWT"},
    "an algorithm that is a list": {"alg": ["HS256"]},
    "an algorithm that is none": {"alg": None},
    "another algorithm": {"alg": "HS512"},
    "a critical extension": {**HS256, "crit": ["b64"], "b64": False},
    "an unknown critical extension": {**HS256, "crit": ["x"], "x": 1},
    "a key id that is an object": {**HS256, "kid": {"$ne": None}},
    "no object": ["HS256"],
    "no JSON": "{",
    "no text": b"\xff",
    "very deep": '{"alg":' * 5_000 + "1" + "}" * 5_000,
}
FORMS = [
    "..",
    ".",
    "a.b",
    "a.b.c.d.e",
    f"{part(HS256)}..",
    f"{part(HS256)}.{part({'sub': 'me', 'exp': LATER})}.",
    "=.=.=",
    "*.*.*",
    "A" * 100_000,
    "A." * 50_000,
    f"{'A' * 30_000}.{'B' * 30_000}.{'C' * 30_000}",
]


async def assert_refused(project: Project, token: str) -> None:
    place = project.beside(token=token)
    for response in (await place.upsert("run-042"), await place.list()):
        assert response.status_code in {HTTPStatus.UNAUTHORIZED, HTTPStatus.BAD_REQUEST}, response.text[:500]
        assert_tells_nothing_internal(response.text)
        assert_headers_are_safe(response.headers)


@pytest.mark.parametrize("what", list(CLAIMS))
async def test_claims_that_say_nothing_usable_are_refused(cluster: Cluster, project: Project, what: str) -> None:
    claims = CLAIMS[what]
    if isinstance(claims, dict):
        claims = {"exp": LATER, **claims}
        claims = {key: project.namespace if value == "me" else value for key, value in claims.items()}
        claims = {key: value for key, value in claims.items() if value is not None}
    elif isinstance(claims, str):
        claims = claims.replace('"me"', json.dumps(project.namespace))
    await assert_refused(project, signed(HS256, claims, cluster.jwt_secret.encode()))


@pytest.mark.parametrize("what", list(HEADS))
async def test_heads_that_ask_for_another_check_are_refused(cluster: Cluster, project: Project, what: str) -> None:
    claims = {"sub": project.namespace, "exp": LATER}
    token = signed(HEADS[what], claims, cluster.jwt_secret.encode())
    await assert_refused(project, token)
    await assert_refused(project, token.rpartition(".")[0] + ".")


async def test_a_key_that_the_token_brings_along_is_not_used(cluster: Cluster, project: Project) -> None:
    claims = {"sub": project.namespace, "exp": LATER}
    own = b"a-key-of-the-callers-own-choice-0123456789"
    for more in (
        {"jwk": {"kty": "oct", "k": part(own)}},
        {"jku": "http://127.0.0.1:1/keys"},
        {"x5u": "http://127.0.0.1:1/cert"},
        {"x5c": [part(own)]},
        {"kid": "../../../../dev/null"},
        {"kid": "' UNION SELECT 'key"},
    ):
        await assert_refused(project, signed({**HS256, **more}, claims, own))
        await assert_refused(project, signed({**HS256, **more}, claims, b""))
        good = signed({**HS256, **more}, claims, cluster.jwt_secret.encode())
        assert (await project.beside(token=good).upsert("run-042")).is_success


@pytest.mark.parametrize("token", FORMS, ids=lambda token: f"{token[:12]} of {len(token)}")
async def test_what_has_not_the_form_of_a_token_is_refused(project: Project, token: str) -> None:
    await assert_refused(project, token)


# ---- tokens of an issuer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issued(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a gateway that believes tokens signed with `RSA`."""
    keys: Path = tmp_path_factory.mktemp("keys") / "jwks.json"
    key = {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key())), "kid": "k1", "use": "sig"}
    keys.write_text(json.dumps({"keys": [key]}))
    name = "gateway-with-issuer"
    process = cluster.add_process("gateway", name, {"JWT_ALGORITHM": "RS256", "JWT_JWKS_FILE": str(keys)})
    process.start()
    try:
        process.wait_ready()
        yield cluster.url_of(name)
    finally:
        process.stop()
        RUNNING.remove(process)
        del cluster.processes[name]


@pytest.fixture
async def issued_http(issued: str) -> AsyncIterator[Http]:
    async with open_http(issued) as http:
        yield http


async def test_a_public_key_signs_nothing(cluster: Cluster, issued_http: Http) -> None:
    username = unique("alice")
    claims = {"sub": username, "exp": LATER}
    good = jwt.encode(claims, RSA, "RS256", {"kid": "k1"})
    project = Project(issued_http, username, "robotics", good)
    await project.given("run-042")

    public = RSA.public_key()
    forms = [
        public.public_bytes(Encoding.PEM, form) for form in (PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1)
    ]
    forms += [public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)]
    forms += [jwt.algorithms.RSAAlgorithm.to_jwk(public).encode(), b"", b"k1", cluster.jwt_secret.encode()]
    for algorithm in ("HS256", "RS256", "none"):
        for key in forms:
            await assert_refused(project, signed({"alg": algorithm, "kid": "k1"}, claims, key))
    for key_id in ("k1", "k2", ""):
        await assert_refused(project, jwt.encode(claims, OTHER_RSA, "RS256", {"kid": key_id}))
    await assert_refused(project, jwt.encode(claims, RSA, "RS512", {"kid": "k1"}))
    await assert_refused(project, jwt.encode(claims, RSA, "PS256", {"kid": "k1"}))
    own = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(OTHER_RSA.public_key()))
    await assert_refused(project, jwt.encode(claims, OTHER_RSA, "RS256", {"kid": "k1", "jwk": own}))


# ---- good credentials in the wrong place -----------------------------------------------------------------------------

ROUTES = [
    (path, method)
    for path, operations in openapi.document()["paths"].items()
    for method, operation in operations.items()
    if method != "parameters" and operation.get("security") != []
]


@pytest.mark.parametrize(("path", "method"), ROUTES, ids=str)
async def test_on_every_route_credentials_are_good_for_their_own_only(
    cluster: Cluster, http: Http, project: Project, tenant: Tenant, path: str, method: str
) -> None:
    await project.given("run-042")
    episode = await tenant.recorded()
    body: Any
    if path.startswith("/v1/"):
        target = path.replace("{id}", episode["id"])
        target += "" if method == "post" else f"?tenant_id={tenant.tenant_id}"
        body = {"tenant_id": tenant.tenant_id, "episodes": [{"content": "Planted."}]}
        foreign = cluster.api_key_for(["acme"])
        strangers = [project.token, cluster.token(tenant.tenant_id, namespaces=["*"])]
    else:
        target = path.format(slug=project.namespace, projectSlug="robotics", episodeName="run-042")
        body = {"name": "run-042", "description": "Planted."}
        foreign = cluster.token(unique("mallory"), namespaces=[project.namespace + "x", "", "**", "a*"])
        strangers = [cluster.api_key, cluster.api_key_for(["acme"])]
    sent = {"body": body} if method in {"post", "patch"} and "restore" not in path else {}
    response = await http.send(method.upper(), target, authorization=f"Bearer {foreign}", **sent)
    assert_problem(response, HTTPStatus.FORBIDDEN, "forbidden")
    assert "run-042" not in response.text
    for stranger in strangers:
        response = await http.send(method.upper(), target, authorization=f"Bearer {stranger}", **sent)
        assert_problem(response, HTTPStatus.UNAUTHORIZED, "unauthorized")
    assert (await project.seen("run-042"))["description"] is None
    assert (await tenant.given({"content": "The second."}))["event_ids"] == [2]
