"""Who asks, and what they may touch: JWTs for the projects API, API keys for the batch API."""

import asyncio
import hmac
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import jwt
import msgspec
import structlog
from cachetools import TTLCache

from gateway.problems import Problem, unauthorized
from gateway.settings import GatewaySettings, are_hashes
from shared.errors import Unavailable

EVERYTHING = "*"

_REMEMBERED_TOKENS = 4096
_REMEMBERED_SECONDS = 60
_REFRESH_SECONDS = 10
"""The shortest time between two looks at the issuer's keys."""
_STALE_SECONDS = 600
"""After that the keys are looked at again, so that one that was withdrawn is one day refused."""
_FETCH_SECONDS = 5
_LARGEST_KEY_SET = 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """A known caller, with the namespaces or tenants that are open to them."""

    actor: str
    """What events say of who made them."""
    open_to: frozenset[str]
    all_open: bool = False
    slug: str | None = None
    """Their own namespace."""
    owns_all: bool = False

    def may_use(self, name: str) -> bool:
        return self.all_open or name in self.open_to

    def owns(self, namespace: str) -> bool:
        return self.owns_all or namespace == self.slug


class Authenticator(Protocol):
    """Tells who asks."""

    async def caller(self, authorization: str | None) -> Caller:
        """The caller, by the request's ``Authorization`` header.

        Raises:
            Problem: 401, it is nobody known.
            Unavailable: that cannot be told now.
        """


class KeySource(Protocol):
    """Where the keys come from that tokens are signed with."""

    async def key(self, key_id: str | None) -> Any:
        """The key, or `None` if there is no such key.

        Raises:
            Unavailable: no keys are known yet.
        """


def project_authenticator(settings: GatewaySettings) -> Authenticator:
    """For the projects API.

    Raises:
        ValueError: the file of keys cannot be used.
    """
    if settings.auth_disabled:
        return Anybody()
    keys: KeySource
    if settings.jwt_jwks_file is not None:
        path: Path = settings.jwt_jwks_file
        try:
            _key_set(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"JWT_JWKS_FILE: {error}") from error
        keys = JwksKeys(path.read_bytes)
    elif settings.jwt_jwks_url is not None:
        url: str = settings.jwt_jwks_url
        keys = JwksKeys(lambda: _fetch(url))
    else:
        keys = Secret(settings.jwt_secret or "")
    return JwtAuthenticator(
        keys,
        settings.jwt_algorithm,
        allow_no_exp=settings.jwt_allow_no_exp,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
    )


def batch_authenticator(settings: GatewaySettings) -> Authenticator:
    """For the batch API.

    Raises:
        ValueError: the file of keys cannot be used.
    """
    if settings.auth_disabled:
        return Anybody()
    tenants_of = dict(settings.api_keys)
    if settings.api_keys_file is not None:
        tenants_of |= _keys_in(settings.api_keys_file)
    if not tenants_of:
        _log.warning("no API_KEYS and no API_KEYS_FILE: every request of the batch API is answered 401")
    return ApiKeyAuthenticator(tenants_of)


def _keys_in(path: Path) -> Mapping[str, tuple[str, ...]]:
    try:
        return are_hashes(msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[str, ...]]))
    except (OSError, ValueError) as error:
        raise ValueError(f"API_KEYS_FILE: {error}") from error


class Anybody:
    """Authentication switched off: everybody may do everything and owns every namespace."""

    async def caller(self, authorization: str | None) -> Caller:  # noqa: ARG002 - the port's
        return Caller("anonymous", frozenset(), all_open=True, owns_all=True)


class ApiKeyAuthenticator:
    """Knows the SHA-256 of each key and the tenants it is good for."""

    def __init__(self, tenants_of: Mapping[str, tuple[str, ...]]) -> None:
        self._callers = {
            digest: Caller(
                f"key:{digest[:16]}",
                frozenset(tenants) - {EVERYTHING},
                all_open=EVERYTHING in tenants,
            )
            for digest, tenants in tenants_of.items()
        }

    async def caller(self, authorization: str | None) -> Caller:
        given = sha256(_bearer(authorization).encode("latin-1")).hexdigest()
        found = None
        for digest, caller in self._callers.items():  # all of them, always: time tells nothing
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None:
            raise unauthorized("This API key is not known", error="invalid_token")
        return found


class JwtAuthenticator:
    """Believes tokens that are signed with a known key, by one algorithm, and good for now."""

    def __init__(
        self,
        keys: KeySource,
        algorithm: str,
        *,
        allow_no_exp: bool = False,
        audience: str | None = None,
        issuer: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._algorithm = algorithm
        self._audience = audience
        self._issuer = issuer
        self._clock = clock
        self._options: Any = {
            "require": [] if allow_no_exp else ["exp"],
            "verify_aud": audience is not None,
            "verify_iss": issuer is not None,
            "verify_iat": False,
        }
        self._verified: TTLCache[bytes, _Verified] = TTLCache(_REMEMBERED_TOKENS, _REMEMBERED_SECONDS, clock)

    async def caller(self, authorization: str | None) -> Caller:
        token = _bearer(authorization)
        digest = sha256(token.encode("latin-1")).digest()
        verified = self._verified.get(digest)
        if verified is None:
            verified = self._verified[digest] = await self._verify(token)
        if not verified.not_before <= self._clock() < verified.expires_at:
            raise _bad_token("it has expired or is not valid yet")
        return verified.caller

    async def _verify(self, token: str) -> "_Verified":
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            key = await self._keys.key(key_id)
            if key is None:
                raise _bad_token("it is signed with an unknown key")
            claims = jwt.decode(
                token,
                key,
                algorithms=[self._algorithm],
                options=self._options,
                audience=self._audience,
                issuer=self._issuer,
            )
            return _Verified(
                _caller(claims),
                not_before=int(claims.get("nbf", 0)),
                expires_at=int(claims["exp"]) if "exp" in claims else float("inf"),
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _bad_token(str(error) or type(error).__name__) from error


@dataclass(frozen=True, slots=True)
class _Verified:
    caller: Caller
    not_before: float
    expires_at: float


def _caller(claims: Mapping[str, Any]) -> Caller:
    names = (claims.get("username"), claims.get("userName"), claims.get("sub"))
    slug = next((name for name in names if isinstance(name, str) and name), None)
    if slug is None:
        raise _bad_token("it names nobody: username, userName and sub are missing")
    granted = claims.get("namespaces")
    namespaces = {name for name in granted if isinstance(name, str)} if isinstance(granted, list) else set()
    return Caller(
        actor=claims.get("sub") or slug,
        open_to=frozenset(namespaces - {EVERYTHING} | {slug}),
        all_open=EVERYTHING in namespaces,
        slug=slug,
    )


class Secret:
    """One shared secret."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    async def key(self, key_id: str | None) -> str:  # noqa: ARG002 - the port's
        return self._secret


class JwksKeys:
    """An issuer's key set (RFC 7517), looked at again when a token names a key that is not in it."""

    def __init__(self, load: Callable[[], bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._clock = clock
        self._keys: dict[str | None, Any] | None = None
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def key(self, key_id: str | None) -> Any:
        if self._must_look(key_id):
            async with self._looking:
                if self._must_look(key_id):
                    await self._look()
        if self._keys is None:
            raise Unavailable("the keys of the tokens' issuer cannot be fetched")
        return self._keys.get(key_id)

    def _must_look(self, key_id: str | None) -> bool:
        age = self._clock() - self._looked_at
        return age > _STALE_SECONDS or (age > _REFRESH_SECONDS and (self._keys is None or key_id not in self._keys))

    async def _look(self) -> None:
        try:
            self._keys = _key_set(await asyncio.to_thread(self._load))
        except (OSError, ValueError) as error:
            _log.warning("the keys of the tokens' issuer cannot be fetched", reason=str(error))
        self._looked_at = self._clock()


def _key_set(text: bytes) -> dict[str | None, Any]:
    """Keys by their id. A lone key is also good for tokens that name none."""
    try:
        keys = jwt.PyJWKSet.from_json(text.decode()).keys
    except (jwt.PyJWTError, AttributeError, TypeError) as error:
        raise ValueError(f"not a JSON Web Key Set: {error}") from error
    by_id: dict[str | None, Any] = {key.key_id: key.key for key in keys}
    if len(keys) == 1:
        by_id[None] = keys[0].key
    return by_id


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_FETCH_SECONDS) as answer:  # noqa: S310 - http or https, see settings
        text: bytes = answer.read(_LARGEST_KEY_SET)
        return text


def _bearer(authorization: str | None) -> str:
    scheme, _, credentials = (authorization or "").partition(" ")
    credentials = credentials.strip()
    if scheme.lower() != "bearer" or not credentials:
        raise unauthorized("Authorization: Bearer … is missing")
    return credentials


def _bad_token(why: str) -> Problem:
    return unauthorized(f"This token is not valid: {why}", error="invalid_token")
