"""Bytes ↔ messages. The only module that raises `PoisonRecord`.

The log's records are CloudEvents 1.0 in structured JSON. Our extension attributes are ``streamid eventid position
writer commandid commandoffset actor``; on the last event of a command also ``completes``, ``answer`` if the events do
not say it all, and ``idempotencykey requesthash`` if the caller gave a key. JSON numbers may exceed CloudEvents' 32-bit
Integer.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, assert_never
from urllib.parse import quote

import msgspec
from msgspec import Raw, Struct

from shared.commands import Command
from shared.errors import PoisonRecord
from shared.events import (
    CommandsRefused,
    CommandType,
    Event,
    FolderCreated,
    LoggedEvent,
    LoggedFence,
    LoggedNote,
    LogRecord,
    NamespaceCreated,
    ProjectCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    ProjectEpisodeRevised,
    TenantEpisodeRecorded,
    WriterFenced,
)
from shared.ids import CommandId, EventId, Position, StreamId
from shared.receipts import Receipt
from shared.upcasters import UPCASTERS, Upcaster, current_version, upcast

_EVENT_CLASSES: tuple[type[Event], ...] = (
    NamespaceCreated,
    ProjectCreated,
    FolderCreated,
    ProjectEpisodeCreated,
    ProjectEpisodeRevised,
    ProjectEpisodeDeleted,
    ProjectEpisodeRestored,
    TenantEpisodeRecorded,
)
_TYPE_OF: dict[type, str] = {
    cls: f"episodes.{cls.__name__}.v{current_version(cls.__name__)}"
    for cls in (*_EVENT_CLASSES, WriterFenced, CommandsRefused)
}
"""The version that is written now. Reading knows every version ever written, see `_DECODERS`."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _CloudEvent(Struct, kw_only=True, omit_defaults=True):
    specversion: str
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: str = ""
    subject: str | None = None
    streamid: StreamId | None = None
    eventid: EventId | None = None
    position: Position | None = None
    writer: int | None = None
    commandid: CommandId | None = None
    commandoffset: int | None = None
    actor: str | None = None
    completes: CommandType | None = None
    idempotencykey: str | None = None
    requesthash: str | None = None
    answer: str | None = None
    data: Any


class _ReadCloudEvent(_CloudEvent, kw_only=True):
    data: Raw


_decode_command: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_decode_receipt = msgspec.json.Decoder(Receipt)
_decode_cloud_event = msgspec.json.Decoder(_ReadCloudEvent)
_encode = msgspec.json.Encoder().encode


def _upcasting(steps: tuple[Upcaster, ...], decode: Callable[[Any], Any]) -> Callable[[Raw], Any]:
    return lambda data: decode(upcast(steps, data))


def _decoders() -> dict[str, Callable[[Raw], Any]]:
    decoders: dict[str, Callable[[Raw], Any]] = {}
    for cls, present in _TYPE_OF.items():
        decoders[present] = msgspec.json.Decoder(cls).decode
        steps = UPCASTERS.get(cls.__name__, ())
        for version in range(1, len(steps) + 1):
            decoders[f"episodes.{cls.__name__}.v{version}"] = _upcasting(steps[version - 1 :], decoders[present])
    return decoders


_DECODERS = _decoders()
"""Type → from the JSON text of ``data`` to the struct. The present versions are decoded straight away."""


def encode_command(command: Command) -> bytes:
    return _encode(command)


def decode_command(value: bytes | None) -> Command:
    """The command in a record's value.

    Raises:
        PoisonRecord: it is no command of ours.
    """
    try:
        return _decode_command.decode(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PoisonRecord(f"not a command: {error}") from error


def encode_receipt(receipt: Receipt) -> bytes:
    return _encode(receipt)


def decode_receipt(value: bytes | None) -> Receipt:
    """The receipt in a reply's value.

    Raises:
        PoisonRecord: it is no receipt of ours.
    """
    try:
        return _decode_receipt.decode(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PoisonRecord(f"not a receipt: {error}") from error


@lru_cache(4096)
def _source(stream: StreamId) -> str:
    return f"/streams/{quote(stream, safe=':')}"


def encode_record(record: LogRecord, *, at: datetime = _EPOCH) -> bytes:
    """The record's value in the events topic. ``at`` is the time of a fence, which has none of its own."""
    match record:
        case LoggedEvent():
            return _encode(
                _CloudEvent(
                    specversion="1.0",
                    id=str(record.event_id),
                    source=_source(record.stream),
                    type=_TYPE_OF[type(record.event)],
                    time=record.at,
                    datacontenttype="application/json",
                    subject=record.event.id,
                    streamid=record.stream,
                    eventid=record.event_id,
                    position=record.position,
                    writer=record.writer,
                    commandid=record.command_id,
                    commandoffset=record.command_offset,
                    actor=record.actor,
                    completes=record.completes,
                    idempotencykey=record.idempotency_key,
                    requesthash=record.request_hash,
                    answer=record.answer,
                    data=record.event,
                )
            )
        case LoggedNote():
            return _encode(
                _CloudEvent(
                    specversion="1.0",
                    id=f"{record.writer}/{record.position}",
                    source="/notes",
                    type=_TYPE_OF[CommandsRefused],
                    time=record.at,
                    datacontenttype="application/json",
                    position=record.position,
                    writer=record.writer,
                    commandoffset=record.command_offset,
                    data=record.note,
                )
            )
        case LoggedFence():
            return _encode(
                _CloudEvent(
                    specversion="1.0",
                    id=record.fence.nonce,
                    source="/fences",
                    type=_TYPE_OF[WriterFenced],
                    time=at,
                    datacontenttype="application/json",
                    data=record.fence,
                )
            )
        case _:
            assert_never(record)


def relocate_event(value: bytes, *, position: Position, writer: int, command_offset: int) -> bytes:
    """The event in ``value`` at a place in another log. All else stays as it was written, its version too.

    Raises:
        msgspec.DecodeError: it is no CloudEvent of ours; `decode_record` says more.
    """
    head = _decode_cloud_event.decode(value)
    head.position, head.writer, head.commandoffset = position, writer, command_offset
    return _encode(head)


def decode_record(value: bytes | None) -> LogRecord:
    """The record of the events topic in ``value``.

    Raises:
        PoisonRecord: it is no CloudEvent of ours, lacks what its type needs, or is of a type that is unknown here.
    """
    try:
        head = _decode_cloud_event.decode(value or b"")
        decode_data = _DECODERS.get(head.type)
        if decode_data is None:
            raise PoisonRecord(
                f"unknown event type {head.type!r}, perhaps of a newer version: "
                "upgrade the projector first, then the ingestor"
            )
        data = decode_data(head.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PoisonRecord(f"not a record of this log: {error}") from error
    if isinstance(data, WriterFenced):
        return LoggedFence(data)
    if head.position is None or head.writer is None:
        raise PoisonRecord(f"{head.type} without position or writer")
    if isinstance(data, CommandsRefused):
        return LoggedNote(position=head.position, writer=head.writer, at=head.time, note=data)
    if (
        head.streamid is None
        or head.eventid is None
        or head.commandid is None
        or head.commandoffset is None
        or head.actor is None
    ):
        raise PoisonRecord(f"{head.type} without one of streamid, eventid, commandid, commandoffset, actor")
    return LoggedEvent(
        stream=head.streamid,
        event_id=head.eventid,
        position=head.position,
        writer=head.writer,
        command_id=head.commandid,
        command_offset=head.commandoffset,
        actor=head.actor,
        at=head.time,
        event=data,
        completes=head.completes,
        idempotency_key=head.idempotencykey,
        request_hash=head.requesthash,
        answer=head.answer,
    )
