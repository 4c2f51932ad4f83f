"""What ships is what is tested: docker-compose.yml, the Dockerfile and the Makefile against `local`."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from local.process import ROOT
from local.servers import KAFKA_IMAGE, KAFKA_SETTINGS, MONGODB_IMAGE, REPLICA_SET, kafka_variable
from local.services import COMMANDS, SERVICES

COMPOSE = (ROOT / "docker-compose.yml").read_text()


def service(name: str) -> str:
    """Give the lines of one service in docker-compose.yml."""
    found = re.search(rf"^  {name}:\n((?:    .*\n|\n)+)", COMPOSE.partition("\nservices:\n")[2], re.MULTILINE)
    assert found is not None, f"docker-compose.yml has no service {name}"
    return found[1]


def validator() -> list[str] | None:
    """Find a program that can validate docker-compose.yml."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0
        ):
            return command
    return None


@pytest.mark.parametrize("suffix", ["", "-cluster"])
@pytest.mark.parametrize("kind", COMMANDS)
def test_compose_runs_the_commands_that_local_runs(kind: str, suffix: str) -> None:
    command = re.search(r"^    command: (\[.*\])$", service(kind + suffix), re.MULTILINE)
    assert command is not None
    assert json.loads(command[1]) == list(COMMANDS[kind])


def test_compose_runs_the_images_that_local_runs() -> None:
    images = set(re.findall(r"^ +image: (\S+)$", COMPOSE, re.MULTILINE))
    assert images == {KAFKA_IMAGE, MONGODB_IMAGE, "episodes:0.1.0"}


def test_kafka_in_compose_has_the_settings_of_the_local_one() -> None:
    for name, value in KAFKA_SETTINGS.items():
        assert f'{kafka_variable(name)}: "{value}"' in COMPOSE
    assert f'"--replSet", "{REPLICA_SET}"' in COMPOSE


def test_the_local_kafka_is_the_version_of_the_image() -> None:
    pom = (ROOT / "local" / "kafka" / "pom.xml").read_text()
    assert f"<version>{KAFKA_IMAGE.partition(':')[2]}</version>" in pom


def test_the_cluster_keeps_every_write_twice() -> None:
    for setting in (
        'KAFKA_DEFAULT_REPLICATION_FACTOR: "3"',
        'KAFKA_MIN_INSYNC_REPLICAS: "2"',
        'KAFKA_UNCLEAN_LEADER_ELECTION_ENABLE: "false"',
        'TOPICS_REPLICATION_FACTOR: "3"',
        'TOPICS_MIN_INSYNC_REPLICAS: "2"',
    ):
        assert setting in COMPOSE


@pytest.mark.parametrize("profile", [[], ["--profile", "cluster"]])
def test_compose_is_valid(profile: list[str]) -> None:
    command = validator()
    if command is None:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed here")
    env = {**os.environ, "JWT_SECRET": "s" * 32, "API_KEYS": '{"00": ["*"]}'}
    said = subprocess.run(
        [*command, "--file", str(ROOT / "docker-compose.yml"), *profile, "config"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "  gateway:\n" in said.stdout


def test_compose_refuses_to_start_without_secrets(tmp_path: Path) -> None:
    for name in ("JWT_SECRET", "API_KEYS"):
        assert f'{name}: "${{{name}:?' in COMPOSE


def test_the_image_holds_all_three_processes_and_runs_without_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for package in ("shared", *SERVICES):
        assert f"COPY {package} {package}\n" in dockerfile
        assert f"!{package}\n" in (ROOT / ".dockerignore").read_text()
    assert "--require-hashes -r requirements.lock" in dockerfile
    assert dockerfile.index("\nUSER episodes\n") < dockerfile.index("\nCMD ")


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_make_help_prints_every_word() -> None:
    words = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words is not None
    said = make().stdout
    assert re.findall(r"^make (\S+) +\S", said, re.MULTILINE) == sorted(words[1].split(), key=said.index)
    assert set(words[1].split()) == set(re.findall(r"^make (\S+)", said, re.MULTILINE))


def test_a_missing_python_is_one_sentence(tmp_path: Path) -> None:
    said = make("venv", "PYTHON=no-such-python", f"VENV={tmp_path}/venv")
    assert said.returncode != 0
    assert said.stderr.splitlines()[0] == (
        "Python 3.11 or newer is needed, and 'no-such-python' is none: install one, or name it with PYTHON=…"
    )
