"""Who asks, and what they may touch: JWTs for the projects API, API keys for the batch API."""

import asyncio
import hmac
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import jwt
import msgspec
import structlog
from cachetools import TTLCache

from gateway.key_files import KeyFile
from gateway.problems import Problem, unauthorized
from gateway.settings import GatewaySettings, are_hashes, are_secrets
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

    async def keys(self, key_id: str | None) -> Sequence[Any]:
        """The keys that a token which names this one may be signed with; none if there is no such key.

        Raises:
            Unavailable: no keys are known yet.
        """

    def is_known(self, key_id: str | None, key: Any) -> bool:
        """Whether it is still one of them, as far as that is known without waiting."""


def project_authenticator(settings: GatewaySettings) -> Authenticator:
    """For the projects API.

    Raises:
        ValueError: the file of keys cannot be used.
    """
    if settings.auth_disabled:
        return Anybody()
    return JwtAuthenticator(
        _key_source(settings),
        settings.jwt_algorithm,
        allow_no_exp=settings.jwt_allow_no_exp,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
    )


def _key_source(settings: GatewaySettings) -> "KeySource":
    if settings.jwt_jwks_file is not None:
        return JwksFile(KeyFile(settings.jwt_jwks_file, _key_set, "JWT_JWKS_FILE"))
    if settings.jwt_jwks_url is not None:
        url: str = settings.jwt_jwks_url
        return JwksKeys(lambda: _fetch(url))
    given = [] if settings.jwt_secret is None else [settings.jwt_secret]
    if settings.jwt_secrets_file is None:
        return Secrets(given)
    return Secrets(given, KeyFile(settings.jwt_secrets_file, _secrets_in, "JWT_SECRETS_FILE"))


def batch_authenticator(settings: GatewaySettings) -> Authenticator:
    """For the batch API.

    Raises:
        ValueError: the file of keys cannot be used.
    """
    if settings.auth_disabled:
        return Anybody()
    file = None
    if settings.api_keys_file is not None:
        file = KeyFile(settings.api_keys_file, _keys_in, "API_KEYS_FILE")
    elif not settings.api_keys:
        _log.warning("no API_KEYS and no API_KEYS_FILE: every request of the batch API is answered 401")
    return ApiKeyAuthenticator(settings.api_keys, file)


def _keys_in(text: bytes) -> "Mapping[str, Caller]":
    return _key_holders(are_hashes(msgspec.json.decode(text, type=dict[str, tuple[str, ...]])))


def _secrets_in(text: bytes) -> Sequence[str]:
    """One a line."""
    secrets = [line for each in text.decode().splitlines() if (line := each.strip())]
    if not secrets:
        raise ValueError("there is no secret in it")
    return are_secrets(secrets)


class Anybody:
    """Authentication switched off: everybody may do everything and owns every namespace."""

    async def caller(self, authorization: str | None) -> Caller:  # noqa: ARG002 - the port's
        return Caller("anonymous", frozenset(), all_open=True, owns_all=True)


class ApiKeyAuthenticator:
    """Knows the SHA-256 of each key and the tenants it is good for. Those in the file may change at any time."""

    def __init__(
        self, tenants_of: Mapping[str, tuple[str, ...]], file: "KeyFile[Mapping[str, Caller]] | None" = None
    ) -> None:
        self._holders = _key_holders(tenants_of)
        self._file = file

    async def caller(self, authorization: str | None) -> Caller:
        given = sha256(_bearer(authorization).encode("latin-1")).hexdigest()
        found = None
        for holders in (self._holders, self._file.value() if self._file else {}):
            for digest, caller in holders.items():  # all of them, always: time tells nothing
                if hmac.compare_digest(digest, given):
                    found = caller
        if found is None:
            raise unauthorized("This API key is not known", error="invalid_token")
        return found


def _key_holders(tenants_of: Mapping[str, tuple[str, ...]]) -> Mapping[str, Caller]:
    return {
        digest: Caller(f"key:{digest[:16]}", frozenset(tenants) - {EVERYTHING}, all_open=EVERYTHING in tenants)
        for digest, tenants in tenants_of.items()
    }


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
        if verified is None or not self._keys.is_known(verified.key_id, verified.key):
            verified = self._verified[digest] = await self._verify(token)
        if not verified.not_before <= self._clock() < verified.expires_at:
            raise _bad_token("it has expired or is not valid yet")
        return verified.caller

    async def _verify(self, token: str) -> "_Verified":
        try:
            key_id = jwt.get_unverified_header(token).get("kid")
            keys = await self._keys.keys(key_id)
            if not keys:
                raise _bad_token("it is signed with an unknown key")
            key, claims = self._decode(token, keys)
            return _Verified(
                _caller(claims),
                not_before=int(claims.get("nbf", 0)),
                expires_at=int(claims["exp"]) if "exp" in claims else float("inf"),
                key_id=key_id,
                key=key,
            )
        except jwt.PyJWTError as error:
            raise _bad_token(str(error) or "it cannot be read") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _bad_token("it cannot be read") from error

    def _decode(self, token: str, keys: Sequence[Any]) -> tuple[Any, Mapping[str, Any]]:
        """The key that the token is signed with, and its claims."""
        *others, last = keys
        for key in others:
            try:
                return key, self._decode_with(token, key)
            except jwt.InvalidSignatureError:
                continue
        return last, self._decode_with(token, last)

    def _decode_with(self, token: str, key: Any) -> Mapping[str, Any]:
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[self._algorithm],
            options=self._options,
            audience=self._audience,
            issuer=self._issuer,
        )
        return claims


@dataclass(frozen=True, slots=True)
class _Verified:
    caller: Caller
    not_before: float
    expires_at: float
    key_id: str | None
    key: Any
    """It is good as long as this is."""


def _caller(claims: Mapping[str, Any]) -> Caller:
    names = (claims.get("username"), claims.get("userName"), claims.get("sub"))
    slug = next((name for name in names if isinstance(name, str) and name), None)
    if slug is None:
        raise _bad_token("it names nobody: username, userName and sub are missing")
    actor = claims.get("sub") or slug
    if not (_is_text(slug) and _is_text(actor)):
        raise _bad_token("it names somebody with characters that are none")
    granted = claims.get("namespaces")
    namespaces = {name for name in granted if isinstance(name, str)} if isinstance(granted, list) else set()
    return Caller(
        actor=actor,
        open_to=frozenset(namespaces - {EVERYTHING} | {slug}),
        all_open=EVERYTHING in namespaces,
        slug=slug,
    )


def _is_text(name: str) -> bool:
    """Lone surrogates, which JSON allows, could not be written into an event."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


class Secrets:
    """Shared secrets, each as good as the others. Those in the file may change at any time."""

    def __init__(self, given: Sequence[str], file: KeyFile[Sequence[str]] | None = None) -> None:
        self._given = given
        self._file = file

    async def keys(self, key_id: str | None) -> Sequence[str]:  # noqa: ARG002 - the port's
        return self._now()

    def is_known(self, key_id: str | None, key: str) -> bool:  # noqa: ARG002 - the port's
        return key in self._now()

    def _now(self) -> Sequence[str]:
        return self._given if self._file is None else [*self._given, *self._file.value()]


class JwksFile:
    """An issuer's key set (RFC 7517) in a file, which may change at any time."""

    def __init__(self, file: "KeyFile[Mapping[str | None, Any]]") -> None:
        self._file = file

    async def keys(self, key_id: str | None) -> Sequence[Any]:
        key = self._file.value().get(key_id)
        return () if key is None else (key,)

    def is_known(self, key_id: str | None, key: Any) -> bool:
        return self._file.value().get(key_id) is key


class JwksKeys:
    """An issuer's key set (RFC 7517) at a URL, looked at again when a token names a key that is not in it."""

    def __init__(self, load: Callable[[], bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._load = load
        self._clock = clock
        self._keys: Mapping[str | None, Any] | None = None
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def keys(self, key_id: str | None) -> Sequence[Any]:
        if self._must_look(key_id):
            async with self._looking:
                if self._must_look(key_id):
                    await self._look()
        if self._keys is None:
            raise Unavailable("the keys of the tokens' issuer cannot be fetched")
        key = self._keys.get(key_id)
        return () if key is None else (key,)

    def is_known(self, key_id: str | None, key: Any) -> bool:
        return self._keys is not None and self._keys.get(key_id) is key

    def _must_look(self, key_id: str | None) -> bool:
        age = self._clock() - self._looked_at
        return age > _STALE_SECONDS or (age > _REFRESH_SECONDS and (self._keys is None or key_id not in self._keys))

    async def _look(self) -> None:
        try:
            self._keys = _key_set(await asyncio.to_thread(self._load))
        except (OSError, ValueError) as error:
            _log.warning("the keys of the tokens' issuer cannot be fetched", reason=str(error))
        self._looked_at = self._clock()


def _key_set(text: bytes) -> Mapping[str | None, Any]:
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
