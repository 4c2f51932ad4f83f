"""Faults in the service itself, put there on purpose: the suite must find every one of them.

`python -m tests.chaos.bugs` puts each into a copy of the service, lets clients work on it while it is disturbed as the
bug needs it, checks, and prints by what it was found. `python -m tests.chaos.bugs NAME…` takes only these. The exit
status is 1 if one was not found. A run without any bug, `none`, must find nothing.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
import typer
import uvloop
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from local.process import ROOT, NotReadyError
from tests.chaos.checker import check
from tests.chaos.faults import KINDS, QUICK
from tests.chaos.history import History
from tests.chaos.model import Finding, read_all
from tests.chaos.proxy import Delay
from tests.chaos.stack import ChaosStack, Layout, chaos_stack
from tests.chaos.workload import run_workload, settle

PACKAGES = ("gateway", "ingestor", "projector", "shared")


class Bug(Struct, frozen=True, kw_only=True):
    """One fault in the service."""

    name: str
    sentence: str
    file: str
    old: str
    """Stands in the file exactly once."""
    new: str
    findings: tuple[str, ...]
    """Kinds of findings, one of which at least must be made."""
    faults: tuple[str, ...] = ()
    """What it needs to show, kinds of `tests.chaos.faults`; nothing if it shows by itself."""
    slow: tuple[str, ...] = ()
    """Ways of the stack on which everything takes a while longer, so that more is under way at once."""
    seconds: float = 10.0
    """How long it takes to show, mostly."""
    settings: dict[str, str] = {}
    """Environment variables without which it would take long to show."""


class Result(Struct):
    """What a run with one bug came to."""

    name: str
    found: bool
    """Whether a finding of the kinds that it should yield was made."""
    kinds: dict[str, int]
    """Kind of finding → how many."""
    seconds: float
    operations: int
    example: str = ""


def patched(bug: Bug, source: str) -> str:
    """The file's text with the bug in it.

    Raises:
        LookupError: what it replaces is not there exactly once.
    """
    if source.count(bug.old) != 1:
        raise LookupError(f"{bug.name}: what it replaces stands {source.count(bug.old)} times in {bug.file}")
    return source.replace(bug.old, bug.new)


def plant(bug: Bug, code: Path) -> None:
    """Put the bug into a copy of the service."""
    file = code / bug.file
    file.write_text(patched(bug, file.read_text()))


_INGESTOR_DIES = ("kill-ingestor",)
_PROJECTOR_DIES = ("kill-projector",)

BUGS: Sequence[Bug] = (
    # -- the writer
    Bug(
        name="answer-before-ack",
        sentence="Answers a batch before its append is acknowledged, and whether it ever is or not.",
        file="ingestor/writer.py",
        old="""            with translated(f"appending to {EVENTS}/{self._partition}"):
                async with asyncio.timeout(_ACK_SECONDS):
                    appended = await sent
            self._tenure.settle(batch, appended.offset)
""",
        new="""            try:
                appended = await asyncio.wait_for(sent, 0.001)
                self._tenure.settle(batch, appended.offset)
            except Exception:
                pass
""",
        findings=("lost", "id_repeated", "unexplained"),
        faults=("stop-ingestor",),
        seconds=40,
    ),
    Bug(
        name="offset-check-ignored",
        sentence="Takes a batch for good wherever it landed, also when another writer has taken over.",
        file="ingestor/tenure.py",
        old="        check_place(offset, batch.before, fence=self._fence, position_at_fence=self._position_at_fence)\n",
        new="",
        findings=("lost", "id_repeated", "unexplained"),
        faults=("stop-ingestor",),
        seconds=40,
    ),
    Bug(
        name="id-reused-after-crash",
        sentence="Forgets after a start that the last event_id of a stream was given.",
        file="ingestor/domain/judgement.py",
        old="""    after = _fold(overlay, events)
    last = events[-1]
    if not with_receipt""",
        new="""    after = _fold(overlay, events)
    last = events[-1]
    overlay[head_key(last.stream)] = StreamHead(EventId(last.event_id - 1), last.at)
    if not with_receipt""",
        findings=("id_repeated",),
        faults=("state-deleted",),
        seconds=15,
    ),
    Bug(
        name="checkpoint-one-behind",
        sentence="Notes as the last decided command the one before it.",
        file="ingestor/tenure.py",
        old="Checkpoint(cursor, self._nonce, batch.command_offset))",
        new="Checkpoint(cursor, self._nonce, batch.command_offset - 1))",
        findings=("applied_twice", "unknown_twice", "unexplained"),
        faults=_INGESTOR_DIES,
    ),
    Bug(
        name="last-command-again",
        sentence="Begins a tenure with the last command that was decided, not with the one after it.",
        file="ingestor/writer.py",
        old="        return last + 1\n",
        new="        return max(last, first_kept)\n",
        findings=("applied_twice", "unknown_twice", "unexplained"),
        faults=_INGESTOR_DIES,
    ),
    Bug(
        name="backlog-skipped",
        sentence="Begins a tenure with the newest command: what waited meanwhile is skipped.",
        file="ingestor/writer.py",
        old="        return last + 1\n",
        new="        return end\n",
        findings=("lost",),
        faults=_INGESTOR_DIES,
    ),
    Bug(
        name="foreign-state-trusted",
        sentence="Does not look whether stored state belongs to this very log.",
        file="ingestor/recovery.py",
        old="and found.fence.nonce == checkpoint.nonce",
        new="or found is not None",
        findings=("lost", "gap", "id_repeated", "unexplained"),
        faults=("state-swapped",),
        seconds=20,
    ),
    Bug(
        name="event-dropped",
        sentence="Leaves one event in five out of its batch, unless it is a command's last.",
        file="ingestor/tenure.py",
        old="        for event in events:\n            value",
        new="        for event in events:\n            if event.event_id % 5 == 0 and event.completes is None:\n"
        "                continue\n            value",
        findings=("gap", "lost"),
    ),
    Bug(
        name="stored-state-only",
        sentence="Decides on the stored state, without the commands before that are still on their way.",
        file="ingestor/tenure.py",
        old="        return self._store.get(key) if unsettled is None else unsettled[1]\n",
        new="        return self._store.get(key)\n",
        findings=("id_repeated",),
    ),
    Bug(
        name="overlay-cleared-early",
        sentence="Forgets what a later batch changed as soon as an earlier one is stored.",
        file="ingestor/tenure.py",
        old="            if self._unsettled[key][0] == batch.number:\n                del self._unsettled[key]\n",
        new="            self._unsettled.pop(key, None)\n",
        findings=("id_repeated",),
        slow=("ingestor-kafka",),
        seconds=15,
    ),
    # -- the rules
    Bug(
        name="ids-burnt-by-refusals",
        sentence="Gives an event_id to a refused command.",
        file="ingestor/domain/judgement.py",
        old="        return Judgement(receipt, note=NotedCommand(command.command_id, refused.code))\n",
        new="        burnt = {head_key(command.stream): StreamHead(EventId(head.event_id + 1), head.at)}\n"
        "        return Judgement(receipt, changes=burnt, note=NotedCommand(command.command_id, refused.code))\n",
        findings=("gap",),
    ),
    Bug(
        name="keys-forgotten",
        sentence="Does not remember Idempotency-Keys.",
        file="ingestor/domain/judgement.py",
        old="    _remember(changes, logged[-1], receipt)\n",
        new="",
        findings=("key_two_effects",),
    ),
    Bug(
        name="keys-forgotten-on-cold-start",
        sentence="Does not learn Idempotency-Keys from the log.",
        file="ingestor/domain/judgement.py",
        old="    _remember(overlay, last, receipt)\n",
        new="",
        findings=("key_two_effects",),
        faults=("state-deleted",),
        seconds=20,
    ),
    Bug(
        name="other-request-under-key",
        sentence="Does not look whether a request under a known key is the same one.",
        file="ingestor/domain/judgement.py",
        old="    if stored.request_hash != command.request_hash:\n",
        new="    if stored.request_hash == '':\n",
        findings=("unexplained",),
    ),
    Bug(
        name="replay-tells-newest-id",
        sentence="Answers a retry with the stream's newest event_id instead of the first answer's.",
        file="ingestor/domain/judgement.py",
        old="replace(first, command_id=command.command_id, replayed=True)",
        new="replace(first, command_id=command.command_id, replayed=True, event_id=head.event_id)",
        findings=("unexplained",),
    ),
    Bug(
        name="item-keys-forgotten",
        sentence="Does not remember the keys of items.",
        file="ingestor/domain/tenant_episode.py",
        old="    if event.idempotency_key is None:\n        return {}\n",
        new="    return {}\n",
        findings=("key_two_effects",),
    ),
    Bug(
        name="half-a-batch",
        sentence="Records all valid items of a batch but the last.",
        file="ingestor/domain/tenant_episode.py",
        old="    for item in command.items:\n",
        new="    for item in command.items[:-1] or command.items:\n",
        findings=("half_batch",),
    ),
    Bug(
        name="repeats-out-of-order",
        sentence="Lists an item that was recorded before at the end of the answer, not in its place.",
        file="ingestor/domain/tenant_episode.py",
        old="        pairs.insert(repeat.place, (repeat.event_id, repeat.episode_id))\n",
        new="        pairs.append((repeat.event_id, repeat.episode_id))\n",
        findings=("unexplained",),
    ),
    Bug(
        name="rename-to-deleted-name",
        sentence="Lets a rename take the name of a deleted episode.",
        file="ingestor/domain/project_episode.py",
        old="    if new_name != command.name and state.episode(command.project, new_name) is not None:\n",
        new="    taken = state.episode(command.project, new_name)\n"
        "    if new_name != command.name and taken is not None and taken.deleted_at is None:\n",
        findings=("refused_effect",),
        seconds=25,
    ),
    Bug(
        name="protection-ignored",
        sentence="Changes episodes that are write-protected.",
        file="ingestor/domain/project_episode.py",
        old="    if episode.write_protected:\n",
        new="    if episode.write_protected and not episode.name:\n",
        findings=("refused_effect",),
        seconds=15,
    ),
    Bug(
        name="ordinal-given-twice",
        sentence="Gives two episodes of a project the same place in its list.",
        file="ingestor/domain/project_episode.py",
        old="Project(event.project_id, event.project, event.ordinal + 1)",
        new="Project(event.project_id, event.project, event.ordinal + event.ordinal % 7)",
        findings=("unexplained", "page"),
    ),
    Bug(
        name="folder-made-again",
        sentence="Forgets folders: the same path gets another id.",
        file="ingestor/domain/project_episode.py",
        old="            return {folder_key(stream, event.project, event.path): Folder(event.id)}\n",
        new="            return {}\n",
        findings=("unexplained",),
    ),
    # -- the gateway
    Bug(
        name="command-sent-twice",
        sentence="Publishes each command twice.",
        file="gateway/dispatch.py",
        old="                await (await producer.send(COMMANDS, record.value, record.key, headers=record.headers))\n",
        new="                for _ in range(2):\n"
        "                    await (await producer.send(COMMANDS, record.value, record.key, headers=record.headers))\n",
        findings=("applied_twice", "unknown_twice"),
    ),
    Bug(
        name="unknown-told-as-refused",
        sentence="Says that nothing was published when Kafka went away in the midst of it.",
        file="gateway/dispatch.py",
        old="            reply.set_exception(OutcomeUnknown(command_id))\n",
        new='            reply.set_exception(Unavailable("Kafka does not answer"))\n',
        findings=("refused_effect",),
        faults=("stop-kafka",),
        seconds=25,
    ),
    Bug(
        name="min-event-id-ignored",
        sentence="Answers reads that ask for more than the read model has.",
        file="gateway/reads.py",
        old="            if event_id < wanted:\n",
        new="            if event_id < 0:\n",
        findings=("read_missed",),
        slow=("projector-mongodb",),
        seconds=12,
    ),
    Bug(
        name="gateway-forgets",
        sentence="Does not remember what it acknowledged.",
        file="gateway/reads.py",
        old="            self._acknowledged[stream] = event_id\n",
        new="            pass\n",
        findings=("read_back",),
        slow=("projector-mongodb",),
        seconds=12,
    ),
    Bug(
        name="event-id-read-last",
        sentence="Says how far the read model is after the reading, not as it was before.",
        file="gateway/reads.py",
        old="            self.remember(stream, event_id)  #",
        new='            event_id = await model.event_id(stream)\n            headers["X-Event-Id"] = str(event_id)\n'
        "            self.remember(stream, event_id)  #",
        findings=("generations_mixed", "read_missed", "page"),
        slow=("gateway-mongodb",),
        seconds=15,
    ),
    Bug(
        name="mixed-generations",
        sentence="Goes on looking for episodes in the generation that was in use before.",
        file="gateway/queries.py",
        old="            self._current = generation, MongoReadModel(self._client[generation_database(generation)], "
        "self._wait_room)\n",
        new="            model = MongoReadModel(self._client[generation_database(generation)], self._wait_room)\n"
        "            if self._current is not None:\n"
        "                model._project_episode = self._current[1]._project_episode\n"
        "                model._episodes = self._current[1]._episodes\n"
        "                model._tenant_episode = self._current[1]._tenant_episode\n"
        "            self._current = generation, model\n",
        findings=("generations_mixed", "page", "read_missed"),
        faults=("rebuild",),
        seconds=20,
    ),
    Bug(
        name="lookups-swapped",
        sentence="Gives everybody who joined a lookup what the first one asked for.",
        file="gateway/queries.py",
        old="            for answer in joined.pop(found, ()):\n",
        new="            for answer in [one for there in joined.values() for one in there]:\n",
        findings=("read_unwritten", "generations_mixed", "read_missed", "read_back", "half_batch"),
        seconds=15,
    ),
    Bug(
        name="page-skips",
        sentence="Leaves out one episode between the first page of a list and the second.",
        file="gateway/paging.py",
        old="            return Slice(index * BLOCK, skip, min(page.size, total - first))\n",
        new="            return Slice(index * BLOCK, skip + (page.number > 1), min(page.size, total - first))\n",
        findings=("page",),
    ),
    Bug(
        name="list-in-order-of-change",
        sentence="Lists episodes in the order of their last changes.",
        file="gateway/queries.py",
        old='"sort": [("ordinal", 1)]',
        new='"sort": [("event_id", 1)]',
        findings=("page",),
    ),
    Bug(
        name="deleted-shown",
        sentence="Shows an episode that is deleted.",
        file="gateway/queries.py",
        old='"name", {"deleted": False})',
        new='"name", {})',
        findings=("read_unwritten",),
    ),
    # -- the projector
    Bug(
        name="checkpoint-apart",
        sentence="Moves the checkpoint and writes the documents one after the other, not in one transaction.",
        file="projector/mongodb.py",
        old='    with session.start_transaction(ReadConcern("snapshot"), DURABLE):\n',
        new="    if moves:\n",
        findings=("models_differ", "generations_mixed", "read_missed"),
        faults=_PROJECTOR_DIES,
        seconds=30,
    ),
    Bug(
        name="checkpoint-not-compared",
        sentence="Does not look whether another projector has moved the checkpoint.",
        file="projector/mongodb.py",
        old='        {"_id": move.partition, **_fields(move.before), **unmended}, change,',
        new='        {"_id": move.partition, **unmended}, change,',
        findings=("models_differ", "read_back", "generations_mixed", "read_missed"),
        faults=("stop-projector",),
        seconds=45,
    ),
    Bug(
        name="half-commands-applied",
        sentence="Applies the events of a command one by one.",
        file="projector/commits.py",
        old="                commit = self._reader.read(record.offset, record.value)\n",
        new="                commit = self._reader.read(record.offset, record.value)\n"
        "                if commit is None and self._reader._events:\n"
        "                    commit = Commit(self._reader.cursor, tuple(self._reader._events))\n"
        "                    self._reader._events = []\n",
        findings=("half_batch",),
        settings={"PROJECTOR_MAX_BATCH_EVENTS": "1"},
        seconds=15,
    ),
    Bug(
        name="change-dropped",
        sentence="Does not bring a changed folder into the read model.",
        file="projector/views/project_episodes.py",
        old="    if changes.folder is not UNSET:\n",
        new="    if changes.folder is UNSET and changes.name is None:\n",
        findings=("read_unwritten", "models_differ"),
    ),
    Bug(
        name="deletions-not-counted",
        sentence="Goes on counting episodes that are deleted.",
        file="projector/views/projects.py",
        old="            return _counted(existing(document, event.project_id), ordinal, -1)\n",
        new="            return _counted(existing(document, event.project_id), ordinal, 0)\n",
        findings=("page", "models_differ"),
    ),
    Bug(
        name="mention-not-counted",
        sentence="Counts an entity's mentions wrongly: a counter that no read shows.",
        file="projector/views/entities.py",
        old='"mentions": document["mentions"] + 1,',
        new='"mentions": document["mentions"] + (1 if document["mentions"] < 3 else 2),',
        findings=("models_differ",),
    ),
)


# ---- running them ----------------------------------------------------------------------------------------------------

_CLIENTS = 12
_SETTLE_SECONDS = 8.0
_REST_SECONDS = 2.5
_READY_SECONDS = 10.0
_SLOW_SECONDS = 0.03
_LEAST_CALLS = 500
_LONGEST = 3
"""A run takes at most so many times as long as its bug says."""
_FIRST_FAULT_SECONDS = 4.0
_CALM = Bug(
    name="none",
    sentence="The service as it is.",
    file="",
    old="",
    new="",
    findings=(),
    faults=("kill-ingestor", "kill-projector", "kill-gateway", "state-deleted", "state-swapped", "term-kafka"),
    seconds=40,
)


async def run(bug: Bug, *, seed: int, seconds: float | None = None) -> Result:
    """Run the suite on the service with the bug in it."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="episodes-bug-")).resolve()
    try:
        code = folder / "code"
        for package in PACKAGES:
            shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
        if bug.file:
            plant(bug, code)
        history = History(folder / "history.ndjson")
        findings = await _run(bug, folder, code, history, seed=seed, seconds=seconds or bug.seconds)
        history.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    kinds = Counter(finding.kind for finding in findings)
    example = next((finding for finding in findings if finding.kind in bug.findings), None)
    return Result(
        name=bug.name,
        found=example is not None if bug.findings else not findings,
        kinds=dict(kinds.most_common()),
        seconds=time.monotonic() - began,
        operations=len(history.operations),
        example=str(example or next(iter(findings), "")),
    )


async def _run(bug: Bug, folder: Path, code: Path, history: History, *, seed: int, seconds: float) -> Sequence[Finding]:
    ingestors, projectors = (2 if f"stop-{kind}" in bug.faults else 1 for kind in ("ingestor", "projector"))
    layout = Layout(ingestors=ingestors, projectors=projectors, code=code, settings=bug.settings)
    async with chaos_stack(folder, layout) as stack:
        delays = [
            (proxy, proxy.add(Delay(_SLOW_SECONDS, _SLOW_SECONDS)))
            for link in bug.slow
            for proxy in stack.proxies[link]
        ]
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(run_workload(stack, history, seed=seed, clients=_CLIENTS, stop=stop))
            await _disturb(stack, bug.faults, Random(seed), history, seconds)  # noqa: S311 - no secret
            stop.set()
        for proxy, delay in delays:
            proxy.remove(delay)
        await settle(stack, history, within=_SETTLE_SECONDS)
        log, models = await asyncio.to_thread(
            read_all, stack.kafka_bootstrap, stack.mongodb_url, within=_SETTLE_SECONDS
        )
        crashes = [Finding("process", crash) for crash in stack.crashes]
    return [*check(history.operations, log, models), *crashes]


async def _disturb(stack: ChaosStack, kinds: Sequence[str], random: Random, history: History, seconds: float) -> None:
    """Inject faults for so many seconds; longer where the machine is slow, until there were enough calls."""
    began = time.monotonic()
    await asyncio.sleep(min(_FIRST_FAULT_SECONDS, seconds))  # there must be something to disturb
    number = 0
    while (passed := time.monotonic() - began) < seconds or (
        len(history.operations) < _LEAST_CALLS and passed < _LONGEST * seconds
    ):
        if kinds:
            fault = KINDS[kinds[number % len(kinds)]].make(stack, random, QUICK)
            number += 1
            await fault.inject()
            await asyncio.sleep(fault.lasts)
            await fault.heal()
            with suppress(NotReadyError):  # with a bug in it, it may never be
                for process in stack.processes.values():
                    await asyncio.to_thread(process.wait_ready, _READY_SECONDS)
        await asyncio.sleep(_REST_SECONDS)


app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Bugs, or 'none'; all of them if not given.")] = None,
    *,
    seed: Annotated[int, typer.Option(help="Of the clients and the faults.")] = 1,
    seconds: Annotated[float | None, typer.Option(help="How long each runs, instead of what it needs.")] = None,
    attempts: Annotated[int, typer.Option(help="How often one that was not found is tried, each time longer.")] = 2,
    report: Annotated[Path | None, typer.Option(help="Where to add the results, one JSON line each.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Where to write the table, for the documents.")] = None,
) -> None:
    """Run the suite on the service with each bug in it, and show by what it was found."""
    known = {bug.name: bug for bug in (*BUGS, _CALM)}
    if unknown := set(names or ()) - known.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    results: list[Result] = []
    for name in names or known:
        bug = known[name]
        result = Result(name, found=False, kinds={}, seconds=0.0, operations=0)
        for attempt in range(1, attempts + 1):
            result = uvloop.run(run(bug, seed=seed + attempt - 1, seconds=(seconds or bug.seconds) * attempt))
            said = "found" if result.found else "NOT FOUND"
            print(f"{name:<30} {said:<10} {result.seconds:5.0f} s  {result.kinds}", flush=True)  # noqa: T201 - to a person
            if result.found or not bug.findings:
                break
        results.append(result)
        if report is not None:
            with report.open("ab") as file:
                file.write(msgspec.json.encode(result) + b"\n")
    Console().print(_table(results, known))
    if markdown is not None:
        markdown.write_text(as_markdown(results))
    sys.exit(0 if all(result.found for result in results) else 1)


def as_markdown(results: Sequence[Result]) -> str:
    """The results as a table of Markdown."""
    known = {bug.name: bug for bug in (*BUGS, _CALM)}
    lines = ["| bug | what it does | what it needs to show | found by | seconds |", "|---|---|---|---|---|"]
    for result in results:
        bug = known[result.name]
        needs = ", ".join([*bug.faults, *(f"slow {link}" for link in bug.slow), *bug.settings]) or "nothing"
        by = ", ".join(f"`{kind}` {count}" for kind, count in result.kinds.items())
        if not result.found:
            by = f"**not found** {by}" if bug.findings else f"**false alarm** {by}"
        lines.append(f"| `{result.name}` | {bug.sentence} | {needs} | {by or 'nothing'} | {result.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Result], known: dict[str, Bug]) -> Table:
    table = Table("bug", "what it does", "found", "by", "seconds", "calls")
    for result in results:
        by = ", ".join(f"{kind} {count}" for kind, count in result.kinds.items())
        told = "yes" if result.found else "NO"
        if not known[result.name].findings:
            told = "nothing to find" if result.found else "FALSE ALARM"
        sentence = known[result.name].sentence
        table.add_row(result.name, sentence, told, by, f"{result.seconds:.0f}", f"{result.operations:,}")
    return table


if __name__ == "__main__":
    app()
