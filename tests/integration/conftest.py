"""Servers for what replays the log, and read models on them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.settings import KafkaSettings
from tests.cluster import ThrowAwayServers, throw_away_servers
from tests.read_models import ReadModels, open_read_models


@pytest.fixture(scope="session")
def replay_servers() -> Iterator[ThrowAwayServers]:
    """A Kafka and a MongoDB of which each test may delete everything."""
    with throw_away_servers() as running:
        yield running


@pytest.fixture(scope="session")
def kafka(replay_servers: ThrowAwayServers) -> KafkaSettings:
    """Its Kafka. The topics are there if a test makes them."""
    return KafkaSettings(bootstrap_servers=replay_servers.kafka_bootstrap)


@pytest.fixture
async def models(replay_servers: ThrowAwayServers, tmp_path: Path) -> AsyncIterator[ReadModels]:
    """An empty log and no read models."""
    async with open_read_models(replay_servers, tmp_path) as made:
        yield made
