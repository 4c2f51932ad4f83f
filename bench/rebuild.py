"""How fast the read models are rebuilt, beside the same documents by bare `insert_many` and index builds, in turns.

    python -m bench.rebuild [--events 100000] [--rounds 2] [--workers 2]

Starts its own Kafka and MongoDB. The ceiling has as many processes as the rebuild, its documents in memory, and nothing
else to do. The rate is that of the load: reading, folding, inserting, indexing. Prints JSON: rates, ratio, and the
most memory (RSS, MiB) that rebuild and verify had, as the sum over their processes and in the largest of them. This is
row 7 of `python -m bench`, and verify.
"""

import argparse
import asyncio
import json
import os
import sys

from bench.harness import interleave, median_of, ratio_of
from bench.rows.rebuild import FLOOR, OURS, open_bench
from shared.process import configure_logging


async def main(events: int, rounds: int, workers: int) -> None:
    load_before = os.getloadavg()[0]
    async with open_bench(events, workers) as bench:
        samples = await interleave(
            {OURS: lambda: asyncio.to_thread(bench.rebuild), FLOOR: lambda: asyncio.to_thread(bench.bare)}, rounds
        )
        verified, used = await asyncio.to_thread(bench.verify)
    assert verified["events"] == bench.events
    ours = samples[OURS]
    found = {
        "events": bench.events,
        "documents": bench.documents,
        "rebuild_events_per_second": [round(sample.rate) for sample in ours],
        "ceiling_events_per_second": [round(sample.rate) for sample in samples[FLOOR]],
        "ratio": round(ratio_of(ours, samples[FLOOR]).median, 2),
        "verify_events_per_second": round(bench.events / used.seconds),
        "rebuild_rss_mib": {
            "sum": round(median_of(ours, "RSS MiB").max),
            "largest": round(median_of(ours, "RSS MiB of one").max),
        },
        "verify_rss_mib": {"sum": round(used.rss_sum), "largest": round(used.rss_largest)},
        "workers": workers,
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    configure_logging("bench")
    asyncio.run(main(given.events, given.rounds, given.workers))
