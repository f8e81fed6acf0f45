"""Placement and the memory map."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.e820 import RAM, memory_map
from pyvmm.arch.x86.boot.entry import EntryMode
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ConfigError, ImageError
from pyvmm.memory.guest_memory import GuestMemory, Region

MIB = 1 << 20


@pytest.fixture(scope="module")
def two_regions() -> Iterator[GuestMemory]:
    ram = GuestMemory([Region(0, 4 * MIB), Region(6 * MIB, 2 * MIB), Region(1 << 32, 2 * MIB)])
    yield ram
    ram.close()


claims = st.lists(st.tuples(st.integers(256, 2047), st.integers(1, 300)), max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(claims=claims, size=st.integers(1, 3 * MIB), limit=st.integers(0, 9 * MIB) | st.just(1 << 40))
def test_highest_free_is_free_and_none_is_higher(
    two_regions: GuestMemory, claims: list[tuple[int, int]], size: int, limit: int
) -> None:
    placement = Placement(two_regions, "image", EntryMode.LONG)
    taken = set(range(256)) | set(range(1024, 1536))  # low memory and the gap, in pages
    for page, count in claims:
        if taken.isdisjoint(range(page, page + count)) and page + count <= 2048:
            placement.claim(page * 4096, count * 4096, "claim", "test")
            taken |= set(range(page, page + count))
    pages = -(-size // 4096)
    top = min(limit // 4096, 2048)
    expected = next(
        (start for start in range(top - pages, 255, -1) if taken.isdisjoint(range(start, start + pages))), None
    )
    found = placement.highest_free(size, limit)
    assert found == (None if expected is None else expected * 4096)


def test_claims(two_regions: GuestMemory) -> None:
    placement = Placement(two_regions, "image", EntryMode.PROTECTED)
    placement.claim(MIB, 4096, "one", "field")
    placement.claim(MIB + 4096, 1, "adjacent", "field")
    placement.claim(MIB, 0, "nothing", "field")
    for start, size in ((MIB + 4095, 1), (MIB - 1, 2), (0, 1 << 40), (4 * MIB - 1, 2), (5 * MIB, 1), (1 << 63, 1)):
        with pytest.raises(ImageError, match=r"image: field: two at .* (overlaps|is outside)"):
            placement.claim(start, size, "two", "field")
    assert placement.ram_size == 6 * MIB


def test_page_tables_are_only_kept_free_where_there_are_any(two_regions: GuestMemory) -> None:
    Placement(two_regions, "i", EntryMode.PROTECTED).claim(layout.BOOT_PAGE_TABLES, 1, "x", "f")
    with pytest.raises(ImageError, match="boot page tables"):
        Placement(two_regions, "i", EntryMode.LONG).claim(layout.BOOT_PAGE_TABLES, 1, "x", "f")
    Placement(two_regions, "i", EntryMode.REAL).claim(layout.BOOT_INFO, 0x10000, "x", "f")


def test_low_memory_must_be_there() -> None:
    for regions in ([Region(MIB, MIB)], [Region(0, 512 << 10)]):
        memory = GuestMemory(regions)
        with pytest.raises(ConfigError, match="--memory"):
            Placement(memory, "image", EntryMode.REAL)
        memory.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 64)), max_size=4))
def test_memory_map_lists_all_ram_once_and_in_order(parts: list[tuple[int, int]]) -> None:
    regions, at = [Region(0, MIB)], MIB
    for gap, size in parts:
        regions.append(Region(at + gap * 4096, size * 4096))
        at = regions[-1].end
    memory = GuestMemory(regions)
    try:
        entries = memory_map(memory)
        assert all(a.end <= b.start for a, b in itertools.pairwise(entries))
        assert not any(a.end == b.start and a.type == b.type for a, b in itertools.pairwise(entries))
        ram = sum(e.size for e in entries if e.type == RAM)
        assert ram == memory.size - (MIB - layout.EBDA)
        assert all(memory.contains(e.start, e.size) for e in entries)
    finally:
        memory.close()
