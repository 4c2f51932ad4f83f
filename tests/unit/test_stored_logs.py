"""Every version's log, replayed by this one: what was once written comes to the same state and documents for ever."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ingestor.domain.state import Key, Value
from ingestor.recovery import Recovery
from ingestor.state import Checkpoint
from projector.views import Documents, no_documents, project
from shared.log import Commit, Cursor, LogReader
from tests.fakes import InMemoryStateStore
from tests.written_log import written_log

LOGS = Path(__file__).parents[1] / "samples" / "logs"

FROZEN = {
    "0001-every-type-at-v1": ("281a7c51be03c91e", "78ad98338d1029e4"),
    "0002-folders-with-a-name": ("281a7c51be03c91e", "78ad98338d1029e4"),
    "0003-ids-that-begin-with-their-second": ("2a5173e3bc6c8ba8", "6129ac762c4d9197"),
}
"""Log → hash of the ingestor's state, hash of the projector's documents.

Another hash means that upgraded processes and those that were always there would not agree. Where that is the purpose,
a change of the stored state needs another `ingestor.state.FORMAT`, one of the documents a rebuild; say so in the
changelog.
"""


def test_the_newest_log_is_what_this_version_writes() -> None:
    newest = max(LOGS.iterdir())
    assert newest.read_bytes().splitlines() == written_log().values, "keep the new log too: see tests/written_log.py"


def test_every_stored_log_has_its_hashes() -> None:
    assert {path.stem for path in LOGS.iterdir()} == FROZEN.keys()


@pytest.mark.parametrize("log", FROZEN)
def test_a_log_comes_to_the_same_for_ever(log: str) -> None:
    commits = the_commits(log)
    assert (state_hash(recovered(commits).values), documents_hash(projected(commits))) == FROZEN[log]


def test_a_replay_of_the_newest_log_knows_what_its_writer_knew() -> None:
    written = written_log()
    replayed = recovered(the_commits(max(FROZEN)))
    assert replayed.values == written.store.values
    known = written.store.checkpoint()
    assert known is not None
    assert replayed.checkpoint() == known


def the_commits(log: str) -> list[Commit]:
    values = (LOGS / f"{log}.ndjson").read_bytes().splitlines()
    reader = LogReader(Cursor())
    read = [reader.read(offset, value) for offset, value in enumerate(values)]
    assert reader.fenced_events, "a log without records that did not happen shows too little"
    return [commit for commit in read if commit is not None]


def recovered(commits: list[Commit]) -> InMemoryStateStore:
    store = InMemoryStateStore()
    recovery = Recovery(store, Checkpoint(Cursor(), "", -1))
    for commit in commits:
        recovery.take(commit)
    recovery.flush()
    return store


def projected(commits: list[Commit]) -> Documents:
    documents = no_documents()
    for commit in commits:
        for logged in commit.events:
            project(documents, logged)
    return documents


def state_hash(values: dict[Key, Value]) -> str:
    return _hash(sorted(values.items()))


def documents_hash(documents: Documents) -> str:
    return _hash({name: dict(sorted(there.items())) for name, there in documents.items()})


def _hash(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:16]
