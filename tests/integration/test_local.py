"""The supervisor and the command line of the local stack, on stand-ins that start at once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest

from local import prerequisites, survivors
from local.prerequisites import MissingPrerequisiteError
from local.process import OWNER, ROOT, ManagedProcess, NotReadyError, rotate
from local.stack import PORTS, PortInUseError, Stack
from tests.cluster import run_local, wait_until

SLEEPER = "import time; print('started', flush=True); time.sleep(600)"
SUPERVISE = """
import json, os, sys
from pathlib import Path
from local.process import OWNER, ManagedProcess
from local.stack import Stack
from local.supervisor import Supervisor
folder = Path(sys.argv[1])
programs = [
    ManagedProcess(name, [sys.executable, "-c", code], env={OWNER: str(folder)}, log=folder / "logs" / f"{name}.log")
    for name, code in json.loads(sys.argv[2]).items()
]
Supervisor(Stack(folder), programs).run(os.getpid())
"""


class StandIns:
    """A stack in `folder` whose supervisor runs stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.stack = Stack(folder)
        self._supervisors: list[ManagedProcess] = []

    def run(self, programs: Mapping[str, str]) -> ManagedProcess:
        """Supervise programs, given by name and Python code, and wait until the supervisor has said what it runs."""
        folder = self.stack.folder
        supervisor = ManagedProcess(
            "supervisor",
            [sys.executable, "-c", SUPERVISE, str(folder), json.dumps(programs)],
            env={OWNER: str(folder), "PYTHONPATH": str(ROOT)},
            log=self.stack.log("supervisor"),
        )
        self._supervisors.append(supervisor)
        supervisor.start()
        wait_until(lambda: programs.keys() <= self.stack.pids().keys() or self.exits(next(iter(programs))))
        return supervisor

    def pid(self, name: str) -> int | None:
        return self.stack.pids().get(name)

    def exits(self, name: str) -> list[dict[str, Any]]:
        exits: list[dict[str, Any]] = self.stack.state().get(name, {}).get("exits", [])
        return exits

    def close(self) -> None:
        for supervisor in self._supervisors:
            supervisor.stop()
        survivors.end(survivors.find(self.stack.folder), grace=0)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[StandIns]:
    running = StandIns(tmp_path)
    yield running
    running.close()


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that belongs to no stack."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def test_a_killed_process_comes_back_under_a_new_pid(stand_ins: StandIns) -> None:
    stand_ins.run({"gateway": SLEEPER, "ingestor": SLEEPER})
    before = stand_ins.stack.pids()
    os.kill(before["gateway"], signal.SIGKILL)
    after = wait_until(lambda: stand_ins.pid("gateway") not in (None, before["gateway"]) and stand_ins.stack.pids())
    assert psutil.pid_exists(after["gateway"])
    assert after["ingestor"] == before["ingestor"]
    assert stand_ins.exits("gateway")[0]["code"] == -signal.SIGKILL
    assert stand_ins.stack.state()["gateway"]["restarts"] == 1


def test_what_keeps_dying_is_started_again_ever_more_slowly(stand_ins: StandIns, tmp_path: Path) -> None:
    times = tmp_path / "times"
    stand_ins.run({"gateway": f"import time; open({str(times)!r}, 'a').write(f'{{time.time()}}\\n')"})
    wait_until(lambda: times.exists() and times.read_text().count("\n") >= 5)
    starts = [float(line) for line in times.read_text().split()]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert pauses[0] >= 0.2
    assert pauses[3] >= 1.6
    assert pauses == sorted(pauses)


def test_exits_are_kept_with_the_last_lines_of_the_log(stand_ins: StandIns) -> None:
    stand_ins.run({"projector": "print('the last words'); raise SystemExit(7)"})
    first = wait_until(lambda: stand_ins.exits("projector"))[0]
    assert first["code"] == 7
    assert "the last words" in first["log"]


def test_the_topics_are_created_once(stand_ins: StandIns) -> None:
    stand_ins.run({"gateway": SLEEPER, "topics": "import time; time.sleep(0.5)"})
    wait_until(lambda: stand_ins.stack.state()["topics"]["done"])
    time.sleep(0.5)  # longer than the first pause before a restart
    assert stand_ins.pid("topics") is None
    assert stand_ins.stack.state()["topics"]["restarts"] == 0


def test_the_supervisor_stops_all_in_good_order_when_asked(stand_ins: StandIns) -> None:
    names = ("kafka", "mongodb", "projector", "ingestor", "gateway")
    supervisor = stand_ins.run(dict.fromkeys(names, SLEEPER))
    assert supervisor.stop() == 0
    assert survivors.find(stand_ins.stack.folder) == []
    assert stand_ins.stack.pids() == {}
    order = [line.removeprefix("stopping ") for line in supervisor.log_tail().splitlines()]
    assert order == ["gateway", "ingestor", "projector", "kafka", "mongodb"]


def test_nothing_outlives_the_folder_of_its_stack(stand_ins: StandIns) -> None:
    supervisor = stand_ins.run({"gateway": SLEEPER, "kafka": SLEEPER})
    shutil.rmtree(stand_ins.stack.folder)
    assert supervisor.wait(timeout=10) == 0
    assert survivors.find(stand_ins.stack.folder) == []


def test_what_a_killed_supervisor_left_behind_is_found_and_stopped(stand_ins: StandIns) -> None:
    supervisor = stand_ins.run({"gateway": SLEEPER, "kafka": SLEEPER})
    supervisor.kill()
    stand_ins.stack.pids_file.unlink()  # not even needed: the processes carry the stack's mark
    assert len(survivors.find(stand_ins.stack.folder)) == 2
    assert run_local(stand_ins.stack.folder, "down").returncode == 0
    assert survivors.find(stand_ins.stack.folder) == []


def test_a_pid_that_now_is_a_strangers_is_left_alone(stand_ins: StandIns, stranger: "subprocess.Popen[bytes]") -> None:
    stand_ins.stack.pids_file.write_text(json.dumps({"supervisor": stranger.pid, "gateway": stranger.pid}))
    assert survivors.find(stand_ins.stack.folder) == []  # before anything is stopped on the strength of it
    assert stand_ins.stack.supervisor() is None
    assert "The stack is down" in run_local(stand_ins.stack.folder, "status").stdout
    assert run_local(stand_ins.stack.folder, "down").returncode == 0
    assert stranger.poll() is None


def test_status_shows_how_a_process_died(stand_ins: StandIns) -> None:
    stand_ins.stack.configure()
    stand_ins.run({"gateway": "print('no such door'); raise SystemExit(3)", "ingestor": SLEEPER})
    wait_until(lambda: stand_ins.exits("gateway"))
    said = run_local(stand_ins.stack.folder, "status")
    assert said.returncode == 1
    assert "ended with exit code 3" in said.stdout
    assert "no such door" in said.stdout
    assert str(stand_ins.pid("ingestor")) in said.stdout


def test_status_shows_a_frozen_process(stand_ins: StandIns) -> None:
    stand_ins.stack.configure()
    stand_ins.run({"gateway": SLEEPER})
    os.kill(stand_ins.pid("gateway") or 0, signal.SIGSTOP)
    said = run_local(stand_ins.stack.folder, "status", COLUMNS="200")
    assert "frozen" in said.stdout


def test_a_stack_that_never_was_is_down(tmp_path: Path) -> None:
    said = run_local(tmp_path / "new", "status")
    assert (said.returncode, said.stdout.strip()) == (1, "The stack is down.")
    assert run_local(tmp_path / "new", "down").returncode == 0
    assert run_local(tmp_path / "new", "reset").returncode == 0


def test_reset_keeps_nothing_but_settings_and_downloads(stand_ins: StandIns) -> None:
    folder = stand_ins.stack.folder
    stand_ins.stack.configure()
    settings = stand_ins.stack.settings()
    stand_ins.run({"ingestor": SLEEPER})
    for name in ("kafka", "mongodb", "ingestor", "cache"):
        (folder / name).mkdir()
        (folder / name / "data").write_text("data")
    assert run_local(folder, "reset").returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "command.lock", "env"]
    assert survivors.find(folder) == []
    assert stand_ins.stack.settings() == settings


def test_two_stacks_share_neither_ports_nor_secrets(tmp_path: Path) -> None:
    one, other = Stack(tmp_path / "one"), Stack(tmp_path / "other")
    one.configure()
    other.configure()
    assert set(one.settings()) == set(other.settings())
    same = {name for name, value in one.settings().items() if value == other.settings()[name]}
    assert same == set()


def test_settings_are_made_once(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    stack.configure()
    settings = stack.settings()
    assert settings.keys() >= {"GATEWAY_URL", "JWT_SECRET", "API_KEY", "KAFKA_BOOTSTRAP_SERVERS", "MONGODB_URL"}
    assert stack.env_file.stat().st_mode & 0o077 == 0
    stack.configure()
    assert stack.settings() == settings


def test_a_port_may_be_named_and_one_that_was_taken_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(tmp_path)
    stack.configure()
    before = stack.ports()
    with socket.create_server(("127.0.0.1", before["kafka"])) as taken:
        stack.configure()
        assert stack.ports()["kafka"] != before["kafka"]
        assert stack.ports()["gateway"] == before["gateway"]
        monkeypatch.setenv("GATEWAY_PORT", str(before["kafka"]))
        with pytest.raises(PortInUseError, match=r"Port \d+ \(GATEWAY_PORT\) is in use"):
            stack.configure()
        del taken
    stack.configure()
    assert stack.settings()["GATEWAY_URL"] == f"http://127.0.0.1:{before['kafka']}"
    assert stack.ports().keys() == PORTS.keys()


def test_a_token_is_signed_with_the_secret_of_the_stack(tmp_path: Path) -> None:
    said = run_local(tmp_path, "token", "--username", "alice", "--namespace", "robots", "--namespace", "*")
    claims = jwt.decode(said.stdout.strip(), Stack(tmp_path).settings()["JWT_SECRET"], algorithms=["HS256"])
    assert claims["sub"] == claims["username"] == "alice"
    assert claims["namespaces"] == ["robots", "*"]
    assert claims["exp"] - claims["iat"] == 12 * 3600


@pytest.mark.parametrize(
    ("command", "find"),
    [
        ("java", prerequisites.find_java),
        ("mvn", prerequisites.kafka_jars),
        ("mongod", prerequisites.find_mongod),
    ],
)
def test_a_missing_prerequisite_is_one_sentence(
    command: str, find: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("LOCAL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("local.prerequisites._mongod_of_the_wheel", lambda: None)
    with pytest.raises(MissingPrerequisiteError, match=f"no `{command}`") as raised:
        find()
    assert "\n" not in str(raised.value)


def test_a_vain_fetch_shows_what_maven_said_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maven = tmp_path / "bin" / "mvn"
    maven.parent.mkdir()
    maven.write_text("#!/bin/sh\necho no route to host\nexit 1\n")
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", f"{maven.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(MissingPrerequisiteError, match=r"(?s)Maven could not fetch Kafka's jars.*no route to host"):
        prerequisites.kafka_jars()
    assert list((tmp_path / "cache").iterdir()) == []


def test_up_says_which_prerequisite_is_missing(tmp_path: Path) -> None:
    said = run_local(tmp_path, "up", PATH="/nowhere", JAVA_HOME="", DOCKER_HOST="unix:///nowhere")
    assert said.returncode == 1
    assert "Kafka needs Java 17 or newer: install one" in said.stdout
    assert "start a Docker engine: none answers here." in said.stdout
    assert "Traceback" not in said.stdout + said.stderr
    assert survivors.find(tmp_path) == []


def test_an_old_java_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_402\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MissingPrerequisiteError, match=r'is openjdk version "1\.8\.0_402"'):
        prerequisites.find_java()


def test_a_mongod_that_lost_its_executable_bit_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "fiftyone" / "db" / "bin" / "mongod"
    wheel.parent.mkdir(parents=True)
    wheel.write_text("#!/bin/sh\n")
    wheel.chmod(0o644)
    for package in (wheel.parents[2], wheel.parents[1]):
        (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fiftyone"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        mongod = Path(prerequisites.find_mongod())
        assert mongod.parent == tmp_path / "cache"
        assert os.access(mongod, os.X_OK)


def test_a_frozen_process_can_be_stopped(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5));" + SLEEPER
    process = ManagedProcess("polite", [sys.executable, "-c", code], env={}, log=tmp_path / "log")
    process.start()
    wait_until(process.log_tail)
    process.pause()
    assert process.stop(timeout=5) == 5
    assert process.pid is None


def test_a_process_that_does_not_want_to_stop_is_killed(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER
    process = ManagedProcess("deaf", [sys.executable, "-c", code], env={}, log=tmp_path / "log")
    process.start()
    wait_until(process.log_tail)
    assert process.stop(timeout=0.2) == -signal.SIGKILL


def test_waiting_for_a_process_that_died_ends_at_once_with_its_log(tmp_path: Path) -> None:
    code = "print('no such door'); raise SystemExit(3)"
    process = ManagedProcess(
        "lost", [sys.executable, "-c", code], env={}, log=tmp_path / "log", probe="http://127.0.0.1:1/readyz"
    )
    process.start()
    with pytest.raises(NotReadyError, match=r"(?s)lost ended with exit code 3.*no such door"):
        process.wait_ready(timeout=30)


def test_a_log_that_grew_too_long_is_moved_aside_under_its_writer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab") as writer:
        writer.write(b"old" * 10)
        writer.flush()
        rotate(log, limit=20)
        writer.write(b"new")
    assert log.read_bytes() == b"new"
    assert (tmp_path / "log.1").read_bytes() == b"old" * 10
