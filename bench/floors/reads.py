"""The bare way of a read: a Starlette route with one Motor query in it, and Motor without any HTTP.

    python -m bench.floors.reads serve --mongodb URL --database NAME --port 9001
    python -m bench.floors.reads find_one|find_in|find_range --mongodb URL --database NAME --seconds 5

``GET /episodes/{id}`` is one `find_one`; ``GET /pages/{id}?skip=&limit=`` is one range of an index, the query that the
service makes for a page. Documents are answered as they are found. The others print JSON: what Motor does a second,
documents by `find_one` and by `$in`, and pages of the range. All run as our processes do: uvloop, httptools, the
interpreter and the allocator tuned alike.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import uvicorn
import uvloop
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.queries import LISTED
from shared.process import tune_allocator, tune_interpreter

CALLERS = 64
CALLERS_OF_MANY = 4
"""Of those who ask for as many documents at once as there are callers else."""
PAGE = 50
KNOWN = 2_000

Collection = AsyncIOMotorCollection[dict[str, Any]]


class Routes:
    """Two queries."""

    def __init__(self, tenant_episodes: Collection, project_episodes: Collection) -> None:
        self._tenant_episodes = tenant_episodes
        self._project_episodes = project_episodes

    async def get(self, request: Request) -> Response:
        found = await self._tenant_episodes.find_one({"_id": request.path_params["id"]})
        return _json(found, 404 if found is None else 200)

    async def page(self, request: Request) -> Response:
        skip, limit = int(request.query_params["skip"]), int(request.query_params["limit"])
        return _json({"episodes": await page(self._project_episodes, request.path_params["id"], skip, limit)})

    async def health(self, _: Request) -> Response:
        return _json({})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/episodes/{id}", self.get),
                Route("/pages/{id}", self.page),
                Route("/healthz", self.health),
            ]
        )


async def page(episodes: Collection, project_id: str, skip: int, limit: int) -> list[dict[str, Any]]:
    """A range of the index by which lists are made."""
    living = {"project_id": project_id, "deleted": False, "ordinal": {"$gt": 0}}
    found = episodes.find(living, LISTED).sort("ordinal", 1).skip(skip).limit(limit)
    return await found.to_list(limit)


async def alone(query: str, tenant_episodes: Collection, project_episodes: Collection, seconds: float) -> float:
    """What the driver and the database do without HTTP, a second."""
    ids = [document["_id"] async for document in tenant_episodes.find({}, {"_id": True}).limit(KNOWN)]
    one = await project_episodes.find_one({"deleted": False})
    assert one is not None
    numbers = itertools.count()

    async def find_one() -> int:
        return 0 if await tenant_episodes.find_one({"_id": ids[next(numbers) % len(ids)]}) is None else 1

    async def find_in() -> int:
        wanted = [ids[next(numbers) % len(ids)] for _ in range(CALLERS)]
        return len(await tenant_episodes.find({"_id": {"$in": wanted}}).to_list(CALLERS))

    async def find_range() -> int:
        return 1 if await page(project_episodes, one["project_id"], 0, PAGE) else 0

    calls = {
        "find_one": (find_one, CALLERS),
        "find_in": (find_in, CALLERS_OF_MANY),
        "find_range": (find_range, CALLERS),
    }
    call, callers = calls[query]
    return await _rate(call, callers, seconds)


async def _rate(call: Callable[[], Awaitable[int]], callers: int, seconds: float) -> float:
    began = time.perf_counter()

    async def caller() -> int:
        done = 0
        while time.perf_counter() - began < seconds:
            done += await call()
        return done

    done = sum(await asyncio.gather(*(caller() for _ in range(callers))))
    return done / (time.perf_counter() - began)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("serve", "find_one", "find_in", "find_range"))
    parser.add_argument("--mongodb", required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(options.mongodb)
    database = client[options.database]
    collections = database.tenant_episodes, database.project_episodes
    if options.part != "serve":
        print(json.dumps({"rate": await alone(options.part, *collections, options.seconds)}))
        return
    config = uvicorn.Config(
        Routes(*collections).app(),
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        log_config=None,
        access_log=False,
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    tune_interpreter()
    tune_allocator()
    uvloop.run(main())
