"""Fixtures that need servers, and what a failing test tells about them."""

import asyncio
import os
from collections.abc import Callable, Generator, Iterator, Mapping

import hypothesis
import pytest
import uvloop

from tests.cluster import (
    RUNNING,
    Cluster,
    ThrowAwayServers,
    throw_away_cluster,
    throw_away_servers,
)

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")  # no test depends on how fast the machine is


# A Kafka that lives for seconds spends most of its time compiling itself: less of that.
os.environ.setdefault("KAFKA_JVM_PERFORMANCE_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


@pytest.fixture(scope="session")
def servers() -> Iterator[ThrowAwayServers]:
    """A Kafka and a MongoDB for the whole run. A test that stops one must start it again."""
    with throw_away_servers() as running:
        yield running


@pytest.fixture(scope="session")
def cluster(servers: ThrowAwayServers) -> Iterator[Cluster]:
    """Gateway, ingestor and projector for the whole run, on `servers`. A test that stops one must start it again."""
    with throw_away_cluster(servers) as running:
        yield running


@pytest.fixture
def fresh_cluster() -> Iterator[Cluster]:
    """Everything for one test alone, its servers too: free to break. Takes about ten seconds."""
    with throw_away_cluster() as running:
        yield running


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loop that the services have."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the logs of all that runs when a test fails."""
    report = yield
    if report.failed:
        report.sections.extend((f"log of {program.name}", _short(program.log_tail())) for program in RUNNING)
    return report


def _short(log: str) -> str:
    return "\n".join(line[:300] for line in log.splitlines()[-15:])
