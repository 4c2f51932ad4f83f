"""Old versions of events, brought to the present one. Pure and chained: a step sees one event and goes one version up.

What stands in the log is never changed. A new version is a step here, a new struct in ``shared.events``, a sample, and
a log of it in ``tests/samples``.
"""

from collections.abc import Callable, Iterable, Mapping

import msgspec
from msgspec import Raw

Data = dict[str, Raw]
"""An event's data, key by key as JSON text: what a step does not touch stays as it was written, byte for byte."""
Upcaster = Callable[[Data], Data]


def _folder_gets_a_name(data: Data) -> Data:
    path = msgspec.json.decode(data["path"], type=str)
    return {**data, "name": Raw(msgspec.json.encode(path.rpartition("/")[2]))}


UPCASTERS: Mapping[str, tuple[Upcaster, ...]] = {
    "FolderCreated": (_folder_gets_a_name,),
}
"""Event → its steps: the first makes version 2 of version 1, the next 3 of 2. Without steps, it is at version 1."""


def current_version(event: str) -> int:
    """The version that is written now."""
    return 1 + len(UPCASTERS.get(event, ()))


def upcast(steps: Iterable[Upcaster], data: Raw) -> bytes:
    """The JSON text of an event's data after all ``steps``.

    Raises:
        msgspec.DecodeError: it is not what its version wrote.
    """
    raised = _decode_data(data)
    try:
        for step in steps:
            raised = step(raised)
    except KeyError as missing:
        raise msgspec.ValidationError(f"Object missing required field {missing}") from missing
    return _encode_data(raised)


_decode_data = msgspec.json.Decoder(Data).decode
_encode_data = msgspec.json.Encoder().encode
