"""What a gateway can be told, by environment variables. Read once, in `__main__`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from limits import RateLimitItem, parse
from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from shared.settings import Settings

SHORTEST_SECRET = 32
"""Bytes: as long as the digest that HS256 makes (RFC 7518, 3.2)."""


class GatewaySettings(Settings):
    """Where to listen, whom to let in, and how much to hold at once. Times are seconds."""

    model_config = SettingsConfigDict(arbitrary_types_allowed=True)

    gateway_host: str = "127.0.0.1"
    gateway_port: int = 8000

    auth_disabled: bool = False
    """Let everybody do everything. For trying things out on one's own machine."""
    jwt_algorithm: Literal["HS256", "RS256", "ES256"] = "HS256"
    jwt_secret: str | None = Field(default=None, repr=False)
    jwt_secrets_file: Path | None = None
    """More secrets, one a line, each as good as the others. The file is read again when it changes."""
    jwt_jwks_file: Path | None = None
    """Is read again when it changes."""
    jwt_jwks_url: str | None = None
    jwt_audience: str | None = None
    """If set, tokens must be meant for this audience."""
    jwt_issuer: str | None = None
    """If set, tokens must come from this issuer."""
    jwt_allow_no_exp: bool = False
    api_keys: dict[str, tuple[str, ...]] = Field(default={}, repr=False)
    """SHA-256 of a key, in hex → the tenants it is good for; ``*`` is all."""
    api_keys_file: Path | None = None
    """The same as JSON in a file, which is read again when it changes. Both may be given."""

    gateway_rate_limit: RateLimitItem | None = None
    """Requests of one caller to this gateway, like ``500/second``. Beyond: 429. Unlimited if not set."""
    gateway_refusal_seconds: float = Field(default=1.0, ge=0)
    """So long those wait for their 429 or 503 who ask for more than there is, lest they only ask faster."""
    gateway_max_in_flight: int = Field(default=4096, ge=1)
    """Commands published or waited for. Beyond: 503, and 429 for a caller who holds more than is free."""
    gateway_max_in_flight_bytes: int = Field(default=256 * 1024 * 1024, ge=1)
    """Their size, and apart from that the size of the bodies that are being received. Beyond: the same."""
    gateway_write_latency: float = Field(default=0.3, gt=0, allow_inf_nan=False)
    """While writes take longer, fewer are let in at once, until they do not. A part of it is for what Kafka and the
    ingestor have in hand; in the rest callers take turns."""
    gateway_max_reads: int = Field(default=1024, ge=1)
    """Reads under way. Beyond: the same."""
    gateway_max_connections: int = Field(default=16384, ge=1)
    """Open connections. Beyond: 503."""
    gateway_max_unread_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    """Answers that wait for clients who read slowly. Beyond: other reads wait, and the slowest reader is cut."""
    gateway_body_seconds: float = Field(default=60.0, gt=0)
    """For a body to arrive. Beyond: 408."""
    gateway_reply_timeout: float = Field(default=10.0, gt=0)
    """How long a write waits for the ingestor's reply. Beyond: 504."""
    gateway_min_event_wait: float = Field(default=2.0, ge=0)
    """How long a read waits for the event_id in X-Min-Event-Id, unless `Prefer: wait=N` says otherwise."""
    gateway_remembered_streams: int = Field(default=100_000, ge=1)
    """Streams whose last acknowledged event_id is remembered, for reads that follow writes."""
    gateway_drain_seconds: float = Field(default=1.0, ge=0)
    """After SIGTERM: how long clients have to hear, with an answer, that they must close; then idle ones are closed."""
    gateway_stop_seconds: int = Field(default=15, ge=1)
    """How long running requests then have to end."""

    @field_validator("gateway_rate_limit", mode="before")
    @classmethod
    def _is_rate(cls, rate: Any) -> Any:
        return parse(rate) if isinstance(rate, str) else rate

    @field_validator("api_keys")
    @classmethod
    def _are_hashes(cls, keys: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return are_hashes(keys)

    @model_validator(mode="after")
    def _has_authentication(self) -> Self:
        if self.auth_disabled:
            return self
        if self.jwt_algorithm == "HS256":
            if self.jwt_secret is None and self.jwt_secrets_file is None:
                raise ValueError(
                    "JWT_SECRET is not set (nor JWT_SECRETS_FILE, nor JWT_ALGORITHM with JWT_JWKS_FILE or "
                    "JWT_JWKS_URL): nobody could be let in. AUTH_DISABLED=true lets everybody in"
                )
            if self.jwt_secret is not None and len(self.jwt_secret.encode()) < SHORTEST_SECRET:
                raise ValueError(f"JWT_SECRET is shorter than {SHORTEST_SECRET} bytes: it could be guessed")
        elif (self.jwt_jwks_file is None) == (self.jwt_jwks_url is None):
            raise ValueError(f"JWT_ALGORITHM={self.jwt_algorithm} needs one of JWT_JWKS_FILE and JWT_JWKS_URL")
        if self.jwt_jwks_url is not None and not self.jwt_jwks_url.startswith(("https://", "http://")):
            raise ValueError("JWT_JWKS_URL must begin with https:// or http://")
        return self


def are_secrets(secrets: Sequence[str]) -> Sequence[str]:
    """The secrets, if each is long enough.

    Raises:
        ValueError: one is not.
    """
    if any(len(secret.encode()) < SHORTEST_SECRET for secret in secrets):
        raise ValueError(f"a secret is shorter than {SHORTEST_SECRET} bytes: it could be guessed")
    return secrets


def are_hashes(keys: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The keys, if they are given as hashes.

    Raises:
        ValueError: one is not.
    """
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in keys):
        raise ValueError("a key must be given as its SHA-256, 64 lower-case hex digits")
    return keys
