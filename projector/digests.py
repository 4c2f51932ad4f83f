"""Documents as digests: what two sides of a comparison exchange, and the content hash of a whole collection."""

import struct
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import bson
from msgspec import Struct

from projector.views import INDEXES, Document

_SIZE = 16
_COLLECTIONS = tuple(INDEXES)
_HEAD = struct.Struct("<BI")


class Content(Struct):
    """How many documents a collection has, and the sum of their digests: the same for the same content in any order."""

    documents: int = 0
    hash: int = 0

    def add(self, digest: bytes) -> None:
        self.documents += 1
        self.hash = (self.hash + int.from_bytes(digest)) % 2 ** (8 * _SIZE)

    def merge(self, other: "Content") -> None:
        self.documents += other.documents
        self.hash = (self.hash + other.hash) % 2 ** (8 * _SIZE)


def content_hash(content: Mapping[str, Content]) -> str:
    """One hash of several collections, in hexadecimal: equal when all of them have the same documents."""
    total = blake2b(digest_size=_SIZE)
    for collection in sorted(content):
        total.update(f"{collection} {content[collection].documents} {content[collection].hash:x}\n".encode())
    return total.hexdigest()


def digest_of(document: Document) -> bytes:
    """The digest of a document as MongoDB stores it."""
    return digest(bson.encode(document))


def digest(stored: bytes) -> bytes:
    """The digest of a document's BSON."""
    return blake2b(stored, digest_size=_SIZE).digest()


def write_digest(file: BinaryIO, collection: str, key: str, of: bytes) -> None:
    """Note one document of the stored side."""
    name = key.encode()
    file.write(_HEAD.pack(_COLLECTIONS.index(collection), len(name)))
    file.write(name)
    file.write(of)


def read_digests(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Collection, key and digest of each document that was noted."""
    with path.open("rb", buffering=1024 * 1024) as file:
        while head := file.read(_HEAD.size):
            number, length = _HEAD.unpack(head)
            yield _COLLECTIONS[number], file.read(length).decode(), file.read(_SIZE)
