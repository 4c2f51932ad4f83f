"""The local stack as a person uses it: real servers, real processes, killed one after the other."""

import os
import signal
import urllib.request
from collections.abc import Iterator

import psutil
import pymongo
import pytest

from local import survivors
from local.stack import Stack
from tests.cluster import run_local, wait_until

PROCESSES = {"supervisor", "kafka", "mongodb", "gateway", "ingestor", "projector"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own; each test brings it up, which is quick if it is up already."""
    stack = Stack(tmp_path_factory.mktemp("stack").resolve())
    yield stack
    run_local(stack.folder, "down", timeout=120)
    survivors.end(survivors.find(stack.folder), grace=0)


def bring_up(stack: Stack) -> None:
    """Wait until everything is ready."""
    said = run_local(stack.folder, "up", timeout=240)
    assert said.returncode == 0, said.stdout + said.stderr


def show_demo(stack: Stack) -> None:
    """The tour ends well and shows what it must."""
    said = run_local(stack.folder, "demo", timeout=240)
    assert said.returncode == 0, said.stdout + said.stderr
    for shown in ("← 201", "← 200", "Field 'content' is required", "episodes.ProjectEpisodeCreated.v1", "make down"):
        assert shown in said.stdout


def all_ready(stack: Stack) -> bool:
    return run_local(stack.folder, "status").returncode == 0


def test_up_returns_when_everything_is_ready(stack: Stack) -> None:
    bring_up(stack)
    said = run_local(stack.folder, "status")
    assert said.returncode == 0, said.stdout
    assert stack.pids().keys() == PROCESSES
    assert all(psutil.pid_exists(pid) for pid in stack.pids().values())
    with urllib.request.urlopen(f"{stack.settings()['GATEWAY_URL']}/readyz") as answer:
        assert answer.status == 200


def test_up_again_leaves_what_runs_alone(stack: Stack) -> None:
    bring_up(stack)
    before = stack.pids()
    bring_up(stack)
    assert stack.pids() == before


@pytest.mark.parametrize("name", sorted(PROCESSES - {"supervisor"}))
def test_a_killed_process_is_back_and_everything_is_ready_again(stack: Stack, name: str) -> None:
    bring_up(stack)
    killed = stack.pids()[name]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: stack.pids().get(name) not in (None, killed))
    wait_until(lambda: all_ready(stack), timeout=60)


def test_the_demo_runs_again_and_again(stack: Stack) -> None:
    show_demo(stack)
    show_demo(stack)


def test_a_stack_whose_supervisor_was_killed_comes_up_again_with_its_data(stack: Stack) -> None:
    bring_up(stack)
    with pymongo.MongoClient[dict[str, int]](stack.settings()["MONGODB_URL"]) as client:
        client.kept.kept.replace_one({"_id": 1}, {"_id": 1}, upsert=True)
    before = stack.pids()
    os.kill(before["supervisor"], signal.SIGKILL)
    bring_up(stack)
    assert not set(before.values()) & set(stack.pids().values())
    assert {process.pid for process in survivors.find(stack.folder)} == set(stack.pids().values())
    with pymongo.MongoClient[dict[str, int]](stack.settings()["MONGODB_URL"]) as client:
        assert client.kept.kept.find_one() == {"_id": 1}


def test_down_leaves_nothing_behind_and_the_next_up_works(stack: Stack) -> None:
    bring_up(stack)
    assert run_local(stack.folder, "down", timeout=120).returncode == 0
    assert survivors.find(stack.folder) == []
    assert stack.pids() == {}
    assert run_local(stack.folder, "status").returncode == 1
    bring_up(stack)


def test_reset_begins_anew(stack: Stack) -> None:
    bring_up(stack)
    assert run_local(stack.folder, "reset", timeout=120).returncode == 0
    assert not (stack.folder / "kafka").exists()
    bring_up(stack)
    with pymongo.MongoClient[dict[str, int]](stack.settings()["MONGODB_URL"]) as client:
        assert client.kept.kept.find_one() is None
