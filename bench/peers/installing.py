"""Runs the package managers by which peers are installed."""

import shutil
import subprocess
from collections.abc import Sequence

from bench.harness import LeftOutError


def run_installer(name: str, command: Sequence[str]) -> None:
    """Run a package manager to its end.

    Raises:
        LeftOutError: it is not on this machine, or failed.
    """
    if shutil.which(command[0]) is None:
        raise LeftOutError(f"{name}: there is no `{command[0]}` on this machine")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise LeftOutError(f"{name}: `{' '.join(command[:4])} …` failed: {done.stdout[-500:]}")
