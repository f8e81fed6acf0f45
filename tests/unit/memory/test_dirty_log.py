"""The native half of dirty tracking that needs no KVM: counting pages and finding runs of them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.native import ffi, lib

PAGES = st.integers(1, 700)


def runs_of(pages: int, chosen: set[int], at_once: int) -> list[tuple[int, int]]:
    bits = ffi.new("uint64_t[]", (pages + 63) // 64)
    for page in chosen:
        lib.pv_dirty_mark(bits, page, page + 1)
    assert lib.pv_dirty_count(bits, len(bits)) == len(chosen)
    ranges = ffi.new("struct pv_page_range[]", at_once)
    found: list[tuple[int, int]] = []
    while True:
        start = sum(found[-1]) if found else 0
        count = lib.pv_dirty_ranges(bits, pages, start, ranges, at_once)
        found += [(ranges[i].first, ranges[i].count) for i in range(count)]
        if count < at_once:
            return found


@given(st.data(), PAGES, st.integers(1, 5))
def test_runs_are_the_set_bits_as_long_as_they_can_be(data: st.DataObject, pages: int, at_once: int) -> None:
    chosen = data.draw(st.sets(st.integers(0, pages - 1)))
    if data.draw(st.booleans()):
        chosen = set(range(pages)) - chosen
    found = runs_of(pages, chosen, at_once)
    assert {page for first, count in found for page in range(first, first + count)} == chosen
    assert all(first + count < following for (first, count), (following, _) in itertools.pairwise(found))


def test_bits_behind_the_last_page_are_nobodys() -> None:
    bits = ffi.new("uint64_t[]", [(1 << 64) - 1])
    ranges = ffi.new("struct pv_page_range[]", 4)
    assert lib.pv_dirty_ranges(bits, 10, 0, ranges, 4) == 1
    assert (ranges[0].first, ranges[0].count) == (0, 10)
