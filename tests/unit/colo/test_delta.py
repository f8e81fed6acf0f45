"""Coded pages: both ends through Python, LZ4 blocks against the LZ4 library, and the bound on memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.colo.checkpoint import BATCH
from pyvmm.colo.delta import DeltaKind
from pyvmm.colo.replica_memory import ReplicaMemory
from pyvmm.colo.staging import Staging
from pyvmm.machine.dirty_tracker import DirtyTracker
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.native import ffi, lib
from tests.unit.colo.test_replica_memory import Marks

PAGES = 64
BOUND = 8 << 20


class Pair:
    """A primary's staging and a secondary's memory with nothing between them."""

    def __init__(self, bound: int = BOUND) -> None:
        def memory() -> GuestMemory:
            return GuestMemory([Region(0, PAGES * PAGE_SIZE, "low"), Region(1 << 32, PAGES * PAGE_SIZE, "high")])

        self.primary, self.secondary = memory(), memory()
        self.marks = Marks(self.primary)
        self.staging = Staging(bound, self.primary.regions)
        tracker: DirtyTracker = Marks(self.secondary)  # type: ignore[assignment]
        self.replica = ReplicaMemory(self.secondary, tracker)
        self.replica.protect()

    def checkpoint(self, kind: DeltaKind) -> int:
        """Bytes that crossed."""
        self.staging.stage(self.marks.harvest())
        self.staging.shrink(kind)
        payload, at, batches = b"".join(bytes(piece) for piece in self.staging.pieces()), 0, []
        assert len(payload) == self.staging.size
        while at < len(payload):
            region, flags, size = BATCH.unpack_from(payload, at)
            at += BATCH.size
            batches.append((region, flags, memoryview(payload)[at : at + size]))
            at += size
        assert self.replica.check(batches) == self.staging.pages
        assert self.replica.roll_forward(batches).written == self.staging.pages
        for mine, other in zip(self.primary.regions, self.secondary.regions, strict=True):
            assert mine.pages(0, PAGES) == other.pages(0, PAGES)
        self.staging.prepare()
        return len(payload)

    def close(self) -> None:
        self.staging.close()
        self.primary.close()
        self.secondary.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


WRITE = st.tuples(
    st.sampled_from([0, 1 << 32]), st.integers(0, PAGES - 1), st.integers(0, PAGE_SIZE - 600),
    st.sampled_from(["word", "zeros", "noise", "text"]), st.integers(0, 3),
)  # fmt: skip


def bytes_of(kind: str, seed: int) -> bytes:
    if kind == "word":
        return seed.to_bytes(8, "little")
    if kind == "zeros":
        return bytes(600)
    return random.Random(seed).randbytes(600) if kind == "noise" else b"the guest's own words, " * 26


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.lists(
        st.tuples(st.lists(WRITE, max_size=25), st.lists(WRITE, max_size=8), st.sampled_from(["off", "xor", "lz4"])),
        min_size=1, max_size=10,
    ),
    bound=st.sampled_from([1 << 20, BOUND]),
)  # fmt: skip
def test_the_secondary_has_what_the_primary_has(epochs: list[tuple[list[tuple[int, int, int, str, int]],
                                                                   list[tuple[int, int, int, str, int]], DeltaKind]],
                                                bound: int) -> None:
    """However the two changed meanwhile, and whether there is room to remember all pages."""
    pair = Pair(bound)
    try:
        for mine, replicas, kind in epochs:
            for memory, writes in ((pair.primary, mine), (pair.secondary, replicas)):
                for base, page, offset, what, seed in writes:
                    memory.write(base + page * PAGE_SIZE + offset, bytes_of(what, seed))
            pair.checkpoint(kind)
    finally:
        pair.close()


def test_a_counter_in_noise_costs_a_few_bytes(pair: Pair) -> None:
    for region in pair.primary.regions:
        pair.primary.write(region.gpa, random.Random(1).randbytes(PAGES * PAGE_SIZE))
    sizes = []
    for number in range(6):
        for page in range(PAGES):
            pair.primary.write_uint(page * PAGE_SIZE + 8 * page, 8, number + 1)
        sizes.append(pair.checkpoint("xor"))
    assert sizes[0] > 2 * PAGES * PAGE_SIZE
    assert sizes[-1] < PAGES * 24
    counts = pair.staging.deltas.counts
    assert counts.based == counts.coded > 3 * PAGES and counts.lz4 == 0
    assert pair.checkpoint("xor") == 0  # nothing was written


def test_what_gains_nothing_is_not_tried_each_time(pair: Pair) -> None:
    counts = pair.staging.deltas.counts
    for number in range(40):
        pair.primary.write(0, random.Random(number).randbytes(PAGE_SIZE))
        assert pair.checkpoint("lz4") == BATCH.size + 8 + PAGE_SIZE
    assert (counts.coded, counts.plain, counts.saved) == (0, 40, 0)
    pair.primary.write(0, b"x")
    sizes = []
    for number in range(80):  # and found out again when it does
        pair.primary.write_uint(64, 8, number)
        sizes.append(pair.checkpoint("xor"))
    assert sizes[0] > PAGE_SIZE > 200 > sizes[-1]


def test_lz4_is_for_what_changes_all_over(pair: Pair) -> None:
    for number in range(4):
        pair.primary.write(0, f"{number}, the guest writes, ".encode() * 190)
        sizes = {kind: pair.checkpoint(kind) for kind in ("lz4",)}
    assert sizes["lz4"] < 600
    assert pair.staging.deltas.counts.lz4 >= 3


def test_what_does_not_fit_is_sent_whole_and_remembered_no_more() -> None:
    pair = Pair(1 << 20)
    try:
        for number in range(6):
            for region in pair.primary.regions:
                pages = PAGES if number == 3 else 4
                size = pages * PAGE_SIZE - 8
                pair.primary.write(region.gpa + 8, random.Random(9).randbytes(size))
                pair.primary.write_uint(region.gpa, 8, number)
            pair.staging.limit = 256 << 10 if number == 3 else 1 << 20
            pair.checkpoint("xor")
            assert pair.staging.overflowed == (number == 3)
    finally:
        pair.close()


def test_a_bound_too_small_for_anything_means_whole_pages() -> None:
    assert not lib.pv_delta_new([1 << 20], 1, 1 << 20)
    assert not lib.pv_delta_new([], 0, 1 << 20)
    assert not lib.pv_delta_new([1] * 17, 17, 1 << 20)


def _with(writes: list[tuple[int, bytes]]) -> bytes:
    page = bytearray(PAGE_SIZE)
    for at, data in writes:
        page[at : at + len(data)] = data
    return bytes(page)


PAGE = st.one_of(
    st.binary(min_size=1, max_size=40).map(lambda piece: (piece * PAGE_SIZE)[:PAGE_SIZE]),
    st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)).map(
        lambda how: bytes(random.Random(how[0]).randrange(how[1]) for _ in range(PAGE_SIZE))
    ),
    st.lists(st.tuples(st.integers(0, PAGE_SIZE - 9), st.binary(min_size=1, max_size=9)), max_size=60).map(_with),
)


@settings(max_examples=150, deadline=None)
@given(page=PAGE)
def test_blocks_are_lz4s(page: bytes) -> None:
    """What is packed here the library unpacks, and the other way round."""
    out = ffi.new("uint8_t[]", 2 * PAGE_SIZE)
    size = lib.pv_lz4_pack(page, out, 2 * PAGE_SIZE)
    assert lz4.block.decompress(bytes(ffi.buffer(out, size)), uncompressed_size=PAGE_SIZE) == page
    theirs = lz4.block.compress(page, store_size=False)
    again = ffi.new("uint8_t[]", PAGE_SIZE)
    assert lib.pv_lz4_unpack(theirs, len(theirs), again) == 0
    assert bytes(ffi.buffer(again)) == page
    assert size < len(theirs) * 1.3 + 100  # and about as small


@settings(max_examples=200, deadline=None)
@given(block=st.binary(max_size=60))
def test_what_lz4_refuses_is_refused(block: bytes) -> None:
    page = ffi.new("uint8_t[]", PAGE_SIZE)
    if lib.pv_lz4_unpack(block, len(block), page) == 0:
        assert lz4.block.decompress(block, uncompressed_size=PAGE_SIZE) == bytes(ffi.buffer(page))
