"""Documents into MongoDB by `insert_many` from several processes, then the indexes: the floor of a rebuild.

Unordered, as many at a time as the rebuild inserts at most, acknowledged from memory (``w: 1``), for the indexes built
behind say whether all is there. Each process is tuned as the rebuild's workers are, has its share of the documents in
memory before it begins, and nothing else to do.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pymongo import IndexModel, MongoClient, WriteConcern

from local.process import ROOT
from shared.process import tune_interpreter

Document = dict[str, Any]
Indexes = Mapping[str, Sequence[Sequence[str]]]
"""Collection → the fields of each of its indexes."""
_AT_ONCE = 4_000
"""As `projector.replay` hands documents on, if they are not large."""


class Inserters:
    """Processes that hold the documents and wait for a word."""

    def __init__(self, url: str, indexes: Indexes, processes: Sequence["subprocess.Popen[str]"]) -> None:
        self._url = url
        self._indexes = indexes
        self._processes = processes

    def run(self, database: str) -> tuple[float, float]:
        """Seconds until all documents and indexes are in the database, and CPU seconds of the processes."""
        began = time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            print(database, file=process.stdin, flush=True)
        cpu = sum(_hear(process) for process in self._processes)
        with ThreadPoolExecutor() as threads:  # they only wait
            list(threads.map(lambda name: self._build(database, name), self._indexes))
        return time.perf_counter() - began, cpu

    def _build(self, database: str, collection: str) -> None:
        models = [IndexModel([*fields]) for fields in self._indexes[collection]]
        if models:
            with MongoClient[Document](self._url) as client:
                client[database][collection].create_indexes(models)


@contextmanager
def open_inserters(url: str, source: str, indexes: Indexes, workers: int) -> Iterator[Inserters]:
    """So many processes with the documents of the database ``source``, shared out among them."""
    script = [sys.executable, "-m", "bench.floors.insert", url, source, "--workers", str(workers)]
    processes = [
        subprocess.Popen(
            [*script, "--number", str(number), *indexes],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(workers)
    ]
    try:
        for process in processes:
            _hear(process)
        yield Inserters(url, indexes, processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _hear(process: "subprocess.Popen[str]") -> float:
    assert process.stdout is not None
    return float(process.stdout.readline())


def main(url: str, source: str, collections: Sequence[str], number: int, workers: int) -> None:
    """Take a share of the documents; then insert it into each database that is named on stdin."""
    portions: list[tuple[str, list[Document]]] = []
    with MongoClient[Document](url, tz_aware=True) as client:
        for collection in collections:
            mine: list[Document] = []
            for index, document in enumerate(client[source][collection].find(batch_size=_AT_ONCE)):
                if index // _AT_ONCE % workers == number:
                    mine.append(document)
            portions += [(collection, mine[start : start + _AT_ONCE]) for start in range(0, len(mine), _AT_ONCE)]
        gc.freeze()
        print(0.0, flush=True)
        for line in sys.stdin:
            cpu = time.process_time()
            for collection, documents in portions:
                quick = client[line.strip()][collection].with_options(write_concern=WriteConcern(w=1, j=False))
                quick.insert_many(documents, ordered=False)
            print(time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("source", help="the database that has the documents")
    parser.add_argument("collections", nargs="+")
    parser.add_argument("--number", type=int, required=True, help="which share is ours, from 0")
    parser.add_argument("--workers", type=int, required=True)
    given = parser.parse_args()
    tune_interpreter()
    main(given.url, given.source, given.collections, given.number, given.workers)
