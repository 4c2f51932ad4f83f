"""Identifiers: what they are made of, and that the same command always makes the same ones."""

from functools import lru_cache
from hashlib import blake2b
from typing import NewType

import uuid_utils

StreamId = NewType("StreamId", str)
"""Unit of order and numbering: ``namespace:<slug>`` or ``tenant:<tenant_id>``. The Kafka key of its records."""
CommandId = NewType("CommandId", str)
"""UUIDv7 that the gateway gives to one HTTP write."""
EventId = NewType("EventId", int)
"""1, 2, 3 … per stream."""
Position = NewType("Position", int)
"""1, 2, 3 … per partition of the events topic. Not the Kafka offset."""


def namespace_stream(slug: str) -> StreamId:
    return StreamId(f"namespace:{slug}")


def tenant_stream(tenant_id: str) -> StreamId:
    return StreamId(f"tenant:{tenant_id}")


def new_command_id() -> CommandId:
    return CommandId(str(uuid_utils.uuid7()))


def derived_id(command_id: CommandId, index: int) -> str:
    """24 lower-case hex digits for what the command's event number ``index`` (0-based) brings into being.

    The first 8 are the second of the command, as in MongoDB's ObjectIds: what is made together stands together in the
    database's index (docs/adr/0021). The other 16 come from the 74 random bits of the command's UUIDv7: unguessable.
    """
    return _second(command_id) + _digest(f"{command_id}/{index}")[:16]


def episode_id(command_id: CommandId, index: int) -> str:
    """``ep_`` + 24 hex digits."""
    return f"ep_{derived_id(command_id, index)}"


@lru_cache(256)
def _second(command_id: CommandId) -> str:
    """Seconds since 1970 as 8 hex digits: a UUIDv7 begins with its milliseconds. Of another id its digest."""
    try:
        milliseconds = int(command_id[:8] + command_id[9:13], 16)
    except ValueError:
        return _digest(command_id)[:8]
    return f"{milliseconds // 1000 & 0xFFFFFFFF:08x}"


def entity_id(tenant_id: str, entity_type: str, name: str) -> str:
    """``ent_`` + 24 hex digits, the same for the same type and normalised name within a tenant."""
    normalised = " ".join(name.casefold().split())
    return "ent_" + _digest(f"{tenant_id}\x00{entity_type}\x00{normalised}")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()
