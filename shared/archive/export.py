"""The log in Kafka → an archive: every record that happened up to the moment of asking, by the reader's rule."""

from collections.abc import Callable
from pathlib import Path

from aiokafka import AIOKafkaConsumer
from msgspec.structs import replace

from shared.archive.files import (
    ArchiveRefused,
    FileEntry,
    FileWriter,
    Manifest,
    Mark,
    Source,
    make_folder,
    write_manifest,
)
from shared.codec import decode_receipt, encode_record
from shared.errors import PoisonRecord
from shared.events import IMPORT_UNFINISHED, CommandsRefused, LoggedNote, NotedCommand
from shared.ids import StreamId
from shared.kafka import describe_topic, ends, open_partition, partition_of, read_to
from shared.log import Commit, Cursor, LogReader
from shared.settings import EVENTS, KafkaSettings

Report = Callable[[str, int, int], None]
"""Told of progress: what is worked on, how much of it is done, and how much there is."""


async def export_log(kafka: KafkaSettings, folder: Path, stream: StreamId | None, report: Report) -> Manifest:
    """Write an archive of all streams, or of one, into a new or empty folder.

    Raises:
        ArchiveRefused: the folder is not empty, the log is half of an import, or has no such stream.
        PoisonRecord: the log holds what this version cannot read.
        Unavailable: Kafka does not answer.
    """
    make_folder(folder)
    cluster, partitions = await describe_topic(kafka, EVENTS)
    source = Source(cluster=cluster, topic=EVENTS, partitions=partitions, stream=stream)
    chosen = range(partitions) if stream is None else [partition_of(stream.encode(), partitions)]
    files: list[FileEntry] = []
    for partition in chosen:
        async with open_partition(kafka, EVENTS, partition) as consumer:
            writer = FileWriter(folder, source, partition)
            try:
                files.append(await _export_partition(consumer, writer, partition, stream, report))
            finally:
                writer.abandon()
    if stream is not None and not any(entry.records for entry in files):
        raise ArchiveRefused(f"the log has nothing of the stream {stream!r}")
    return write_manifest(folder, source, files)


async def _export_partition(
    consumer: AIOKafkaConsumer, writer: FileWriter, partition: int, stream: StreamId | None, report: Report
) -> FileEntry:
    end = (await ends(consumer, EVENTS, [partition]))[partition]
    reader = LogReader(Cursor())
    what, pending, last_command = f"{EVENTS}/{partition}", list[tuple[int, bytes]](), None
    report(what, 0, end)
    async for records in read_to(consumer, EVENTS, partition, 0, end):
        for record in records:
            dropped = reader.fenced_events
            try:
                commit = reader.read(record.offset, record.value)
            except PoisonRecord as error:
                raise PoisonRecord(f"{what} offset {record.offset}: {error}") from error
            if reader.fenced_events == dropped:
                pending.append((record.offset, record.value))
            if commit is not None:
                _write(writer, commit, pending, stream)
                pending.clear()
                if commit.command_offset is not None:
                    last_command = commit.command_offset
        report(what, records[-1].offset + 1, end)
    if last_command == IMPORT_UNFINISHED:
        raise ArchiveRefused(f"{what} holds an import that was not finished: there is only half a log to export")
    if pending:
        raise PoisonRecord(f"{what} offset {pending[0][0]}: the command that begins here is not complete")
    return writer.close(end)


def _write(writer: FileWriter, commit: Commit, pending: list[tuple[int, bytes]], stream: StreamId | None) -> None:
    for logged, (offset, value) in zip(commit.events, pending, strict=False):
        if stream in {None, logged.stream}:
            writer.write(value, Mark(offset, logged.position, logged.at), event=True)
    if commit.note is not None and (kept := kept_answers(commit.note, stream)):
        [(offset, _)] = pending
        note = replace(commit.note, note=CommandsRefused(commit.note.command_offset, kept))
        writer.write(encode_record(note), Mark(offset, note.position, note.at), event=False)


def kept_answers(note: LoggedNote, stream: StreamId | None) -> tuple[NotedCommand, ...]:
    """What of a note a retry may need: the commands with a kept answer, of one stream or of all."""
    return tuple(noted for noted in note.note.refusals if noted.kept is not None and stream in {None, stream_of(noted)})


def stream_of(noted: NotedCommand) -> StreamId | None:
    """The stream of a noted command; only its kept answer tells."""
    return None if noted.kept is None else decode_receipt(bytes(noted.kept.receipt)).stream
