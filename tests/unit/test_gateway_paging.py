"""Which slice of the list a page is."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.paging import Page, Slice, locate, parse_page
from gateway.problems import Problem
from shared.read_models import BLOCK


def test_pages_have_defaults_and_a_largest_size() -> None:
    assert parse_page(None, None) == Page(1, 50)
    assert parse_page("7", "200") == Page(7, 200)
    assert parse_page("007", "201") == parse_page("7", "999999999999999999") == Page(7, 200)


@pytest.mark.parametrize("text", ["0", "-1", "", "x", "1.5", "+1", " 1", "1_0", "\u0661", "9" * 19, "NaN"])
def test_what_is_no_page_is_400(text: str) -> None:
    with pytest.raises(Problem, match="'page' must be a whole number from 1"):
        parse_page(text, None)
    with pytest.raises(Problem, match="'pageSize' must be a whole number from 1"):
        parse_page(None, text)


@pytest.mark.parametrize(("total", "size", "pages"), [(0, 50, 0), (1, 50, 1), (50, 50, 1), (51, 50, 2), (3, 1, 3)])
def test_the_number_of_pages(total: int, size: int, pages: int) -> None:
    assert Page(1, size).of(total) == pages


def test_pages_past_the_end_are_nowhere() -> None:
    assert locate(Page(1, 50), 0, []) is None
    assert locate(Page(2, 50), 50, [50]) is None
    assert locate(Page(10**18, 200), 50, [50]) is None


def test_blocks_are_passed_over() -> None:
    assert locate(Page(1, 50), 2_000, [1_000, 0, 1_000]) == Slice(0, 0, 50)
    assert locate(Page(21, 50), 2_000, [1_000, 0, 1_000]) == Slice(2 * BLOCK, 0, 50)
    assert locate(Page(4, 50), 155, [155]) == Slice(0, 150, 5)


@given(st.sets(st.integers(1, 5 * BLOCK), max_size=300), st.integers(1, 200))
def test_the_pages_together_are_the_list(ordinals: set[int], size: int) -> None:
    living = sorted(ordinals)
    blocks = [0] * 5
    for ordinal in living:
        blocks[(ordinal - 1) // BLOCK] += 1
    seen: list[int] = []
    for number in range(1, Page(1, size).of(len(living)) + 1):
        where = locate(Page(number, size), len(living), blocks)
        assert where is not None
        assert where.skip < BLOCK
        seen += [ordinal for ordinal in living if ordinal > where.after][where.skip : where.skip + where.limit]
    assert seen == living
    assert all(first < second for first, second in pairwise(seen))
