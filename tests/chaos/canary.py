"""Asks whether the service serves: a write and a read of it, through every gateway and in every partition."""

import asyncio
import itertools
import time
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Self

import httpx

from shared.kafka import partition_of
from tests.chaos.stack import PARTITIONS, ChaosStack

_PATIENCE = 3.0
"""Seconds after which an attempt is given up, and made again under the same key."""
_PAUSE = 0.1


def _tenants() -> list[str]:
    """Give one tenant for each partition."""
    found: dict[int, str] = {}
    for number in itertools.count():
        tenant = f"canary-{number}"
        found.setdefault(partition_of(f"tenant:{tenant}".encode(), PARTITIONS), tenant)
        if len(found) == PARTITIONS:
            return [found[partition] for partition in range(PARTITIONS)]
    raise AssertionError


TENANTS = _tenants()


class Canary:
    """Writes to streams of its own, as an `async with` block."""

    def __init__(self, stack: ChaosStack) -> None:
        self._stack = stack
        self._exits = AsyncExitStack()
        self._number = itertools.count(1)

    async def __aenter__(self) -> Self:
        client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._stack.api_key}"},
            timeout=_PATIENCE,
            limits=httpx.Limits(max_connections=200, max_keepalive_connections=0),  # each attempt knocks anew
        )
        self._http = await self._exits.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def wait_service(self, since: float, *, within: float = 90) -> float:
        """Wait until a write, and then a read of it, has worked in each partition through each gateway.

        Gives the seconds from `since`, a `time.monotonic()`, until the last of them had.

        Raises:
            NoService: it has not worked after `within` seconds from now; says where, and what was heard there.
        """
        heard: dict[str, str] = {}
        cells = [(url, tenant) for url in self._stack.gateway_urls() for tenant in TENANTS]
        try:
            async with asyncio.timeout(within), asyncio.TaskGroup() as tasks:
                for url, tenant in cells:
                    tasks.create_task(self._serve_once(url, tenant, heard))
        except TimeoutError:
            raise NoService(f"no service after {within:.0f} s: {heard}") from None
        return time.monotonic() - since

    async def _serve_once(self, url: str, tenant: str, heard: dict[str, str]) -> None:
        key = f"canary-{next(self._number)}"
        cell = f"{url} {tenant}"
        written: httpx.Response | None = None
        while url in self._stack.gateway_urls():
            try:
                if written is None:
                    response = await self._http.post(
                        f"{url}/v1/episodes",
                        json={"tenant_id": tenant, "episodes": [{"content": key}]},
                        headers={"Idempotency-Key": key},
                    )
                    if response.status_code == HTTPStatus.CREATED:
                        written = response
                        continue
                else:
                    identity = written.json()["episode_ids"][0]
                    response = await self._http.get(
                        f"{url}/v1/episodes/{identity}",
                        params={"tenant_id": tenant},
                        headers={"X-Min-Event-Id": written.headers["X-Event-Id"]},
                    )
                    if response.status_code == HTTPStatus.OK:
                        break
                heard[cell] = f"{'write' if written is None else 'read'}: {response.status_code} {response.text[:200]}"
            except httpx.HTTPError as error:
                heard[cell] = f"{'write' if written is None else 'read'}: {error!r}"
            await asyncio.sleep(_PAUSE)
        heard.pop(cell, None)


class NoService(Exception):
    """The service does not serve."""
