"""Processes of a stack found by the mark they carry, whoever started them and whatever became of it."""

import shutil
import sys
from pathlib import Path

import psutil

from local.process import OWNER


def find(folder: Path) -> list[psutil.Process]:
    """Give all living processes of the stack in this folder."""
    return [process for process in psutil.process_iter() if is_ours(process, folder)]


def is_ours(process: psutil.Process, folder: Path) -> bool:
    """Say whether a process lives and belongs to the stack in this folder."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(OWNER) == str(folder)
    except psutil.Error:
        return False


def end(processes: list[psutil.Process], grace: float = 15) -> None:
    """Ask processes to end and, after `grace` seconds, make them."""
    for process in processes:
        send(process, "resume")
        send(process, "terminate")
    _, alive = psutil.wait_procs(processes, grace)
    for process in alive:
        send(process, "kill")
    psutil.wait_procs(alive, 5)


def send(process: psutil.Process, signal: str) -> None:
    """Call a method of the process; one that has ended is left in peace."""
    try:
        getattr(process, signal)()
    except psutil.Error:
        return


if __name__ == "__main__":
    # `python -m local.survivors FOLDER`: wait for the end of standard input, which comes with the end of the process
    # that holds the other end of the pipe, however it ended; then end and delete whatever that left behind.
    sys.stdin.read()
    end(find(Path(sys.argv[1])), grace=0)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
