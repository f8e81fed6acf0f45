"""The secondary's memory against a model: its own writes are undone, the checkpoint is there, nothing else is."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.colo.replica_memory import ReplicaMemory
from pyvmm.errors import ChannelError, StateError
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region, join_runs
from pyvmm.native import ffi, lib

PAGES = 96
ZERO_RUN = 1 << 31


class Marks:
    """A dirty tracker that has the host's writes alone: there is no guest here."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.active = False

    def start(self) -> None:
        self.active = True
        for region in self._memory.regions:
            region.dirty.harvest()

    def stop(self) -> None:
        self.active = False

    def harvest(self) -> Sequence[PageSet]:
        sets = []
        for region in self._memory.regions:
            words = len(region.dirty.native)
            bits = ffi.new("uint64_t[]", words)
            lib.pv_dirty_harvest(region.dirty.native, bits, words)
            sets.append(PageSet(region, bits, int(lib.pv_dirty_count(bits, words))))
        return sets


@contextlib.contextmanager
def replica() -> Iterator[tuple[GuestMemory, ReplicaMemory]]:
    memory = GuestMemory([Region(0, PAGES * PAGE_SIZE, "low"), Region(1 << 32, PAGES * PAGE_SIZE, "high")])
    try:
        tracker: Any = Marks(memory)
        yield memory, ReplicaMemory(memory, tracker)
    finally:
        memory.close()


def page_of(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE_SIZE) if number else bytes(PAGE_SIZE)


def batch_of(pages: dict[int, int]) -> bytes:
    """``pages`` (number to content) as native/ram_stream.h lays them out, each run as long as it can be."""
    out, done = b"", set()
    for first in sorted(pages):
        if first in done:
            continue
        zero, run = pages[first] == 0, [first]
        while run[-1] + 1 in pages and (pages[run[-1] + 1] == 0) == zero:
            run.append(run[-1] + 1)
        done |= set(run)
        out += struct.pack("<II", first, len(run) | (ZERO_RUN if zero else 0))
        out += b"" if zero else b"".join(page_of(pages[page]) for page in run)
    return out


CONTENT = st.integers(0, 5)
WRITES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, PAGES - 1), CONTENT), max_size=30)
CHECKPOINT = st.dictionaries(st.tuples(st.integers(0, 1), st.integers(0, PAGES - 1)), CONTENT, max_size=30)


@settings(max_examples=60, deadline=None)
@given(before=CHECKPOINT, epochs=st.lists(st.tuples(WRITES, CHECKPOINT), min_size=1, max_size=5), rest=WRITES)
def test_rolling_forward_is_the_checkpoint_and_nothing_of_the_replica(
    before: dict[tuple[int, int], int], epochs: list[tuple[list[tuple[int, int, int]], Any]], rest: list[Any]
) -> None:
    with replica() as (memory, ram):
        regions = memory.regions
        held = dict(before)
        for (index, page), content in before.items():
            memory.write(regions[index].gpa + page * PAGE_SIZE, page_of(content))
        ram.protect()

        def seen() -> list[bytes]:
            return [region.pages(0, PAGES) for region in regions]

        def expected(content: dict[tuple[int, int], int]) -> list[bytes]:
            return [b"".join(page_of(content.get((index, page), 0)) for page in range(PAGES)) for index in (0, 1)]

        def write(writes: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
            for index, page, content in writes:
                memory.write(regions[index].gpa + page * PAGE_SIZE + 8, page_of(content)[8:16])
            return {(index, page) for index, page, _ in writes}

        for writes, checkpoint in epochs:
            written = write(writes)
            copies = {(i, p) for i in (0, 1) for first, n in regions[i].own_copies() for p in range(first, first + n)}
            assert copies == written  # what has a copy is what will be rolled back, exactly
            held |= checkpoint
            batches = [
                (index, 0, memoryview(batch_of({p: c for (i, p), c in checkpoint.items() if i == index})))
                for index in (0, 1)
            ]
            assert ram.check(batches) == len(checkpoint)
            rolled = ram.roll_forward(batches)
            assert (rolled.dropped, rolled.written) == (len(written), len(checkpoint))
            assert seen() == expected(held)
            assert not any(region.own_copies() for region in regions)
        mapped = write(rest)
        ram.release()
        for index, region in enumerate(regions):  # the mapping is the truth now, and all of it can be found
            truth = region.pages(0, PAGES)
            there = {page for first, count in region.present() for page in range(first, first + count)}
            for page in range(PAGES):
                assert page in there or not any(truth[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
            assert {page for i, page in mapped if i == index} <= there


@pytest.mark.parametrize(
    ("region", "batch"),
    [
        (2, b""),
        (0, b"\x00" * 7),
        (0, struct.pack("<II", PAGES, 1) + bytes(PAGE_SIZE)),
        (0, struct.pack("<II", 0, 2) + bytes(PAGE_SIZE)),
        (0, struct.pack("<II", 1, ZERO_RUN | PAGES)),
        (0, struct.pack("<II", 0xFFFFFFFF, ZERO_RUN | 2)),
        (0, struct.pack("<II", 0, 0)),
        (0, struct.pack("<II", 0, ZERO_RUN)),
        (0, struct.pack("<II", 0, 0x7FFFFFFF)),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(region: int, batch: bytes) -> None:
    with replica() as (_, ram), pytest.raises(ChannelError):
        ram.check([(region, 0, memoryview(batch))])


def test_more_pages_than_there_are_is_refused() -> None:
    """Eight bytes can stand for all of memory: so many of them would keep a secondary busy for hours."""
    whole = memoryview(struct.pack("<II", 0, ZERO_RUN | PAGES))
    with replica() as (_, ram):
        assert ram.check([(0, 0, whole), (1, 0, whole)]) == 2 * PAGES
        with pytest.raises(ChannelError, match="193 pages for a memory of 192"):
            ram.check([(0, 0, whole), (1, 0, whole), (0, 0, memoryview(struct.pack("<II", 3, ZERO_RUN | 1)))])


@pytest.mark.parametrize("content", [0, 3])
def test_a_copy_that_nobody_logged_hides_no_checkpoint(content: int) -> None:
    """As KVM makes it for a vCPU that is stopped before it has written."""
    with replica() as (memory, ram):
        memory.write(0, page_of(1) * 3)
        ram.protect()
        memory.regions[0].fill_pages(1, page_of(1))
        assert memory.regions[0].own_copies() == [(1, 1)]
        assert ram.roll_forward([(0, 0, memoryview(batch_of({0: 2})))]) == (0, 1)
        assert memory.read(0, 3 * PAGE_SIZE) == page_of(2) + page_of(1) * 2
        assert ram.roll_forward([(0, 0, memoryview(batch_of({1: content})))]) == (0, 1)
        assert memory.read(0, 3 * PAGE_SIZE) == page_of(2) + page_of(content) + page_of(1)
        assert not memory.regions[0].own_copies()


def test_what_is_covered_is_given_back() -> None:
    with replica() as (memory, ram):
        for region in memory.regions:
            memory.write(region.gpa, b"checkpoint" * 400 * PAGES)
        ram.protect()
        memory.write(5 * PAGE_SIZE, bytes(range(256)) * 16 * 20)
        before = memory.read(0, PAGES * PAGE_SIZE)
        ram.release()
        held = os.fstat(memory.regions[0].fd).st_blocks
        assert [region.free_covered() for region in memory.regions] == [20, 0]
        assert held - os.fstat(memory.regions[0].fd).st_blocks == 20 * PAGE_SIZE // 512
        assert memory.read(0, PAGES * PAGE_SIZE) == before
        there = {page for first, count in memory.regions[0].present() for page in range(first, first + count)}
        assert set(range(PAGES)) - there <= {page for page in range(PAGES) if not any(before[page * 4096 :][:4096])}


@settings(max_examples=100, deadline=None)
@given(batch=st.binary(max_size=200))
def test_whatever_comes_is_judged(batch: bytes) -> None:
    with replica() as (_, ram), contextlib.suppress(ChannelError):
        ram.check([(0, 0, memoryview(batch))])


def test_a_reset_after_a_failover_leaves_nothing() -> None:
    """Neither the checkpoint's pages nor the guest's own."""
    with replica() as (memory, ram):
        memory.write(0, b"checkpoint")
        ram.protect()
        with pytest.raises(StateError, match="low is mapped privately already"):
            ram.protect()
        memory.write(PAGE_SIZE, b"own")
        ram.release()
        memory.discard()
        memory.write(0, b"the next one")
        assert memory.regions[0].present() == [(0, 1)]
        assert not any(memory.read(12, PAGES * PAGE_SIZE - 12))


RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8).map(
    lambda raw: [run for i, run in enumerate(sorted(raw)) if i == 0 or sum(sorted(raw)[i - 1]) <= run[0]]
)


@given(one=RUNS, other=RUNS)
def test_runs_are_joined(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    def pages(runs: list[tuple[int, int]]) -> set[int]:
        return {page for first, count in runs for page in range(first, first + count)}

    joined = join_runs(one, other)
    assert pages(joined) == pages(one) | pages(other)
    assert all(sum(before) < after[0] for before, after in itertools.pairwise(joined))
