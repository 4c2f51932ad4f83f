"""Compares the read models with what the log says they must be, document by document.

One snapshot of MongoDB gives the documents and the checkpoints that belong to them; the log up to those checkpoints is
replayed, and each document's bytes are compared. Both sides go range by range of streams, so memory stays bounded.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
from bson import Int64
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from msgspec import Struct
from pymongo.errors import OperationFailure

from projector.digests import Content, content_hash, digest, write_digest
from projector.documents import Checkpoint, checkpoint_in
from projector.generations import Verified, note_verified
from projector.jobs import DIFFERENT, EXTRA, MISSING, Compared, compare_job, expected_job, spill_job
from projector.replay import Plan, Spilled
from projector.views import INDEXES, Document, stream_of
from projector.workers import Workers, open_workers
from shared.errors import EpisodesError
from shared.ids import StreamId
from shared.kafka import describe_topic, ends, open_partition
from shared.mongo import Client, Database, Session, generation_database, translated
from shared.read_models import CHECKPOINTS
from shared.settings import EVENTS, KafkaSettings
from shared.supervisor import gravest

EVENTS_PER_RANGE = 50_000
"""About how many events one range holds."""
_MOST_DETAILS = 1_000
_LONGEST_VALUE = 200
_TELL_SECONDS = 0.2
_SNAPSHOT_TOO_OLD = 239
_RAW: "CodecOptions[Any]" = CodecOptions(document_class=RawBSONDocument)

Report = Callable[[str, int, int], None]
"""Told the phase, how much of it is done, and how much there is."""


class Difference(Struct, frozen=True):
    """A document that is not as the log says."""

    kind: str
    """``missing``, ``extra`` or ``different``."""
    collection: str
    key: str
    stream: str | None = None
    fields: dict[str, tuple[str, str]] = {}
    """Field → what it must be, and what it is."""


class CollectionContent(Struct, frozen=True):
    """How many documents, and their content hash in hexadecimal."""

    documents: int
    hash: str


class Verdict(Struct, frozen=True):
    """What a verification came to."""

    generation: int
    events: int
    dropped: int
    """Records of the log that did not happen: written by replaced writers."""
    content: dict[str, CollectionContent]
    """Collection → what it must hold."""
    different: int
    differences: tuple[Difference, ...]
    """The first of them, in detail."""
    findings: tuple[str, ...]
    """What is wrong with the log or the checkpoints."""

    @property
    def good(self) -> bool:
        return not self.different and not self.findings


class SnapshotTooOldError(EpisodesError):
    """MongoDB no longer has the moment that is looked at."""

    def __init__(self) -> None:
        super().__init__(
            "MongoDB keeps the past for too short a time to read all documents of one moment: set its parameter "
            "minSnapshotHistoryWindowInSeconds (300 by default) to more, on every member, until this is done"
        )


async def verify(
    client: Client,
    kafka: KafkaSettings,
    generation: int,
    folder: Path,
    *,
    workers: int,
    report: Report,
    collections: Iterable[str] = tuple(INDEXES),
) -> Verdict:
    """Verify one generation, or some collections of it.

    ``folder`` is empty, and full afterwards: about the size of the log.

    Raises:
        PoisonRecord: the log holds what cannot be read or applied.
        RecordsLost: the log does not begin at its start any more.
        SnapshotTooOldError: it took longer than MongoDB keeps the past.
        Unavailable: Kafka or MongoDB does not answer.
    """
    database: Database = client[generation_database(generation)]
    looked_at = frozenset(collections)
    _, partitions = await describe_topic(kafka, EVENTS)
    with translated("opening a snapshot"):
        session = await client.start_session(snapshot=True)
    async with session:
        found = await _checkpoints(database, session)
        log_ends = await _log_ends(kafka, partitions)
        cursors = {number: found.get(number, Checkpoint()).cursor for number in range(partitions)}
        plan = make_plan({number: min(cursor.offset, log_ends[number]) for number, cursor in cursors.items()})
        await _note_stored(database, session, plan, folder, looked_at, report)
        async with open_workers(workers, slots=plan.slots) as pool:
            spilled = await spill_all(pool, kafka, plan, folder, report)
            compared = await _compare_all(pool, plan, folder, spilled, looked_at, report)
            wrong = _wrong(compared)
            expected = await _expected(pool, plan, folder, wrong[:_MOST_DETAILS])
        differences = [
            await _detail(database, session, kind, collection, key, expected.get((collection, key)))
            for _, kind, collection, key in wrong[:_MOST_DETAILS]
        ]
    content: dict[str, Content] = {collection: Content() for collection in INDEXES if collection in looked_at}
    for each in compared:
        for collection, part in each.expected.items():
            content[collection].merge(part)
    verdict = Verdict(
        generation=generation,
        events=sum(sum(each.events) for each in spilled.values()),
        dropped=sum(each.dropped for each in spilled.values()),
        content={
            collection: CollectionContent(each.documents, f"{each.hash:032x}") for collection, each in content.items()
        },
        different=sum(each.different for each in compared)
        - sum(len(each.differences) for each in compared)
        + len(wrong),
        differences=tuple(differences),
        findings=tuple(_findings(found, log_ends, spilled)),
    )
    if looked_at == INDEXES.keys():
        position = sum(each.cursor.position for each in found.values())
        total = content_hash(content) if verdict.good else None
        await note_verified(client, generation, Verified(datetime.now(UTC), position, total))
    return verdict


def make_plan(ends: Mapping[int, int], *, at_least: int = 1) -> Plan:
    """A replay up to these offsets, in as many ranges as its memory wants and at least so many."""
    return Plan(dict(ends), max(at_least, sum(ends.values()) // EVENTS_PER_RANGE))


async def spill_all(
    pool: Workers, kafka: KafkaSettings, plan: Plan, folder: Path, report: Report
) -> dict[int, Spilled]:
    """Spill all partitions of the plan, those with the most to read first."""
    order = sorted(plan.ends, key=lambda number: -plan.ends[number])
    jobs = [(kafka, plan, partition, folder, slot) for slot, partition in enumerate(order)]

    def tell() -> None:
        for partition, done in zip(order, pool.done(range(len(order))), strict=True):
            report(f"reading partition {partition}", done, plan.ends[partition])

    async with watching(tell):
        return dict([each async for each in pool.run(spill_job, jobs)])


def report_folded(
    what: str,
    pool: Workers,
    plan: Plan,
    spilled: Mapping[int, Spilled],
    report: Report,
    before: Iterable[int] = (),
) -> None:
    """Tell of each partition how many of its events are folded. Those of the ranges ``before`` were earlier."""
    done = [pool.done(range(plan.slots_of(number), plan.slots_of(number + 1))) for number in range(plan.ranges)]
    for place, (partition, each) in enumerate(sorted(spilled.items())):
        earlier = sum(each.events[number] for number in before)
        report(f"{what} partition {partition}", earlier + sum(part[place] for part in done), sum(each.events))


@asynccontextmanager
async def watching(tell: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``tell`` some times a second, and once more at the end."""

    async def keep_telling() -> None:
        while True:
            tell()
            await asyncio.sleep(_TELL_SECONDS)

    try:
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(keep_telling())
            yield
            telling.cancel()
            tell()
    except ExceptionGroup as group:
        raise gravest(group) from group


async def _checkpoints(database: Database, session: Session) -> dict[int, Checkpoint]:
    with _reading("the checkpoints"):
        return {found["_id"]: checkpoint_in(found) async for found in database[CHECKPOINTS].find(session=session)}


async def _log_ends(kafka: KafkaSettings, partitions: int) -> dict[int, int]:
    async with open_partition(kafka, EVENTS, 0) as consumer:
        return await ends(consumer, EVENTS, range(partitions))


async def _note_stored(
    database: Database, session: Session, plan: Plan, folder: Path, collections: frozenset[str], report: Report
) -> None:
    """Digest every stored document of the snapshot into the file of its range."""
    with translated("counting the documents"):
        total = sum([await database[collection].estimated_document_count() for collection in collections])
    done = 0
    with ExitStack() as opened, _reading("the documents"):
        files = [
            opened.enter_context(_stored_file(folder, number).open("wb", buffering=256 * 1024))
            for number in range(plan.ranges)
        ]
        for collection in collections:
            cursor = database.get_collection(collection, codec_options=_RAW).find(session=session, batch_size=2_000)
            async for document in cursor:
                number = plan.range_of(StreamId(stream_of(collection, document)))
                write_digest(files[number], collection, _key(document["_id"]), digest(document.raw))
                done += 1
                if done % 1_000 == 0:
                    report("reading the documents", done, max(done, total))
                    await asyncio.sleep(0)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        with translated(f"reading {what}"):
            yield
    except OperationFailure as error:
        if error.code != _SNAPSHOT_TOO_OLD:
            raise
        raise SnapshotTooOldError from error


def _key(identity: object) -> str:
    """The ``_id`` as text. One that is no text is not ours, and must not look like one that is."""
    return identity if isinstance(identity, str) else repr(identity)


def _stored_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.stored"


async def _compare_all(
    pool: Workers,
    plan: Plan,
    folder: Path,
    spilled: Mapping[int, Spilled],
    collections: frozenset[str],
    report: Report,
) -> list[Compared]:
    jobs = [
        (plan, number, folder, _stored_file(folder, number), collections, plan.slots_of(number))
        for number in range(plan.ranges)
    ]
    async with watching(lambda: report_folded("comparing", pool, plan, spilled, report)):
        compared = [each async for each in pool.run(compare_job, jobs)]
    return sorted(compared, key=lambda each: each.number)


def _wrong(compared: Sequence[Compared]) -> list[tuple[int, str, str, str]]:
    """Range, kind, collection and key of each difference.

    A document whose owner was altered is missing in one range and extra in another: that is one difference.
    """
    found = {(kind, collection, key): each.number for each in compared for kind, collection, key in each.differences}
    wrong = []
    for (kind, collection, key), number in found.items():
        if kind == EXTRA and (MISSING, collection, key) in found:
            continue
        moved = kind == MISSING and (EXTRA, collection, key) in found
        wrong.append((number, DIFFERENT if moved else kind, collection, key))
    return wrong


async def _expected(
    pool: Workers, plan: Plan, folder: Path, wrong: Sequence[tuple[int, str, str, str]]
) -> dict[tuple[str, str], Document]:
    """What the documents to be shown in detail must be."""
    keys = {
        number: frozenset((collection, key) for at, _, collection, key in wrong if at == number)
        for number in {each[0] for each in wrong}
    }
    jobs = [(plan, number, folder, wanted, plan.slots_of(number)) for number, wanted in keys.items()]
    found: dict[tuple[str, str], Document] = {}
    async for each in pool.run(expected_job, jobs):
        found |= each
    return found


async def _detail(
    database: Database, session: Session, kind: str, collection: str, key: str, expected: Document | None
) -> Difference:
    try:
        with _reading("a document"):
            stored = await database[collection].find_one({"_id": key}, session=session)
    except SnapshotTooOldError:
        return Difference(kind, collection, key, stream_of(collection, expected) if expected else None)
    known = expected or stored or {}
    return Difference(
        kind,
        collection,
        key,
        stream_of(collection, known) if known else None,
        _fields(expected, stored) if kind == DIFFERENT and expected is not None and stored is not None else {},
    )


def _fields(expected: Document, stored: Document) -> dict[str, tuple[str, str]]:
    """What differs. Numbers of different types do: what is stored is compared, not what it means."""
    fields = {
        field: (_shown(expected, field), _shown(stored, field))
        for field in {**expected, **stored}
        if _stored_as(expected, field) != _stored_as(stored, field)
    }
    return fields or {"order of the fields": (", ".join(expected), ", ".join(stored))}


def _stored_as(document: Document, field: str) -> bytes:
    return bson.encode({field: document[field]} if field in document else {})


def _shown(document: Document, field: str) -> str:
    if field not in document:
        return "absent"
    text = repr(document[field])
    if isinstance(document[field], Int64):
        text = f"Int64({text})"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}… ({len(text)} characters)"


def _findings(
    checkpoints: Mapping[int, Checkpoint], log_ends: Mapping[int, int], spilled: Mapping[int, Spilled]
) -> Iterator[str]:
    for partition, each in sorted(spilled.items()):
        where = f"partition {partition}"
        yield from (f"{where}: {finding}" for finding in each.findings)
        checkpoint = checkpoints.get(partition, Checkpoint())
        if checkpoint.cursor.offset > log_ends[partition]:
            yield (
                f"{where}: the checkpoint is at offset {checkpoint.cursor.offset}, and the log ends at "
                f"{log_ends[partition]}: the log lost records, or is another one"
            )
        elif checkpoint.cursor != each.cursor:
            yield (
                f"{where}: the checkpoint says position {checkpoint.cursor.position} under fence "
                f"{checkpoint.cursor.fence}, and the log has position {each.cursor.position} under fence "
                f"{each.cursor.fence} at offset {checkpoint.cursor.offset}"
            )
        if checkpoint.stopped is not None:
            yield f"{where}: stopped at offset {checkpoint.stopped.offset}: {checkpoint.stopped.reason}"
