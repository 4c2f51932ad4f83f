"""Rows 1 to 5: single writes and batches against floors and peers, what is sustained, and how fresh the reads are."""

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial

import httpx

from bench.harness import (
    LeftOutError,
    Options,
    Row,
    RowResult,
    Sample,
    Spread,
    Target,
    interleave,
    latency_of,
    measured,
    median_of,
    ratio_of,
    say,
)
from bench.load.bodies import batch
from bench.load.generators import Request, closed_loop, open_loop
from bench.services import (
    STREAMS,
    Service,
    bare_relay,
    crud,
    nestjs,
    ours,
    running,
    sample_writes,
    wait_projected,
)

CALLERS = 64
SUSTAINED_RATE = 15_000
"""Events a second that must be sustained."""
_ITEMS = 100
_STEP = 1.25
_STEP_BACK = 1.1
_MOST_LAG = 2.0
_MOST_STEPS = 12
_PROBES_PER_SECOND = 20
_LONGEST_WAIT = 30.0


async def single_writes(options: Options) -> RowResult:
    """Row 1: 64 callers."""
    seconds = options.either(5, 1)
    with running() as bench:
        services, left_out = await _services(ours(bench), bare_relay(bench), nestjs(bench), crud(bench))
        alone = {}
        for name, service in services.items():
            warm_up = await closed_loop(service.url, service.singles, callers=CALLERS, seconds=options.either(20, 1))
            await service.settle()
            alone[name] = warm_up.rate
        rates = {name: min(rate, alone["ours"]) / 2 for name, rate in alone.items()}
        say("  open loop: " + ", ".join(f"{name} {rate:,.0f}/s" for name, rate in rates.items()))
        samples = await interleave(
            {
                name: partial(
                    sample_writes, service, service.singles, callers=CALLERS, seconds=seconds, open_rate=rates[name]
                )
                for name, service in services.items()
            },
            options.rounds,
        )
    return RowResult(
        [
            _at_least("1a", "single write, 64 callers, against the bare relay", samples, "bare relay", 0.5),
            _at_least("1b", "single write, 64 callers, against NestJS", samples, "NestJS", 3, left_out),
            _at_most("1c", "single write, p99 against the bare relay's", samples, "p99", 3),
        ],
        samples,
        [
            (
                "Latency: an open loop at half of what we did in a closed one while warming up, or at half of what a "
                "slower candidate did (`open_rate`); `closed_p50_ms` and `closed_p99_ms` are of the closed loop."
            ),
            "Each write makes a new episode of 500 bytes; ours has the projector running, and its CPU includes it.",
            *left_out.values(),
        ],
        {name: service.configuration for name, service in services.items()},
        unit="writes",
    )


async def one_caller(options: Options) -> RowResult:
    """Row 2: one caller."""
    seconds = options.either(4, 1)
    with running() as bench:
        services, left_out = await _services(ours(bench), bare_relay(bench), nestjs(bench))

        async def sample(service: Service) -> Sample:
            with measured(service.pids) as work:
                load = await closed_loop(service.url, service.singles, callers=1, seconds=seconds)
                await service.settle()
            cpu = work.cpu / (load.rate * seconds) * 1_000 if load.rate else None
            extra = {"generator_cores": load.generator_cores, "refused": load.refused}
            return Sample(load.rate, cpu, load.latency, extra)

        for service in services.values():
            await sample(service)
        samples = await interleave(
            {name: partial(sample, service) for name, service in services.items()}, options.rounds
        )
    return RowResult(
        [_at_most("2", "single write, 1 caller, p50 against the bare relay's", samples, "p50", 1.5)],
        samples,
        [
            (
                "One caller who waits for each answer is a closed loop by its nature: the latency is wrk's. A stall "
                "delays what comes after it, so p99 and max are flattered; p50 is what is claimed."
            ),
            *left_out.values(),
        ],
        {name: service.configuration for name, service in services.items()},
        unit="writes",
    )


async def batches(options: Options) -> RowResult:
    """Row 3: batches of 100 from 8 callers, and of 1,000 from 4."""
    seconds = options.either(4, 1)
    with running() as bench:
        services, _ = await _services(ours(bench), bare_relay(bench), bare_relay(bench, split=True), crud(bench))
        samples: dict[str, list[Sample]] = {}
        for items, callers in ((100, 8), (1_000, 4)):
            requests = {name: service.batches(items) for name, service in services.items()}
            for name, service in services.items():
                await closed_loop(service.url, requests[name], callers=callers, seconds=1)
                await service.settle()
            found = await interleave(
                {
                    f"{name}, {items:,}": partial(
                        sample_writes, service, requests[name], callers=callers, seconds=seconds, events=items
                    )
                    for name, service in services.items()
                },
                options.rounds,
            )
            samples |= found
    targets = []
    for letter, items, least in (("a", 100, 30_000), ("b", 1_000, 60_000)):
        what, here = f"batches of {items:,}", f", {items:,}"
        rate = median_of(samples["ours" + here])
        reached = Target(f"3{letter}2", what, f"≥ {least:,} events/s", rate.text(), rate.median >= least)
        targets += [
            _at_least(f"3{letter}1", f"{what}, against the bare relay", samples, "bare relay", 0.5, ours=here),
            reached,
            _at_least(f"3{letter}3", f"{what}, against the CRUD peer", samples, "CRUD peer", 3, ours=here),
        ]
    return RowResult(
        targets,
        samples,
        [
            (
                "Items of 500 bytes. *bare relay* copies a batch as the one record that it came as; *relay, one record "
                "an event* takes it apart and writes a record batch of as many records, as a log of events needs it."
            ),
            "`readable_after_s`: how long the projector needed after the load ended until all of it could be read.",
        ],
        {name: service.configuration for name, service in services.items()},
        unit="events",
    )


async def sustained(options: Options) -> RowResult:
    """Rows 4 and 5: what is sustained with the projector keeping up, and how fresh reads are at half of it."""
    with running() as bench:
        service = ours(bench)
        requests = service.batches(_ITEMS)
        await closed_loop(service.url, requests, callers=8, seconds=options.either(3, 1))
        await service.settle()
        rate, steps = await _search(service, requests, options)
        long: list[Sample] = []
        too_fast: list[Sample] = []
        while len(long) < options.rounds:
            sample = await _offer(service, requests, rate, options.either(60, 3))
            say(f"  {rate:,.0f} events/s for {options.either(60, 3):.0f} s: lag {sample.extra['lag_s']:.2f} s")
            long.append(sample)
            if not _kept_up(sample) and len(too_fast) < _MOST_STEPS:
                too_fast += long  # what a short run bears is too much for a long one
                rate, long = rate / _STEP_BACK, []
        half = rate / 2
        fresh = await interleave(
            {f"ours, fresh at {half:,.0f} events/s": partial(_freshness, service, requests, half, options)},
            options.rounds,
        )
    lag = median_of(long, "lag_s")
    held = median_of(long)
    [freshness] = fresh.values()
    p50, p99 = median_of(freshness, "p50"), median_of(freshness, "p99")
    return RowResult(
        [
            Target(
                "4",
                "sustained for 60 s with the projector keeping up",
                f"≥ {SUSTAINED_RATE:,} events/s of 500 bytes, lag ≤ 2 s at the end",
                f"{held.text()} events/s, lag {lag.text('.2f')} s",
                all(map(_kept_up, long)) and held.median >= SUSTAINED_RATE * 0.99,
            ),
            Target("5a", f"accept → readable, p50, at {half:,.0f} events/s", "≤ 50 ms", _ms(p50), p50.median <= 0.05),
            Target("5b", f"accept → readable, p99, at {half:,.0f} events/s", "≤ 250 ms", _ms(p99), p99.median <= 0.25),
        ],
        {"ours, search for the rate": steps, "ours, 60 s, too fast": too_fast, "ours, 60 s": long, **fresh},
        [
            (
                "Row 4: an open loop of batches of 100, from 15,000 events a second on; the rate is raised by a "
                "quarter until the lag at the end is over 2 s or anything was refused, and lowered by a tenth until it "
                "is held for 60 s in every round. `lag_s`: one more write to each stream, sent as the load ends, with "
                "?wait=projected; the time until the last can be read, so its own writing is in it."
            ),
            (
                f"Row 5: {_PROBES_PER_SECOND} times a second, whatever became of those before, one more write; the "
                "clock runs from its 201 until a GET of that episode, sent at once and held back by the gateway until "
                "it can be read, is answered: one request's time is in it, and what passes between two looks of the "
                "gateway, a quarter of the time waited, 5 to 50 ms. Who asks is a Python process; `probe_cores` is its "
                "share."
            ),
        ],
        {"ours": service.configuration},
        unit="events",
    )


async def _search(service: Service, requests: Sequence[Request], options: Options) -> tuple[float, list[Sample]]:
    """The highest rate that keeps up for a short while, by steps, and what was seen on the way."""
    rate = float(options.count(SUSTAINED_RATE, 1_000))
    steps: list[Sample] = []
    best = rate
    while len(steps) < options.count(8, 2):
        sample = await _offer(service, requests, rate, options.either(10, 1))
        steps.append(sample)
        say(f"  {rate:,.0f} events/s offered: {sample.rate:,.0f} taken, lag {sample.extra['lag_s']:.2f} s")
        if not _kept_up(sample):
            break
        best, rate = rate, rate * _STEP
    return best, steps


async def _offer(service: Service, requests: Sequence[Request], rate: float, seconds: float) -> Sample:
    """So many events a second, and how far behind the read models then are."""
    asked = {request.body: request for request in requests[:STREAMS]}.values()
    last = [Request(one.path, one.headers, batch(0, 1, f"tenant-{number}")) for number, one in enumerate(asked)]
    with measured(service.pids) as work:
        load = await open_loop(service.url, requests, rate=rate / _ITEMS, seconds=seconds)
        lag = await wait_projected(service.url, last)
    extra = {"offered": rate, "lag_s": lag, "refused": load.refused, "generator_cores": load.generator_cores}
    return Sample(load.rate * _ITEMS, work.cpu / (rate * seconds) * 1_000, load.latency, extra)


def _kept_up(sample: Sample) -> bool:
    return sample.extra["lag_s"] <= _MOST_LAG and sample.extra["refused"] == 0


async def _freshness(service: Service, requests: Sequence[Request], rate: float, options: Options) -> Sample:
    """How long after its 201 an episode can be read, while others write so much."""
    seconds = options.either(15, 2)
    times: list[float] = []
    key = dict(requests[0].headers)

    async def probe(http: httpx.AsyncClient, number: int) -> None:
        tenant = f"tenant-{number % STREAMS}"
        made = await http.post("/v1/episodes", content=batch(number, 1, tenant), headers=key)
        accepted = time.perf_counter()
        [episode] = made.raise_for_status().json()["episode_ids"]
        while True:
            found = await http.get(f"/v1/episodes/{episode}", params={"tenant_id": tenant})
            late = time.perf_counter() - accepted
            if found.is_success or late > _LONGEST_WAIT:
                break
        times.append(late)

    key["Content-Type"] = "application/json"
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=service.url, headers=key, timeout=30, trust_env=False, limits=limits) as http:
        loading = asyncio.create_task(open_loop(service.url, requests, rate=rate / _ITEMS, seconds=seconds))
        try:
            cpu, began = time.process_time(), time.perf_counter()
            async with asyncio.TaskGroup() as probes:
                for number in range(round(seconds * _PROBES_PER_SECOND)):
                    await asyncio.sleep(max(0.0, began + number / _PROBES_PER_SECOND - time.perf_counter()))
                    probes.create_task(probe(http, number))
            cores = (time.process_time() - cpu) / (time.perf_counter() - began)
        finally:
            load = await loading
    extra = {"offered": rate, "refused": load.refused, "generator_cores": load.generator_cores, "probe_cores": cores}
    return Sample(load.rate * _ITEMS, None, latency_of(times), extra)


async def _services(first: Service, *others: Awaitable[Service]) -> tuple[dict[str, Service], dict[str, str]]:
    """Those that could be started, by name, and why others could not."""
    started, left_out = {first.name: first}, {}
    for other in others:
        try:
            service = await other
        except LeftOutError as error:
            left_out[str(error).partition(":")[0]] = f"Left out: {error}"
            say(f"  left out: {error}")
        else:
            started[service.name] = service
    return started, left_out


def _at_least(
    number: str,
    what: str,
    samples: Mapping[str, Sequence[Sample]],
    other: str,
    factor: float,
    left_out: Mapping[str, str] | None = None,
    *,
    ours: str = "",
) -> Target:
    target = f"≥ {factor:g} x {other}"
    if other in (left_out or {}):
        return Target(number, what, target, (left_out or {})[other], met=False)
    mine, theirs = samples["ours" + ours], samples[other + ours]
    ratio = ratio_of(mine, theirs)
    rates = f"{median_of(mine).median:,.0f}/s against {median_of(theirs).median:,.0f}/s"
    refused = max(sample.extra["refused"] for sample in mine)
    told = f"{ratio.text('.2f')} x ({rates}{f'; up to {refused:.1%} of ours refused' if refused else ''})"
    return Target(number, what, target, told, ratio.median >= factor)


def _at_most(number: str, what: str, samples: Mapping[str, Sequence[Sample]], part: str, factor: float) -> Target:
    mine, theirs = samples["ours"], samples["bare relay"]
    ratio = ratio_of(mine, theirs, part)
    times = f"{_ms(median_of(mine, part))} against {_ms(median_of(theirs, part))}"
    measured = f"{ratio.text('.2f')} x ({times})"
    return Target(number, what, f"≤ {factor:g} x bare relay", measured, ratio.median <= factor)


def _ms(found: Spread) -> str:
    return f"{Spread(found.median * 1e3, found.min * 1e3, found.max * 1e3).text(',.1f')} ms"


ROWS: Mapping[str, Row] = {"1": single_writes, "2": one_caller, "3": batches, "4,5": sustained}
