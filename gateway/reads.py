"""Reading one's own writes: waits until the read model is as far as a caller may expect."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from cachetools import LRUCache
from starlette.responses import Response

from gateway.exchange import ReadOptions, json_answer
from gateway.limits import Limit, ShareExceeded
from gateway.problems import Problem, unavailable
from gateway.queries import ReadModel, ReadModels
from shared.errors import Unavailable
from shared.ids import EventId, StreamId

REMEMBERED_WAIT = 1.0
"""How long a read waits, by itself, for the last that this gateway acknowledged or let others read of its stream."""
PROJECTED_WAIT = 10.0
"""How long a write with ``?wait=projected`` waits."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05
_PAUSE = 0.25
"""Of the time waited so far: by so much of it a wait may be longer than it had to be."""


class Reads:
    """Every read begins here. Remembers, within bounds, what was acknowledged or read last on each stream."""

    def __init__(self, read_models: ReadModels, *, most: int, remembered: int) -> None:
        self._read_models = read_models
        self._limit = Limit(most, "reads")
        self._acknowledged: LRUCache[StreamId, EventId] = LRUCache(remembered)

    def remember(self, stream: StreamId, event_id: EventId) -> None:
        """Note that somebody was told of this event, so that their next read waits for it."""
        if event_id > self._acknowledged.get(stream, 0):
            self._acknowledged[stream] = event_id

    async def answer(
        self,
        caller: str,
        stream: StreamId,
        options: ReadOptions,
        ask: Callable[[ReadModel], Awaitable[bytes | None]],
        missing: str,
    ) -> Response:
        """What ``ask`` finds in one read model, with how far that is in the stream. ``missing`` is said for `None`.

        Waits for the event_id that the caller asks for and, up to a second, for what was acknowledged or read here.

        Raises:
            Problem: 404, or 503 if the event_id was not reached in time.
            Unavailable: nothing can be read now.
            ShareExceeded: this caller reads too much at once.
        """
        wanted = options.min_event_id or 0
        remembered = self._acknowledged.get(stream, 0)
        patience = REMEMBERED_WAIT if options.min_event_id is None else options.patience
        with self._under_way(caller):
            model, event_id = await self._wait_event_id(stream, max(wanted, remembered), patience)
            headers = {"X-Event-Id": str(event_id)}
            if event_id < wanted:
                detail = f"The read model is at event {event_id} of this stream, not at {wanted} yet"
                raise unavailable(detail, headers=headers)
            body = await ask(model)
            self.remember(stream, event_id)  # another generation of read models may be a moment behind this one
        if body is None:
            raise Problem("not_found", missing, headers=headers)
        return json_answer(body, headers=headers)

    async def wait_projected(self, caller: str, stream: StreamId, event_id: EventId) -> bool:
        """Whether the event can be read, within `PROJECTED_WAIT` seconds."""
        try:
            with self._under_way(caller):
                _, reached = await self._wait_event_id(stream, event_id, PROJECTED_WAIT)
        except (Unavailable, ShareExceeded):
            return False
        return reached >= event_id

    @contextmanager
    def _under_way(self, caller: str) -> Iterator[None]:
        self._limit.take(caller)
        try:
            yield
        finally:
            self._limit.give_back(caller)

    async def _wait_event_id(self, stream: StreamId, target: int, seconds: float) -> tuple[ReadModel, EventId]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            model = self._read_models.current()
            event_id = await model.event_id(stream)
            waited = loop.time() - began
            if event_id >= target or waited >= seconds:
                return model, event_id
            pause = min(max(_PAUSE * waited, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            await asyncio.sleep(min(pause, seconds - waited))
