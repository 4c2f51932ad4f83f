"""A walk through the main job on the running stack, with every request and answer shown."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.markup import escape
from rich.text import Text

from local.services import make_token

EVENTS_TOPIC = "episodes.events"
USERNAME = "alice"
TENANT = "my-app"
LINE = 100


class FailedError(Exception):
    """The stack did not do what it should; the message says what it did."""


def run(settings: Mapping[str, str], console: Console) -> None:
    """Walk through both APIs, then look into the log. Raise `FailedError` at the first answer not as promised."""
    began = asyncio.run(_ends_of_log(settings))
    token = make_token(settings["JWT_SECRET"], USERNAME)
    with httpx.Client(base_url=settings["GATEWAY_URL"], timeout=30) as client:
        _projects(_Caller(client, token, console), run_name=f"run-{time.time_ns() // 1_000_000}")
        _batches(_Caller(client, settings["API_KEY"], console))
    console.rule("What the log holds of it")
    console.print("The events are the truth; everything read above can be thrown away and made again from them.\n")
    _show_log(asyncio.run(_records_since(began, settings)), console)
    console.rule("Now you")
    print(f"URL      {settings['GATEWAY_URL']}   (described at {settings['GATEWAY_URL']}/docs)")
    print(f"token    {token}")
    print(f"         for the projects API, as {USERNAME}; another: .venv/bin/python -m local token --username NAME")
    print(f"API key  {settings['API_KEY']}")
    print("         for the batch API, all tenants")
    print("stop     make down   (make reset also deletes the data; make status and make logs show what runs)")


class _Caller:
    """Sends requests, shows them with their answers, and insists on the promised status."""

    def __init__(self, client: httpx.Client, bearer: str, console: Console) -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {bearer}"}
        self._console = console

    def call(
        self,
        title: str,
        method: str,
        path: str,
        *,
        promised: int,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        self._console.rule(escape(title), align="left")
        self._console.print(f"[bold cyan]→ {method} {escape(path)}[/]")
        for name, value in (headers or {}).items():
            self._console.print(f"[dim]  {name}: {escape(value)}[/]")
        if body is not None:
            self._console.print(_json(body))
        try:
            answer = self._client.request(method, path, json=body, headers={**self._headers, **(headers or {})})
        except httpx.HTTPError as error:
            raise FailedError(f"{method} {path} got no answer: {error!r}") from error
        colour = "green" if answer.status_code == promised else "red"
        event_id = f"   X-Event-Id: {answer.headers['X-Event-Id']}" if "X-Event-Id" in answer.headers else ""
        self._console.print(f"[bold {colour}]← {answer.status_code} {answer.reason_phrase}[/][dim]{event_id}[/]")
        self._console.print(_json(answer.json()) if answer.text else "")
        if answer.status_code != promised:
            raise FailedError(f"{method} {path} answered {answer.status_code}, not {promised}.")
        return answer

    def read(self, title: str, path: str, after: httpx.Response) -> httpx.Response:
        """Read what was just written: the answer may not be older than that."""
        headers = {"X-Min-Event-Id": after.headers["X-Event-Id"], "Prefer": "wait=10"}
        return self.call(title, "GET", path, promised=200, headers=headers)


def _projects(caller: _Caller, run_name: str) -> None:
    episodes = f"/namespaces/{USERNAME}/projects/robotics-{run_name}/episodes"
    body = {"name": run_name, "folder": "/experiments/batch-1", "tags": ["lidar"], "metadata": {"robot": "r2"}}
    caller.call(
        "A robot's run begins: created, with its project and folders", "POST", episodes, promised=201, body=body
    )
    caller.call(
        "The same name again: updated",
        "POST",
        episodes,
        promised=200,
        body={"name": run_name, "tags": ["lidar", "night"]},
    )
    changes = {"status": "completed", "description": "Reached the charger.", "writeProtected": True}
    written = caller.call(
        "It ends, and is locked for good", "PATCH", f"{episodes}/{quote(run_name, safe='')}", promised=200, body=changes
    )
    caller.read("The project's episodes", episodes, written)


def _batches(caller: _Caller) -> None:
    body = {
        "tenant_id": TENANT,
        "namespace": "engineering",
        "episodes": [
            {
                "type": "decision",
                "content": "Chose CockroachDB for the payments service.",
                "source": "meeting-notes",
                "author": "prashant",
                "timestamp": "2026-03-15T10:00:00Z",
            },
            {"type": "message", "source": "slack", "author": "bob"},
        ],
    }
    written = caller.call(
        "A batch with one bad item: the other is recorded", "POST", "/v1/episodes", promised=201, body=body
    )
    episode_id = written.json()["episode_ids"][0]
    caller.read("That one by its id", f"/v1/episodes/{episode_id}?tenant_id={TENANT}", written)


@asynccontextmanager
async def _log(settings: Mapping[str, str]) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        EVENTS_TOPIC,
        bootstrap_servers=settings["KAFKA_BOOTSTRAP_SERVERS"],
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=64 * 1024 * 1024,
    )
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def _ends_of_log(settings: Mapping[str, str]) -> dict[TopicPartition, int]:
    async with _log(settings) as consumer:
        ends: dict[TopicPartition, int] = await consumer.end_offsets(consumer.assignment())
        return ends


async def _records_since(
    began: Mapping[TopicPartition, int], settings: Mapping[str, str]
) -> list[tuple[TopicPartition, int, dict[str, Any]]]:
    """Read what was appended to the events topic since then: partition, offset and the CloudEvent."""
    found = []
    async with _log(settings) as consumer:
        ends = await consumer.end_offsets(list(began))
        for partition, offset in began.items():
            consumer.seek(partition, offset)
            while await consumer.position(partition) < ends[partition]:
                record = await consumer.getone(partition)
                found.append((partition, record.offset, json.loads(record.value)))
    return found


def _show_log(records: list[tuple[TopicPartition, int, dict[str, Any]]], console: Console) -> None:
    for partition, offset, event in records:
        number = f"event_id {event['eventid']}" if "eventid" in event else "no event_id"
        console.print(
            f"partition {partition.partition}  offset {offset:<4} position {event.get('position', '-'):<4} "
            f"{event.get('streamid', ''):<16} {number:<12} {event['type']}"
        )
    if recorded := [event for _, _, event in records if "eventid" in event]:
        console.print("\nThe last of them as it stands there:")
        console.print(_json(recorded[-1]))


def _json(value: Any) -> Text:
    return JSONHighlighter()(Text(_laid_out(value)))


def _laid_out(value: Any, indent: str = "") -> str:
    """Write JSON with whatever is short on one line."""
    short = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(short) <= LINE or not isinstance(value, dict | list):
        return short
    deeper = indent + "  "
    if isinstance(value, list):
        inner = [_laid_out(item, deeper) for item in value]
    else:
        inner = [f"{json.dumps(name)}: {_laid_out(item, deeper)}" for name, item in value.items()]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(inner) + f"\n{indent}{closing}"
