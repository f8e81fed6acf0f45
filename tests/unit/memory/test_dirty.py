"""The dirty bitmap against a set of page numbers, and under threads."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.memory.dirty import DirtyBitmap
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region

PAGES = 300
ranges = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda p: (min(p), max(p)))


def pages_of(bits: bytes) -> set[int]:
    return {i for i in range(len(bits) * 8) if bits[i >> 3] >> (i & 7) & 1}


@given(st.lists(st.one_of(ranges, st.just("harvest"), st.just("give back")), max_size=30))
def test_it_is_a_set_of_pages(steps: list[tuple[int, int] | str]) -> None:
    bitmap, model, last = DirtyBitmap(PAGES), set[int](), bytes((PAGES + 63) // 64 * 8)
    for step in steps:
        if step == "harvest":
            last = bitmap.harvest()
            assert pages_of(last) == model
            model.clear()
        elif step == "give back":
            bitmap.merge(last)
            model |= pages_of(last)
        else:
            bitmap.mark(*step)  # type: ignore[misc]
            model |= set(range(*step))  # type: ignore[misc]
    assert {p for p in range(PAGES) if bitmap.test(p)} == model


@pytest.mark.parametrize(("first", "end"), [(-1, 1), (0, PAGES + 1), (5, 4)])
def test_what_is_outside_is_refused(first: int, end: int) -> None:
    bitmap = DirtyBitmap(PAGES)
    with pytest.raises(IndexError):
        bitmap.mark(first, end)
    with pytest.raises(IndexError):
        bitmap.test(PAGES)
    with pytest.raises(ValueError, match="merged"):
        bitmap.merge(b"\0" * 8)


@pytest.mark.usefixtures("prompt_switches")
def test_no_mark_is_lost_between_marking_and_harvesting_threads() -> None:
    """Each page is marked once only, its word's others by other threads: a mark that is lost does not come again."""
    pages, threads = 2048, 8
    for _ in range(50):
        bitmap = DirtyBitmap(pages)
        seen: list[int] = []
        done = threading.Event()

        def harvest(bitmap: DirtyBitmap = bitmap, seen: list[int] = seen, done: threading.Event = done) -> None:
            while not done.is_set():
                seen.extend(pages_of(bitmap.harvest()))

        def mark(first: int, bitmap: DirtyBitmap = bitmap) -> None:
            for page in range(first, pages, threads):
                bitmap.mark(page, page + 1)

        harvester = threading.Thread(target=harvest)
        markers = [threading.Thread(target=mark, args=(first,)) for first in range(threads)]
        for thread in (harvester, *markers):
            thread.start()
        for marker in markers:
            marker.join(10)
        done.set()
        harvester.join(10)
        seen.extend(pages_of(bitmap.harvest()))
        assert sorted(seen) == list(range(pages))


def test_every_write_to_guest_memory_marks_its_pages() -> None:
    region = Region(0, 16 * PAGE_SIZE)
    memory = GuestMemory([region])
    memory.write(PAGE_SIZE * 3 - 1, b"ab")
    memory.write_uint(PAGE_SIZE * 9, 4, 1)
    assert pages_of(region.dirty.harvest()) == {2, 3, 9}
    memory.read(0, 16 * PAGE_SIZE)
    assert pages_of(region.dirty.harvest()) == set()
    memory.close()
