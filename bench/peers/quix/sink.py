"""A topic of JSON events into one MongoDB collection by Quix Streams' MongoDBSink, as its documentation shows it.

Runs in an environment of its own (requirements.txt), reads a known number of records, and prints one line of JSON:
seconds and CPU seconds from the first record to the end of the last write.

Quix Streams is at least once here, as its documentation advises for this sink. The sink batches what comes between two
commits and writes it with one ordered `bulk_write` of upserts by ``_id``. It knows no versions and no counters, folds
nothing, and keeps its place in Kafka, not with the documents.
"""

import argparse
import json
import logging
import time
from typing import Any

from quixstreams import Application
from quixstreams.sinks import SinkBatch
from quixstreams.sinks.community.mongodb import MongoDBSink


class TimedSink(MongoDBSink):
    """The sink, which notes when its last write ended: closing the consumer is not what is measured."""

    ended = (0.0, 0.0)

    def write(self, batch: SinkBatch) -> None:
        """Write, and look at the clocks."""
        super().write(batch)
        self.ended = (time.perf_counter(), time.process_time())


def main(options: argparse.Namespace) -> None:
    """Read ``options.count`` records and stop."""
    application = Application(
        broker_address=options.bootstrap,
        consumer_group=options.group,
        auto_offset_reset="earliest",
        commit_every=options.commit_every,
        auto_create_topics=False,
        loglevel="WARNING",
        consumer_poll_timeout=0.1,
    )
    began: list[tuple[float, float]] = []

    def data_of(event: dict[str, Any]) -> Any:
        if not began:
            began.append((time.perf_counter(), time.process_time()))
        return event["data"]

    sink = TimedSink(
        host=options.mongo_host,
        port=options.mongo_port,
        db=options.database,
        collection=options.collection,
        directConnection=True,
        w="majority",
        journal=True,
    )
    topic = application.topic(options.topic, key_deserializer="str", value_deserializer="json")
    application.dataframe(topic).apply(data_of).sink(sink)
    application.run(count=options.count, timeout=30, collect=False)
    [(wall, cpu)] = began
    print(json.dumps({"seconds": sink.ended[0] - wall, "cpu": sink.ended[1] - cpu}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--mongo-host", required=True)
    parser.add_argument("--mongo-port", type=int, required=True)
    parser.add_argument("--database", required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--count", type=int, required=True, help="records in the topic")
    parser.add_argument("--commit-every", type=int, default=5_000, help="records between two writes")
    logging.getLogger("quixstreams").setLevel(logging.WARNING)
    main(parser.parse_args())
