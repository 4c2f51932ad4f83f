"""Keeps every generation up to date: the one in use, those kept for a rollback, one that was just loaded."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from projector import generations
from projector.documents import DocumentStore
from projector.loop import run
from projector.mongodb import Generation, open_documents
from projector.settings import ProjectorSettings
from shared.errors import Unavailable
from shared.mongo import Client
from shared.probes import Status
from shared.settings import KafkaSettings
from shared.supervisor import backoff, end_task, keep_running

_LOOK_SECONDS = 0.5

_log = structlog.get_logger(__name__)


class Following:
    """Knows which generations there are, and runs a partition once for each of them."""

    def __init__(self, client: Client, kafka: KafkaSettings, settings: ProjectorSettings, status: Status) -> None:
        self._client = client
        self._kafka = kafka
        self._settings = settings
        self._status = status
        self._in_use = 0
        self._statuses: defaultdict[int, Status] = defaultdict(Status)
        self._generations: dict[int, Generation] = {}
        self._wanted: frozenset[int] = frozenset()
        self._changed = asyncio.Event()

    async def begin(self) -> None:
        """Wait for MongoDB, and make sure that there is a generation."""
        attempt = 0
        self._status.waiting_for["mongodb"] = "it has not answered yet"
        while True:
            try:
                await generations.prepare(self._client)
                await self._look()
            except Unavailable as error:
                self._status.waiting_for["mongodb"] = str(error)
                _log.warning("waiting for MongoDB", reason=str(error))
                attempt += 1
                await asyncio.sleep(backoff(attempt))
            else:
                del self._status.waiting_for["mongodb"]
                return

    async def look_on(self) -> None:
        """Notice generations that come and go, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._look()
            except Unavailable as error:
                _log.debug("generations not looked at", reason=str(error))  # the partitions say that MongoDB is away

    async def run_partition(self, partition: int) -> None:
        """Run the partition for each generation, those that come later too, until cancelled."""
        running: dict[int, asyncio.Task[None]] = {}
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    changed = self._changed
                    for number in running.keys() - self._wanted:
                        await end_task(running.pop(number))
                    for number in sorted(self._wanted - running.keys()):
                        running[number] = tasks.create_task(self._keep_running(partition, number))
                    await changed.wait()
        finally:
            for status in self._statuses.values():
                status.partitions.pop(partition, None)

    async def _keep_running(self, partition: int, number: int) -> None:
        status = self._statuses[number]

        async def run_generation(partition: int) -> None:
            await run(
                partition,
                kafka=self._kafka,
                open_documents=lambda partition: self._open_documents(number, partition),
                status=status,
                max_events=self._settings.max_batch_events,
            )

        await keep_running(partition, run_generation, status)

    @asynccontextmanager
    async def _open_documents(self, number: int, partition: int) -> AsyncIterator[DocumentStore]:
        if number not in await generations.live(self._client):
            await self._look()
            raise Unavailable(f"generation {number} was dropped")  # soon this task is ended
        if number not in self._generations:
            self._generations[number] = Generation(self._client, number)
        async with open_documents(self._client, number, partition, self._generations[number]) as documents:
            yield documents

    async def _look(self) -> None:
        in_use, wanted = await generations.in_use(self._client), await generations.live(self._client)
        if not wanted:  # all of MongoDB was lost, and this is an empty one
            _log.warning("there are no read models: making them from the start of the log")
            in_use = await generations.prepare(self._client)
            wanted = await generations.live(self._client)
        if in_use != self._in_use:
            _log.info("generation in use", generation=in_use, before=self._in_use or None)
        self._in_use = in_use
        self._status.partitions = self._statuses[in_use].partitions
        self._status.details["generations"] = {
            str(number): self._statuses[number].report()["partitions"] for number in sorted(wanted)
        }
        if wanted != self._wanted:
            self._wanted = wanted
            for number in self._statuses.keys() - wanted:
                del self._statuses[number]
                self._generations.pop(number, None)
            self._changed.set()
            self._changed = asyncio.Event()
