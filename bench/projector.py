"""The live projector on a log that is full already, beside bare transactions with the same documents, in turns.

    python -m bench.projector [--events 100000] [--rounds 3]

Starts its own Kafka and MongoDB. One partition, so nothing but the projector's own pipelining helps it. This is row 6
of `python -m bench` without the peers.
"""

import argparse
import asyncio

from bench.harness import interleave, median_of, ratio_of, say
from bench.rows.projection import FLOOR, OURS, READING, open_bench
from shared.process import configure_logging


async def main(events: int, rounds: int) -> None:
    async with open_bench(events) as bench:
        candidates = {FLOOR: bench.bare, OURS: bench.projector, READING: bench.reading}
        samples = await interleave(candidates, rounds)
    rates = ", ".join(f"{name} {median_of(each).text()}/s" for name, each in samples.items())
    say(f"median: {rates}; ratio {ratio_of(samples[OURS], samples[FLOOR]).text('.2f')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    configure_logging("bench")
    asyncio.run(main(options.events, options.rounds))
