"""Rows 0 and 8: the libraries alone, and reads against a bare route with the same query."""

import asyncio
import json
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import httpx
from pymongo import MongoClient

from bench.harness import Options, Row, RowResult, Sample, Target, interleave, measured, median_of, ratio_of
from bench.load.bodies import batch
from bench.load.generators import Request, closed_loop
from bench.services import PARTITIONS, Bench, make_topics, ours, running
from local.process import ROOT, ManagedProcess
from local.servers import free_port
from shared.mongo import META, generation_database
from shared.read_models import POINTER_ID, POINTERS

CALLERS = 64
PAGE = 50
_PAGES = 5
_TENANT = "reader"
_USER = "user-0"


async def libraries_alone(options: Options) -> RowResult:
    """Row 0: no target; what the parts can do here with nothing around them."""
    seconds = options.either(3, 1)
    with running() as bench:
        await _fill(bench, options)
        kafka, topics = bench.servers.kafka_bootstrap, ("alone.singly", "alone.batches")
        await make_topics(kafka, dict.fromkeys(topics, PARTITIONS))
        to_kafka = ("--bootstrap", kafka, "--topic")
        to_mongodb = ("--mongodb", bench.servers.mongodb_url, "--database", _database(bench))
        length = ("--seconds", str(seconds))

        async def alone(floor: str, *arguments: str) -> Sample:
            told = await _floor(floor, *arguments)
            return Sample(told["rate"], told.get("cpu"))

        samples = await interleave(
            {
                "aiokafka send, records": partial(alone, "producer", *to_kafka, topics[0], *length),
                "aiokafka send_batch of 1,000, records": partial(
                    alone, "producer", *to_kafka, topics[1], *length, "--records", "1000"
                ),
                "aiokafka getmany, records": partial(alone, "getmany", *to_kafka, topics[1]),
                "Motor find_one, documents": partial(alone, "reads", "find_one", *to_mongodb, *length),
                "Motor $in of 64, documents": partial(alone, "reads", "find_in", *to_mongodb, *length),
                "Motor index range, pages of 50": partial(alone, "reads", "find_range", *to_mongodb, *length),
            },
            options.rounds,
        )
    return RowResult(
        [],
        samples,
        ["Floors without a target of their own. Bulk writes and inserts alone are in rows 6 and 7."],
        {
            "aiokafka": "records of 500 bytes, acks=all, idempotent, batches to 900 kB",
            "Motor": f"{CALLERS} callers, 4 for $in",
        },
        unit="records, documents or pages",
    )


async def reads(options: Options) -> RowResult:
    """Row 8: get by id, and a page of 50."""
    with running() as bench:
        ids, project_id = await _fill(bench, options)
        url, gateway = bench.cluster.url, bench.cluster.processes["gateway"]
        bare = _bare_route(bench)
        bare_url = f"http://127.0.0.1:{bare.port}"
        key = {"Authorization": f"Bearer {bench.cluster.api_key}"}
        token = {"Authorization": f"Bearer {bench.cluster.token(_USER)}"}
        path = f"/namespaces/{_USER}/projects/robotics/episodes"
        candidates = {
            "ours, get": (url, [Request(f"/v1/episodes/{one}?tenant_id={_TENANT}", key) for one in ids], gateway),
            "bare route, get": (bare_url, [Request(f"/episodes/{one}") for one in ids], bare),
            "ours, page": (
                url,
                [Request(f"{path}?page={page + 1}&pageSize={PAGE}", token) for page in range(_PAGES)],
                gateway,
            ),
            "bare route, page": (
                bare_url,
                [Request(f"/pages/{project_id}?skip={page * PAGE}&limit={PAGE}") for page in range(_PAGES)],
                bare,
            ),
        }
        for where, requests, process in candidates.values():
            await _sample(where, requests, process, 1)
        samples = await interleave(
            {
                name: partial(_sample, where, requests, process, options.either(4, 1))
                for name, (where, requests, process) in candidates.items()
            },
            options.rounds,
        )
    return RowResult(
        [
            _target("8a", "get by id, 64 callers", samples, "get", 0.6),
            _target("8b", f"list page of {PAGE}, 64 callers", samples, "page", 0.6),
            _target("8c", "get by id, 64 callers, reads merged", samples, "get", 2),
        ],
        samples,
        [
            (
                "*bare route*: Starlette and Motor on uvicorn with uvloop and httptools, one process, the same query "
                "on the same documents, which are answered as found; nobody is asked who they are. Ours also asks "
                "how far the stream is, and for a page for the project with its counts."
            ),
            "Latency is wrk's, of the closed loop. CPU is the gateway's alone.",
        ],
        {"ours": "one gateway; JWT and API keys checked", "bare route": "bench/floors/reads.py"},
        unit="reads",
    )


async def _sample(url: str, requests: Sequence[Request], process: ManagedProcess, seconds: float) -> Sample:
    with measured([process.pid or 0]) as work:
        load = await closed_loop(url, requests, callers=CALLERS, seconds=seconds)
    extra = {"generator_cores": load.generator_cores, "refused": load.refused}
    return Sample(load.rate, work.cpu / (load.rate * seconds) * 1_000 if load.rate else None, load.latency, extra)


async def _fill(bench: Bench, options: Options) -> tuple[Sequence[str], str]:
    """Episodes of a tenant, and of a project. Ids of some of the first, in no order; the id of the project."""
    service = ours(bench)
    headers = {"Authorization": f"Bearer {bench.cluster.api_key}", "Content-Type": "application/json"}
    ids: list[str] = []
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=60, trust_env=False) as http:
        for number in range(options.count(20, 2)):
            made = await http.post("/v1/episodes", params={"wait": "projected"}, content=batch(number, 1_000, _TENANT))
            ids += made.raise_for_status().json()["episode_ids"]
    one_project = [request for request in service.singles if f"/{_USER}/" in request.path]
    await closed_loop(service.url, one_project, callers=CALLERS, seconds=options.either(4, 2))
    await service.settle()
    random.Random(1).shuffle(ids)  # noqa: S311 - not for secrets
    return ids[:2_000], await asyncio.to_thread(_project_id, bench)


def _project_id(bench: Bench) -> str:
    with MongoClient[dict[str, Any]](bench.servers.mongodb_url) as client:
        project = client[_database(bench)].projects.find_one({"namespace": _USER, "slug": "robotics"})
    assert project is not None
    assert project["total"] > PAGE * _PAGES, "there are too few episodes for the pages"
    return str(project["_id"])


def _database(bench: Bench) -> str:
    with MongoClient[dict[str, Any]](bench.servers.mongodb_url) as client:
        pointer = client[META][POINTERS].find_one({"_id": POINTER_ID})
    assert pointer is not None
    return generation_database(pointer["generation"])


def _bare_route(bench: Bench) -> ManagedProcess:
    port = free_port()
    argv = [sys.executable, "-m", "bench.floors.reads", "serve", "--mongodb", bench.servers.mongodb_url]
    argv += ["--database", _database(bench), "--port", str(port)]
    return bench.start("bare-route", argv, {}, port=port).wait_ready()


async def _floor(name: str, *arguments: str) -> Any:
    """What the script of a floor prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"bench.floors.{name}", *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"bench.floors.{name} ended with {process.returncode}")
    return json.loads(printed)


def _target(number: str, what: str, samples: Mapping[str, Sequence[Sample]], kind: str, factor: float) -> Target:
    mine, theirs = samples[f"ours, {kind}"], samples[f"bare route, {kind}"]
    ratio = ratio_of(mine, theirs)
    rates = f"{median_of(mine).median:,.0f}/s against {median_of(theirs).median:,.0f}/s"
    target = f"≥ {factor:g} x a bare Starlette + Motor route"
    return Target(number, what, target, f"{ratio.text('.2f')} x ({rates})", ratio.median >= factor)


ROWS: Mapping[str, Row] = {"0": libraries_alone, "8": reads}
