"""What a gateway must be told before it starts."""

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.settings import GatewaySettings


@pytest.fixture(autouse=True)
def _nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JWT_SECRET", "API_KEYS", "AUTH_DISABLED", "JWT_ALGORITHM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, "JWT_SECRET is not set"),
        ({"jwt_secret": "x" * 31}, "shorter than 32 bytes"),
        ({"jwt_algorithm": "RS256"}, "needs one of JWT_JWKS_FILE and JWT_JWKS_URL"),
        ({"jwt_algorithm": "ES256", "jwt_secret": "x" * 32}, "needs one of"),
        ({"jwt_algorithm": "RS256", "jwt_jwks_file": "f", "jwt_jwks_url": "https://x"}, "needs one of"),
        ({"jwt_algorithm": "RS256", "jwt_jwks_url": "file:///etc/passwd"}, "must begin with https://"),
        ({"jwt_algorithm": "none"}, "HS256"),
        ({"jwt_secret": "x" * 32, "api_keys": {"plain": ["t"]}}, "SHA-256"),
    ],
)
def test_what_would_be_unsafe_stops_the_start(told: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        GatewaySettings(**told)


def test_authentication_is_switched_off_only_on_purpose() -> None:
    assert GatewaySettings(auth_disabled=True).auth_disabled
    assert not GatewaySettings(jwt_secret="x" * 32).auth_disabled


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", "x" * 32)
    monkeypatch.setenv("API_KEYS", '{"' + "0" * 64 + '": ["acme", "*"]}')
    monkeypatch.setenv("GATEWAY_PORT", "1234")
    settings = GatewaySettings()
    assert settings.api_keys == {"0" * 64: ("acme", "*")}
    assert settings.gateway_port == 1234


def test_secrets_are_not_shown() -> None:
    settings = GatewaySettings(jwt_secret="hidden-" + "x" * 32, api_keys={"f" * 64: ("t",)})
    assert "hidden" not in repr(settings)
    assert "fff" not in repr(settings)
