"""Row 13, without a target: the log-fenced writer beside the same ingestor with Kafka transactions."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial

from bench.harness import Options, Row, RowResult, Sample, interleave, ratio_of
from bench.peers.transactions.__main__ import CLASSIC, LEAN
from bench.services import Bench, Service, nothing_to_wait_for, ours, running, sample_writes

FENCED, TRANSACTIONS = "log-fenced writer", "transactions"
_ITEMS = 100
_NOTES = (
    (
        "Gateway, decisions and load are the same; only what appends differs. Each has servers of its own, and those "
        "that are not measured are idle. No projector runs: our reader's rule counts on consecutive offsets, and stops "
        "at the markers that transactions leave in the log."
    ),
    (
        "*classic*: events, replies and offsets in one transaction for all commands that came meanwhile. The gateway "
        "reads replies without regard to transactions, so these callers hear a moment before the commit. *lean*: the "
        "events alone, replies after the commit; the least that is safe."
    ),
)


async def transactions(options: Options) -> RowResult:
    """One caller, 64 callers, and batches."""
    seconds = options.either(2, 1)
    candidates: dict[str, Callable[[], Awaitable[Sample]]] = {}
    with contextlib.ExitStack() as stack:
        services = {FENCED: _without_projector(stack.enter_context(running()))}
        for pattern in (CLASSIC, LEAN):
            bench = stack.enter_context(running())
            await asyncio.to_thread(_replace_ingestor, bench, pattern)
            services[f"{TRANSACTIONS}, {pattern}"] = _without_projector(bench)
        for load, sample in _LOADS.items():
            for name, service in services.items():
                await sample(service, 1.0)  # warms up
                candidates[f"{load}: {name}"] = partial(sample, service, seconds)
        samples = await interleave(candidates, options.rounds)
    told = [
        f"{load}: the log-fenced writer has "
        + " and ".join(
            f"{ratio_of(samples[f'{load}: {FENCED}'], samples[f'{load}: {name}']).text('.1f')} x the rate of {name}"
            for name in services
            if name != FENCED
        )
        for load in _LOADS
    ]
    configuration = {
        TRANSACTIONS: (
            "bench/peers/transactions: aiokafka, one transactional producer a partition, acks=all, zstd, no linger, "
            "back-offs of 3 ms; up to 4 MiB of events in one transaction, the next ones decided meanwhile"
        )
    }
    return RowResult([], samples, [*told, *_NOTES], configuration, unit="events")


def _without_projector(bench: Bench) -> Service:
    projector = bench.cluster.processes["projector"]
    projector.stop()
    service = ours(bench)
    processes = [one for one in service.processes if one is not projector]
    return replace(service, processes=processes, settle=nothing_to_wait_for)


def _replace_ingestor(bench: Bench, pattern: str) -> None:
    process = bench.cluster.processes["ingestor"]
    process.stop()
    process.argv = (sys.executable, "-m", "bench.peers.transactions")
    process.env["TRANSACTIONS_PATTERN"] = pattern
    process.start()
    process.wait_ready()


async def _singles(service: Service, seconds: float, *, callers: int) -> Sample:
    return await sample_writes(service, service.singles, callers=callers, seconds=seconds)


async def _batches(service: Service, seconds: float) -> Sample:
    return await sample_writes(service, service.batches(_ITEMS), callers=8, seconds=seconds, events=_ITEMS)


_LOADS: Mapping[str, Callable[[Service, float], Awaitable[Sample]]] = {
    "1 caller": partial(_singles, callers=1),
    "64 callers": partial(_singles, callers=64),
    f"batches of {_ITEMS}, 8 callers": _batches,
}

ROWS: Mapping[str, Row] = {"13": transactions}
