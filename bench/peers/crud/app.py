"""The service a team would write instead: FastAPI and Motor, straight into MongoDB, no log.

    MONGODB_URL=… JWT_SECRET=… API_KEY=… uvicorn bench.peers.crud.app:app

The same two writes and two reads, the same authentication, the indexes of our read models, and a write is answered once
a majority has it in its journal. No idempotency keys, no event ids, no history, no counters.
"""

import hashlib
import hmac
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import jwt
from bson import ObjectId
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pydantic import BaseModel, Field
from pymongo import ReturnDocument, WriteConcern

DATABASE = "crud"
_SECRET = os.environ["JWT_SECRET"]
_KEY_HASH = hashlib.sha256(os.environ["API_KEY"].encode()).hexdigest()


class Episode(BaseModel):
    """What is put into a project."""

    name: str = Field(min_length=1, max_length=255)
    description: str | None = None
    tags: list[str] = []
    folder: str | None = None
    status: str = "running"
    metadata: dict[str, Any] | None = None


class Item(BaseModel):
    """One of a batch."""

    content: str = Field(min_length=1, max_length=102_400)
    type: str = "message"
    source: str | None = Field(None, max_length=255)
    author: str | None = Field(None, max_length=255)
    channel: str | None = Field(None, max_length=255)
    timestamp: datetime | None = None
    metadata: dict[str, Any] = {}


class Batch(BaseModel):
    """What a tenant sends."""

    tenant_id: str = Field(min_length=1)
    namespace: str | None = None
    episodes: list[Item] = Field(min_length=1, max_length=1_000)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(os.environ["MONGODB_URL"])
    database = client.get_database(DATABASE, write_concern=WriteConcern(w="majority", j=True))
    await database.project_episodes.create_index(["namespace", "project", "name"], unique=True)
    await database.project_episodes.create_index(["namespace", "project", "deleted", "_id"])
    app.state.database = database
    yield
    client.close()


app = FastAPI(lifespan=_lifespan)


def _database(request: Request) -> AsyncIOMotorDatabase[dict[str, Any]]:
    database: AsyncIOMotorDatabase[dict[str, Any]] = request.app.state.database
    return database


def _user(authorization: Annotated[str, Header()]) -> str:
    try:
        claims = jwt.decode(authorization.removeprefix("Bearer "), _SECRET, algorithms=["HS256"])
    except jwt.InvalidTokenError as error:
        raise HTTPException(401, str(error)) from error
    return str(claims["username"])


def _has_key(authorization: Annotated[str, Header()]) -> None:
    digest = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).hexdigest()
    if not hmac.compare_digest(digest, _KEY_HASH):
        raise HTTPException(401, "the key is not known")


Database = Annotated[AsyncIOMotorDatabase[dict[str, Any]], Depends(_database)]


@app.get("/healthz")
async def health() -> dict[str, str]:
    """Alive."""
    return {"status": "ok"}


@app.post("/namespaces/{slug}/projects/{project}/episodes", status_code=201)
async def upsert(
    slug: str, project: str, episode: Episode, database: Database, user: Annotated[str, Depends(_user)]
) -> dict[str, Any]:
    """Create an episode, or change one of that name."""
    if user != slug:
        raise HTTPException(403, "this namespace is not yours")
    now = datetime.now(UTC)
    document = await database.project_episodes.find_one_and_update(
        {"namespace": slug, "project": project, "name": episode.name},
        {
            "$set": {**episode.model_dump(exclude={"name"}, exclude_unset=True), "updated_at": now},
            "$setOnInsert": {"created_at": now, "deleted": False},
        },
        upsert=True,
        return_document=ReturnDocument.AFTER,
    )
    return {"id": str(document["_id"]), "name": document["name"], "createdAt": document["created_at"]}


@app.post("/v1/episodes", status_code=201, dependencies=[Depends(_has_key)])
async def record(batch: Batch, database: Database) -> dict[str, Any]:
    """Record a batch."""
    now = datetime.now(UTC)
    documents = [
        {
            "_id": f"ep_{ObjectId()}",
            "tenant_id": batch.tenant_id,
            "namespace": batch.namespace,
            **item.model_dump(),
            "timestamp": item.timestamp or now,
            "status": "active",
            "created_at": now,
        }
        for item in batch.episodes
    ]
    await database.tenant_episodes.insert_many(documents, ordered=False)
    return {"count": len(documents), "episode_ids": [document["_id"] for document in documents]}


@app.get("/v1/episodes/{episode_id}", dependencies=[Depends(_has_key)])
async def get(episode_id: str, tenant_id: str, database: Database) -> dict[str, Any]:
    """One of a tenant's episodes."""
    found = await database.tenant_episodes.find_one({"_id": episode_id, "tenant_id": tenant_id})
    if found is None:
        raise HTTPException(404, "there is no such episode")
    return found


@app.get("/namespaces/{slug}/projects/{project}/episodes")
async def page(
    slug: str, project: str, database: Database, user: Annotated[str, Depends(_user)], size: int = 50
) -> dict[str, Any]:
    """The first page of a project's episodes."""
    if user != slug:
        raise HTTPException(403, "this namespace is not yours")
    query = {"namespace": slug, "project": project, "deleted": False}
    found = await database.project_episodes.find(query).sort("_id", 1).to_list(size)
    return {"episodes": [{**one, "_id": str(one["_id"])} for one in found]}
