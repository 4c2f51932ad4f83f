"""Who is let in."""

import json
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from gateway.auth import (
    ApiKeyAuthenticator,
    JwksKeys,
    JwtAuthenticator,
    Secrets,
    batch_authenticator,
    project_authenticator,
)
from gateway.problems import Problem
from shared.errors import Unavailable
from tests.unit.gateway_fakes import SECRET, settings

NOW = 2_000_000_000
RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def made(claims: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", key_id: str | None = None) -> str:
    headers = None if key_id is None else {"kid": key_id}
    return f"Bearer {jwt.encode(claims, key, algorithm, headers)}"


def authenticator(**told: Any) -> JwtAuthenticator:
    return JwtAuthenticator(Secrets([SECRET]), "HS256", **told)


async def refused(who: Any, authorization: str | None) -> Problem:
    with pytest.raises(Problem) as caught:
        await who.caller(authorization)
    assert caught.value.status == 401
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer ")
    return caught.value


def jwks(**keys: PrivateKeyTypes) -> bytes:
    def described(key_id: str, key: Any) -> dict[str, Any]:
        algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
        return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": key_id, "use": "sig"}

    return json.dumps({"keys": [described(key_id, key) for key_id, key in keys.items()]}).encode()


# --- JWT


@pytest.mark.parametrize(
    ("claims", "slug", "actor"),
    [
        ({"sub": "u1", "username": "alice", "userName": "x"}, "alice", "u1"),
        ({"sub": "u1", "userName": "alice"}, "alice", "u1"),
        ({"sub": "alice"}, "alice", "alice"),
        ({"username": "alice"}, "alice", "alice"),
        ({"username": "", "sub": "alice"}, "alice", "alice"),
        ({"username": 7, "sub": "alice"}, "alice", "alice"),
    ],
)
async def test_the_claims_name_the_caller(claims: dict[str, Any], slug: str, actor: str) -> None:
    caller = await authenticator().caller(made({"exp": NOW * 2, **claims}))
    assert (caller.slug, caller.actor) == (slug, actor)
    assert caller.owns(slug)
    assert caller.may_use(slug)
    assert not caller.may_use("other")


@pytest.mark.parametrize(
    ("namespaces", "opened", "closed"),
    [
        (["a", "b"], ["a", "b", "me"], ["c", "*"]),
        (["*"], ["a", "*", "me"], []),
        ("a", ["me"], ["a"]),
        ([1], ["me"], ["1"]),
    ],
)
async def test_namespaces_open_more(namespaces: Any, opened: list[str], closed: list[str]) -> None:
    caller = await authenticator().caller(made({"exp": NOW * 2, "sub": "me", "namespaces": namespaces}))
    assert all(caller.may_use(name) for name in opened)
    assert not any(caller.may_use(name) for name in closed)
    assert not any(caller.owns(name) for name in [*opened, *closed] if name != "me")


async def test_somebody_called_star_owns_no_more_than_that() -> None:
    caller = await authenticator().caller(made({"exp": NOW * 2, "sub": "*"}))
    assert caller.owns("*")
    assert not caller.may_use("other")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "Bearer x",
        "Bearer a.b.c",
        "Bearer \xff.\xff.\xff",
        "Bearer " + "e30." * 2 + "x",
        made({"sub": "a"}),
        made({"sub": "a", "exp": 1}),
        made({"sub": "a", "exp": "soon"}),
        made({"sub": "a", "exp": NOW * 2, "nbf": NOW * 2}),
        made({"exp": NOW * 2}),
        made({"sub": 7, "exp": NOW * 2}),
        made({"sub": "a", "exp": NOW * 2}, "another-secret-that-is-also-long-enough-for-it"),
        made({"sub": "a", "exp": NOW * 2}, SECRET, "HS384"),
        made({"sub": "a", "exp": NOW * 2}, None, "none"),
        made({"sub": "a", "exp": NOW * 2}, RSA, "RS256"),
    ],
)
@pytest.mark.filterwarnings("ignore:The HMAC key")
async def test_bad_tokens_are_401(authorization: str | None) -> None:
    await refused(authenticator(), authorization)


async def test_a_head_that_nests_too_deeply_is_401() -> None:
    head = urlsafe_b64encode(b'{"alg":' + b"[" * 30_000).decode().rstrip("=")
    await refused(authenticator(), f"Bearer {head}.e30.x")


async def test_a_token_without_end_needs_a_setting() -> None:
    token = made({"sub": "a"})
    await refused(authenticator(), token)
    assert (await authenticator(allow_no_exp=True).caller(token)).slug == "a"


async def test_audience_and_issuer_are_checked_if_set() -> None:
    strict = authenticator(audience="episodes", issuer="us")
    claims = {"sub": "a", "exp": NOW * 2}
    assert (await strict.caller(made({**claims, "aud": "episodes", "iss": "us"}))).slug == "a"
    for wrong in ({}, {"aud": "episodes"}, {"iss": "us"}, {"aud": "x", "iss": "us"}, {"aud": "episodes", "iss": "x"}):
        await refused(strict, made({**claims, **wrong}))
    assert (await authenticator().caller(made({**claims, "aud": "any"}))).slug == "a"


async def test_a_token_seen_before_still_expires() -> None:
    clock = Clock()
    who = authenticator(clock=clock)
    token = made({"sub": "a", "exp": 2 * NOW})
    assert await who.caller(token) is await who.caller(token)
    clock.now = 2 * NOW - 1
    assert (await who.caller(token)).slug == "a"
    clock.now = 2 * NOW
    await refused(who, token)


# --- keys of an issuer


@pytest.mark.parametrize(("key", "algorithm"), [(RSA, "RS256"), (EC, "ES256")])
async def test_keys_of_an_issuer(key: Any, algorithm: str) -> None:
    who = JwtAuthenticator(JwksKeys(lambda: jwks(k1=key)), algorithm)
    claims = {"sub": "a", "exp": NOW * 2}
    assert (await who.caller(made(claims, key, algorithm, "k1"))).slug == "a"
    assert (await who.caller(made(claims, key, algorithm))).slug == "a"
    await refused(who, made(claims, key, algorithm, "k2"))
    await refused(who, made(claims, SECRET, "HS256", "k1"))
    other = EC if key is RSA else RSA
    await refused(who, made(claims, other, "ES256" if other is EC else "RS256", "k1"))


async def test_an_unknown_key_is_looked_for_but_not_all_the_time() -> None:
    clock = Clock()
    looks = []
    known: dict[str, Any] = {"k1": RSA, "k0": EC}

    def load() -> bytes:
        looks.append(clock.now)
        return jwks(**known)

    keys = JwksKeys(load, clock)
    assert await keys.keys("k1")
    assert not await keys.keys("k2")
    assert not await keys.keys(None)
    assert len(looks) == 1
    known["k2"] = known.pop("k1")
    clock.now += 11
    assert await keys.keys("k2")
    assert not await keys.keys("k1")
    assert len(looks) == 2
    clock.now += 601
    assert await keys.keys("k2")
    assert len(looks) == 3


async def test_keys_that_cannot_be_fetched_are_kept_or_missed() -> None:
    clock = Clock()
    answers: list[bytes] = []

    def load() -> bytes:
        if not answers:
            raise OSError("away")
        return answers.pop()

    keys = JwksKeys(load, clock)
    with pytest.raises(Unavailable):
        await keys.keys("k1")
    clock.now += 11
    answers.append(jwks(k1=RSA))
    assert await keys.keys("k1")
    clock.now += 601
    answers.append(b"nonsense")
    assert await keys.keys("k1")


async def test_a_key_file_that_is_none_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    told = settings(jwt_algorithm="RS256", jwt_jwks_file=file)
    for text in (None, b"nonsense", b"{}", b'{"keys":[]}', b"[]", b"\xff"):
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(ValueError, match="JWT_JWKS_FILE"):
            project_authenticator(told)
    file.write_bytes(jwks(k1=RSA))
    token = made({"sub": "a", "exp": NOW * 2}, RSA, "RS256", "k1")
    assert (await project_authenticator(told).caller(token)).slug == "a"


# --- API keys


async def test_an_api_key_opens_its_tenants() -> None:
    def digest(key: str) -> str:
        return sha256(key.encode()).hexdigest()

    who = ApiKeyAuthenticator({digest("k1"): ("a", "b"), digest("k2"): ("*",)})
    some = await who.caller("Bearer k1")
    assert some.may_use("a")
    assert some.may_use("b")
    assert not some.may_use("c")
    assert some.actor == f"key:{digest('k1')[:16]}"
    assert (await who.caller("bearer k2")).may_use("c")
    for wrong in (None, "Bearer", "Bearer k3", "k1", "Basic k1", f"Bearer {digest('k1')}"):
        await refused(who, wrong)


async def test_api_keys_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    told = settings(api_keys={}, api_keys_file=file)
    for text in ("x", "{}x", '{"a":["t"]}', '{"' + "0" * 64 + '":"t"}', "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="API_KEYS_FILE"):
            batch_authenticator(told)
    file.write_text(json.dumps({sha256(b"k").hexdigest(): ["t"]}))
    assert (await batch_authenticator(told).caller("Bearer k")).may_use("t")


async def test_without_any_key_nobody_is_let_in() -> None:
    await refused(batch_authenticator(settings(api_keys={})), "Bearer k")
