"""Which slice of a project's list a page is, from the counts of living episodes per block of ordinals."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gateway.problems import invalid
from shared.read_models import BLOCK

DEFAULT_SIZE = 50
MAX_SIZE = 200


class Page(NamedTuple):
    """What the caller asks for. ``number`` is 1-based."""

    number: int = 1
    size: int = DEFAULT_SIZE

    def of(self, total: int) -> int:
        """How many pages there are."""
        return -(-total // self.size)


class Slice(NamedTuple):
    """Living episodes with an ordinal above ``after``, in order: leave out ``skip``, take ``limit``."""

    after: int
    skip: int
    limit: int


def parse_page(number: str | None, size: str | None) -> Page:
    """The page of the query parameters ``page`` and ``pageSize``.

    Raises:
        Problem: 400, one is no number or below 1.
    """
    return Page(_whole("page", number, 1), min(_whole("pageSize", size, DEFAULT_SIZE), MAX_SIZE))


def locate(page: Page, total: int, blocks: Sequence[int]) -> Slice | None:
    """Where the page lies, or `None` if it is past the end. Never skips a whole block."""
    skip = first = (page.number - 1) * page.size
    if first >= total:
        return None
    for index, living in enumerate(blocks):
        if skip < living:
            return Slice(index * BLOCK, skip, min(page.size, total - first))
        skip -= living
    return None


def _whole(parameter: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise invalid(f"Query parameter '{parameter}' must be a whole number from 1")
    return int(text)
