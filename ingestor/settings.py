"""The ingestor's settings."""

import socket
from datetime import timedelta
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from shared.settings import Settings


class IngestorSettings(Settings):
    """Names in the environment begin with ``INGESTOR_``."""

    model_config = SettingsConfigDict(env_prefix="INGESTOR_")

    instance_id: str = Field(default_factory=socket.gethostname)
    """Static group membership: a restarted ingestor has its partitions back at once. Unique per running ingestor."""
    state_dir: Path = Path("ingestor-state")
    """One LMDB environment per partition. A cache of the log: it may be deleted while the ingestor is down."""
    state_map_bytes: int = 64 * 1024**3
    """Address space reserved per partition, not disk."""
    probe_port: int = 8081
    in_flight_batches: int = Field(default=8, ge=1)
    """Of each partition."""
    in_flight_bytes: int = Field(default=48 * 1024**2, ge=1)
    """Of all partitions together. Kafka takes requests of 100 MiB (``socket.request.max.bytes``)."""
    batch_bytes: int = Field(default=512 * 1024, ge=1)
    """A batch is sent when it holds this much, or when no command waits. One command may be larger, alone."""
    idempotency_retention: timedelta = timedelta(days=7)
    dead_letters_per_minute: int = 60
    """More than this and the partition stops: a producer is broken, and a person should look."""
    snapshot_url: str | None = Field(default=None, pattern=r"^(file:///|s3://)[^/]")
    """Where snapshots of the state are kept: ``file:///folder`` that all ingestors mount, or ``s3://bucket/prefix``.
    One place per Kafka cluster. None: no snapshots."""
    snapshot_every: int = Field(default=500_000, ge=1)
    """Events of a partition after which the next snapshot of its state is written."""
    snapshot_ahead: int = Field(default=50_000, ge=1)
    """A snapshot takes the place of the local state if it is so many events ahead of it."""
