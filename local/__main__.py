"""The command line: `python -m local up|down|status|logs|reset|token|demo`."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from local import demo as tour
from local import survivors, view
from local.prerequisites import MissingPrerequisiteError, Say
from local.process import tail
from local.servers import ManagedContainer
from local.services import make_token
from local.stack import NAMES, SUPERVISOR, PortInUseError, Stack, this_stack
from local.supervisor import Supervisor, start_supervisor

UP_WITHIN = 180.0
DOWN_WITHIN = 120.0
TOO_MANY_RESTARTS = 5

app = typer.Typer(
    help="Run Kafka, MongoDB and the three processes on this machine, in the folder LOCAL_DIR (.local by default).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def up() -> None:
    """Start everything and wait until it is ready; what already runs is left alone."""
    stack = this_stack()
    with _sentences():
        _start(stack)
        _wait_ready(stack)
    settings = stack.settings()
    console.print(f"The gateway listens on {settings['GATEWAY_URL']}; see {stack.env_file} for all settings.")


@app.command()
def down() -> None:
    """Stop everything in good order; the data stays."""
    stack = this_stack()
    with stack.locked("command"):
        _stop(stack)
    console.print("The stack is down.")


@app.command()
def status() -> None:
    """Show every process; the exit code is 1 unless all are ready."""
    rows = view.look(this_stack())
    if not any(row.pid for row in rows):
        console.print("The stack is down.")
    else:
        console.print(view.table(rows))
    for row in rows:
        if row.last_exit and (row.pid is None or row.restarts) and not row.done:
            console.print(f"\n[bold]{row.name}[/] {row.last_exit}; its last lines then:", style="red")
            console.print(row.last_log or "(none)", markup=False)
    if not all(row.ready for row in rows):
        raise typer.Exit(1)


@app.command()
def logs(
    names: Annotated[list[str] | None, typer.Argument(help="Whose; all by default.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many lines of each.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what they write, until Ctrl-C.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Show the last lines of the logs."""
    stack = this_stack()
    files = {name: stack.log(name) for name in names or (SUPERVISOR, *NAMES)}
    for name, file in files.items():
        console.print(f"[bold]{name}[/] ({escape(str(file))})")
        console.print(tail(file, lines), markup=False)
    offsets = {name: file.stat().st_size for name, file in files.items() if file.exists()}
    while follow:
        time.sleep(0.3)
        for name, file in files.items():
            with contextlib.suppress(FileNotFoundError), file.open(errors="replace") as text:
                text.seek(min(offsets.get(name, 0), file.stat().st_size))
                for line in text:
                    console.print(f"{name}: {line.rstrip()}", markup=False)
                offsets[name] = text.tell()


@app.command()
def reset() -> None:
    """Stop everything and delete its data and logs. Ports, secrets and what was downloaded stay."""
    stack = this_stack()
    with stack.locked("command"):
        _stop(stack)
        with contextlib.suppress(MissingPrerequisiteError):
            for server in stack.make_servers() if stack.settings() else ():
                if isinstance(server, ManagedContainer):
                    server.remove_with_data()
        for path in stack.folder.iterdir():
            if path.name in ("cache", stack.env_file.name, "command.lock"):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    console.print("The stack is down and its data is deleted.")


@app.command()
def token(
    username: Annotated[str, typer.Option(help="Whose token; also the caller's own namespace.")],
    namespace: Annotated[list[str] | None, typer.Option(help="A further namespace to grant; * for all.")] = None,
    hours: Annotated[float, typer.Option(help="How long it is good for.")] = 12,
) -> None:
    """Print a JWT for the projects API."""
    stack = this_stack()
    if not stack.settings():
        stack.configure()
    claims = {"namespaces": namespace} if namespace else {}
    print(make_token(stack.settings()["JWT_SECRET"], username, lifetime=hours * 3600, **claims))


@app.command()
def demo() -> None:
    """Start everything, then walk through the main job, showing each request and answer."""
    stack = this_stack()
    with _sentences():
        _start(stack)
        _wait_ready(stack)
        tour.run(stack.settings(), console)


@app.command(hidden=True)
def supervise() -> None:
    """Be the supervisor (`up` starts it)."""
    stack = this_stack()
    with stack.locked(SUPERVISOR):
        Supervisor(stack, stack.make_programs()).run(os.getpid())


def _start(stack: Stack) -> None:
    with stack.locked("command"):
        if stack.supervisor() is not None:
            return
        if left := survivors.find(stack.folder):
            console.print(f"stopping {len(left)} processes that an earlier supervisor left behind")
            survivors.end(left)
        stack.configure()
        with _progress() as say:
            stack.make_servers(say)
        for file in (stack.pids_file, stack.state_file):
            file.unlink(missing_ok=True)
        supervisor = start_supervisor(stack)
        while stack.supervisor() is None:
            if supervisor.poll() is not None:
                raise tour.FailedError(f"The supervisor does not start:\n{tail(stack.log(SUPERVISOR))}")
            time.sleep(0.05)


def _wait_ready(stack: Stack) -> None:
    began = time.monotonic()
    seen: set[str] = set()
    restarts: dict[str, int] = {}
    with _progress() as say:
        while True:
            rows = view.look(stack)
            for row in rows:
                if row.ready and row.name not in seen:
                    seen.add(row.name)
                    console.print(f"[green]✓[/] {row.name} {row.state} after {time.monotonic() - began:.1f} s")
            waiting = [row for row in rows if not row.ready]
            if not waiting:
                return
            say("waiting for " + ", ".join(f"{row.name} ({_brief(row)})" for row in waiting))
            for row in waiting:
                if row.name == SUPERVISOR and row.pid is None:
                    raise tour.FailedError(f"The supervisor died:\n{tail(stack.log(SUPERVISOR))}")
                if row.restarts - restarts.setdefault(row.name, row.restarts) >= TOO_MANY_RESTARTS:
                    raise tour.FailedError(f"{row.name} keeps dying: {row.last_exit}. Its last lines:\n{row.last_log}")
            if time.monotonic() - began > UP_WITHIN:
                raise tour.FailedError(f"Not ready after {UP_WITHIN:.0f} s; `make status` and `make logs` say more.")
            time.sleep(0.2)


def _brief(row: view.Row) -> str:
    return (row.missing or row.state).partition(" (")[0]


def _stop(stack: Stack) -> None:
    supervisor = stack.supervisor()
    if supervisor is not None:
        with _progress() as say:
            survivors.send(supervisor, "resume")
            survivors.send(supervisor, "terminate")
            deadline = time.monotonic() + DOWN_WITHIN
            while survivors.is_ours(supervisor, stack.folder) and time.monotonic() < deadline:
                say("stopping " + ", ".join(sorted(stack.pids().keys() - {SUPERVISOR})))
                time.sleep(0.1)
    survivors.end(survivors.find(stack.folder))
    if stack.folder.exists():
        for file in (stack.pids_file, stack.state_file):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress() -> Iterator[Say]:
    """Show what is going on: in one line that changes at a terminal, else in a line every second at most."""
    with console.status("…") as line:
        said_at = 0.0

        def say(message: str) -> None:
            nonlocal said_at
            if console.is_terminal:
                line.update(escape(message))
            elif time.monotonic() - said_at > 1:
                said_at = time.monotonic()
                console.print(f"… {message}", markup=False)

        yield say


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Turn what a person must mend into a sentence and exit code 1."""
    try:
        yield
    except (MissingPrerequisiteError, PortInUseError, tour.FailedError) as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    app()
