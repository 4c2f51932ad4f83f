"""Keys change while the gateway runs: old and new are good together, and the old are refused once they are gone."""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import ValidationError
from structlog.testing import capture_logs

from gateway import key_files
from gateway.auth import Authenticator, batch_authenticator, project_authenticator
from gateway.key_files import KeyFile
from gateway.problems import Problem
from gateway.settings import GatewaySettings
from tests.unit.gateway_fakes import settings

OLD, NEW, THIRD = (f"{word}-secret-that-is-long-enough-for-hs256" for word in ("an-old", "a-new", "a-third"))
RSA_OLD, RSA_NEW = (rsa.generate_private_key(65537, 2048) for _ in range(2))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "LOOK_SECONDS", 0.0)


def token(key: Any, algorithm: str = "HS256", key_id: str | None = None) -> str:
    headers = None if key_id is None else {"kid": key_id}
    return f"Bearer {jwt.encode({'sub': 'alice', 'exp': 4_000_000_000}, key, algorithm, headers)}"


def put(file: Path, text: str) -> None:
    """Put another file in its place, as those do who hand out secrets."""
    other = file.with_suffix(".new")
    other.write_text(text)
    os.replace(other, file)  # noqa: PTH105 - all at once is what this is about


async def let_in(who: Authenticator, *authorizations: str) -> list[bool]:
    found = []
    for authorization in authorizations:
        try:
            await who.caller(authorization)
            found.append(True)
        except Problem as problem:
            found.append(problem.status != 401)
    return found


async def test_secrets_of_tokens_are_replaced_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(f"{OLD}\n")
    who = project_authenticator(settings(jwt_secret=None, jwt_secrets_file=file))
    tokens = token(OLD), token(NEW)
    assert await let_in(who, *tokens) == [True, False]
    put(file, f"{NEW}\n\n  {OLD}  \n")
    assert await let_in(who, *tokens) == [True, True]
    put(file, NEW)
    assert await let_in(who, *tokens) == [False, True]


async def test_a_secret_from_the_environment_is_good_beside_those_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(NEW)
    who = project_authenticator(settings(jwt_secret=OLD, jwt_secrets_file=file))
    assert await let_in(who, token(OLD), token(NEW), token(THIRD)) == [True, True, False]


async def test_keys_of_an_issuer_in_a_file_are_replaced_without_a_restart(tmp_path: Path) -> None:
    def key_set(**keys: rsa.RSAPrivateKey) -> str:
        made = [
            {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())), "kid": key_id}
            for key_id, key in keys.items()
        ]
        return json.dumps({"keys": made})

    file = tmp_path / "jwks.json"
    file.write_text(key_set(old=RSA_OLD))
    who = project_authenticator(settings(jwt_algorithm="RS256", jwt_jwks_file=file))
    tokens = token(RSA_OLD, "RS256", "old"), token(RSA_NEW, "RS256", "new")
    assert await let_in(who, *tokens) == [True, False]
    put(file, key_set(old=RSA_OLD, new=RSA_NEW))
    assert await let_in(who, *tokens) == [True, True]
    put(file, key_set(new=RSA_NEW))
    assert await let_in(who, *tokens) == [False, True]


async def test_api_keys_are_replaced_without_a_restart(tmp_path: Path) -> None:
    def keys(*given: str, tenants: tuple[str, ...] = ("acme",)) -> str:
        return json.dumps({sha256(key.encode()).hexdigest(): tenants for key in given})

    file = tmp_path / "keys.json"
    file.write_text(keys("old"))
    who = batch_authenticator(settings(api_keys={}, api_keys_file=file))
    assert await let_in(who, "Bearer old", "Bearer new") == [True, False]
    put(file, keys("old", "new"))
    assert await let_in(who, "Bearer old", "Bearer new") == [True, True]
    put(file, keys("new", tenants=("globex",)))
    assert await let_in(who, "Bearer old", "Bearer new") == [False, True]
    caller = await who.caller("Bearer new")
    assert (caller.may_use("globex"), caller.may_use("acme")) == (True, False)


@pytest.mark.parametrize("text", ["", "\n", "short", f"{NEW}\nshort", None], ids=str)
async def test_a_change_that_cannot_be_used_is_told_once_and_changes_nothing(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "secrets"
    file.write_text(OLD)
    who = project_authenticator(settings(jwt_secret=None, jwt_secrets_file=file))
    if text is None:
        file.unlink()
    else:
        put(file, text)
    with capture_logs() as logs:
        assert await let_in(who, token(OLD), token(OLD), token(NEW)) == [True, True, False]
    (log,) = logs
    assert (log["log_level"], log["setting"]) == ("error", "JWT_SECRETS_FILE")
    assert NEW not in str(log)
    put(file, NEW)
    assert await let_in(who, token(OLD), token(NEW)) == [False, True]


@pytest.mark.parametrize("text", ["", "\n \n", "short", f"{NEW}\nshort", None], ids=str)
def test_a_file_of_secrets_that_is_none_stops_the_start(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "secrets"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="JWT_SECRETS_FILE") as refused:
        project_authenticator(settings(jwt_secret=None, jwt_secrets_file=file))
    assert NEW not in str(refused.value)


def test_a_file_of_secrets_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JWT_SECRET", raising=False)
    assert GatewaySettings(jwt_secrets_file=Path("somewhere")).jwt_secret is None
    with pytest.raises(ValidationError, match="shorter than 32"):
        GatewaySettings(jwt_secrets_file=Path("somewhere"), jwt_secret="short")


def test_the_file_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "LOOK_SECONDS", 1.0)
    clock, file = Clock(), tmp_path / "file"
    file.write_bytes(b"1")
    followed = KeyFile(file, int, "A_SETTING", clock)
    put(file, "2")
    clock.now = 0.9
    assert followed.value() == 1
    clock.now = 1.0
    assert followed.value() == 2


async def test_nobody_with_half_a_character_in_a_name_is_let_in() -> None:
    who = project_authenticator(settings(jwt_secret=OLD))
    for claims in ({"sub": "a\ud800"}, {"sub": "a", "username": "\udfffb"}, {"userName": "\ud83e"}):
        given = jwt.encode({**claims, "exp": 4_000_000_000}, OLD, "HS256")
        assert await let_in(who, f"Bearer {given}") == [False]
    whole = jwt.encode({"sub": "a\N{PILE OF POO}", "exp": 4_000_000_000}, OLD, "HS256")
    assert await let_in(who, f"Bearer {whole}") == [True]
