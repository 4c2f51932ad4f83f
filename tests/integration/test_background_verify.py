"""A projector that verifies by itself, in the background."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pymongo

from local.process import ROOT
from tests.cluster import Cluster, throw_away_cluster, wait_until

WITHIN = 60.0


def verified(cluster: Cluster) -> dict[str, Any]:
    """What /readyz says of the last verification; empty before the first."""
    answer = httpx.get(f"http://127.0.0.1:{cluster.processes['projector'].port}/readyz")
    found: dict[str, Any] = answer.json().get("verified", {})
    return found


def wait_verified(cluster: Cluster, met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    until = time.monotonic() + WITHIN
    while not met(found := verified(cluster)):
        assert time.monotonic() < until, found
        time.sleep(0.1)
    return found


def test_a_projector_verifies_by_itself_and_shows_what_it_finds(tmp_path: Path) -> None:
    with throw_away_cluster(settings={"PROJECTOR_VERIFY_EVERY": "0.5"}) as cluster:
        written = httpx.post(
            f"{cluster.url}/v1/episodes?wait=projected",
            headers={"Authorization": f"Bearer {cluster.api_key}"},
            json={"tenant_id": "acme", "episodes": [{"content": "One."}, {"content": "Two."}]},
        )
        episode_id = written.json()["episode_ids"][0]
        found = wait_verified(cluster, lambda found: found.get("events") == 2)
        assert found["good"]
        assert (found["different"], found["findings"]) == (0, [])
        with pymongo.MongoClient[dict[str, Any]](cluster.servers.mongodb_url) as client:
            client["episodes_g1"]["tenant_episodes"].delete_one({"_id": episode_id})
        found = wait_verified(cluster, lambda found: not found["good"])
        assert found["differences"] == [f"missing tenant_episodes/{episode_id}"]
        leaves_nothing_behind_when_it_is_stopped(cluster, tmp_path)


def leaves_nothing_behind_when_it_is_stopped(cluster: Cluster, folder: Path) -> None:
    """A projector that ends stops the verification that it began with SIGTERM."""
    argv = [sys.executable, "-m", "projector", "verify", "--workers", "1", "--folder", str(folder)]
    env = {**os.environ, **cluster.env}
    with subprocess.Popen(argv, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_until(lambda: any(folder.glob("*/*")))  # it has begun to spill
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert (process.returncode, b"interrupted" in said) == (130, True)
    assert not any(folder.iterdir())
