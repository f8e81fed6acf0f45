"""Drivers that break the rules: the device ends in needs-reset, and nothing outside the ring and buffers changes."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, NeedsReset, VirtQueue
from tests.unit.virtio.fake_driver import (
    DATA_REGION,
    INDIRECT,
    NEIGHBOUR_REGION,
    NEXT,
    REGIONS,
    RING,
    WRITE,
    FakeDriver,
    Ram,
    driver_on,
    ram,
)
from tests.unit.virtio.test_queue import queue_for

GUARD = (0x4D000, 0x2000)
"""RAM behind a hole, that no descriptor below reaches."""
REACHABLE = {gpa + at for gpa, size in REGIONS for at in range(size)}
DATA, SIZE = DATA_REGION[0], 8
TABLE = DATA + 0x1000

Rule = Callable[[FakeDriver], None]


def direct(index: int, gpa: int, length: int, flags: int, following: int = 0) -> Rule:
    """Write a descriptor of the ring's own table."""
    return lambda d: d.put(d.descriptors, index, gpa, length, flags, following)


def inner(index: int, gpa: int, length: int, flags: int, following: int = 0) -> Rule:
    """Write a descriptor of the table at TABLE."""
    return lambda d: d.put(TABLE, index, gpa, length, flags, following)


def idx(value: int) -> Rule:
    """Write the available index."""
    return lambda d: d.memory.write_uint(d.available + 2, 2, value)


def entry(slot: int, head: int) -> Rule:
    """Write an entry of the available ring."""
    return lambda d: d.memory.write_uint(d.available + 4 + 2 * slot, 2, head)


BROKEN: dict[str, tuple[str, list[Rule]]] = {
    "index jumps": ("ahead by more", [idx(SIZE + 1)]),
    "index runs backwards": ("ahead by more", [idx(0xFFFF)]),
    "head outside": ("starts outside", [entry(0, SIZE), idx(1)]),
    "next outside": ("goes on outside", [direct(0, DATA, 1, NEXT, SIZE), idx(1)]),
    "loop onto itself": ("longer than its table", [direct(0, DATA, 1, NEXT, 0), idx(1)]),
    "loop of two": ("longer than its table", [direct(0, DATA, 1, NEXT, 1), direct(1, DATA, 1, NEXT, 0), idx(1)]),
    "loop of empty buffers": ("longer than its table", [direct(0, 0, 0, NEXT, 0), idx(1)]),
    "loop in a table": ("longer than its table", [direct(0, TABLE, 16, INDIRECT), inner(0, DATA, 1, NEXT), idx(1)]),
    "buffer in a hole": ("not in RAM", [direct(0, DATA - 1, 2, 0), idx(1)]),
    "buffer past the end": ("not in RAM", [direct(0, GUARD[0] + GUARD[1] - 1, 2, WRITE), idx(1)]),
    "buffer at 2^64": ("not in RAM", [direct(0, 2**64 - 1, 2, WRITE), idx(1)]),
    "4 GiB of buffers": (
        "too many bytes",
        [direct(0, TABLE, 16 * 200, INDIRECT),
         *[inner(i, RING, 0x8000, NEXT, i + 1) for i in range(199)],
         inner(199, RING, 0xFFFFFFFF, 0), idx(1)],
    ),
    "to read behind to write": ("behind a device-writable",
                                [direct(0, DATA, 1, NEXT | WRITE, 1), direct(1, DATA, 1, 0), idx(1)]),
    "to read behind empty to write": ("behind a device-writable",
                                      [direct(0, DATA, 0, NEXT | WRITE, 1), direct(1, DATA, 1, 0), idx(1)]),
    "table in a table": ("indirect table",
                         [direct(0, TABLE, 16, INDIRECT), inner(0, TABLE + 16, 16, INDIRECT), idx(1)]),
    "table with a next": ("indirect table", [direct(0, TABLE, 16, INDIRECT | NEXT, 1), idx(1)]),
    "empty table": ("indirect table", [direct(0, TABLE, 0, INDIRECT), idx(1)]),
    "table of a half descriptor": ("indirect table", [direct(0, TABLE, 24, INDIRECT), idx(1)]),
    "table in a hole": ("indirect table", [direct(0, DATA - 16, 16, INDIRECT), idx(1)]),
    "table across regions": ("indirect table", [direct(0, NEIGHBOUR_REGION[0] - 16, 32, INDIRECT), idx(1)]),
    "next outside its table": ("goes on outside",
                               [direct(0, TABLE, 32, INDIRECT), inner(0, DATA, 1, NEXT, 2), idx(1)]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_each_rule_is_kept(case: str) -> None:
    message, rules = BROKEN[case]
    with ram(*REGIONS, GUARD) as memory:
        driver = driver_on(memory.memory, SIZE)
        queue = queue_for(memory, driver)
        for rule in rules:
            rule(driver)
        before = memory.snapshot()
        chain = queue.new_chain()
        with pytest.raises(NeedsReset, match=message):
            queue.pop(chain)
        assert (chain.readable, chain.writable) == (0, 0)
        with pytest.raises(NeedsReset, match="stopped"):
            queue.pop(chain)
        assert memory.snapshot() == before


def test_a_table_needs_to_be_negotiated() -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, SIZE)
        queue = queue_for(memory, driver, indirect=False)
        for rule in (direct(0, TABLE, 16, INDIRECT), inner(0, DATA, 1, 0), idx(1)):
            rule(driver)
        with pytest.raises(NeedsReset, match="indirect table"):
            queue.pop(queue.new_chain())


def test_the_index_must_not_run_backwards_while_chains_are_out() -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, SIZE)
        queue = queue_for(memory, driver)
        for rule in (direct(0, DATA, 1, 0), idx(SIZE)):
            rule(driver)
        for _ in range(SIZE):
            assert queue.pop(queue.new_chain())
        idx(SIZE + 1)(driver)  # one more than the driver has descriptors for
        with pytest.raises(NeedsReset, match="ahead by more"):
            queue.pop(queue.new_chain())


def test_what_looks_odd_but_is_allowed() -> None:
    """An indirect descriptor's WRITE flag, one behind others, an empty buffer anywhere, reserved flags."""
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, SIZE)
        queue = queue_for(memory, driver)
        rules = (
            direct(0, DATA, 3, NEXT | 0xFFF8, 1), direct(1, TABLE, 48, INDIRECT | WRITE),
            inner(0, 2**64 - 1, 0, NEXT, 2), inner(2, DATA, 5, WRITE), idx(1),
        )  # fmt: skip
        for rule in rules:
            rule(driver)
        chain = queue.new_chain()
        assert queue.pop(chain)
        assert (chain.readable, chain.writable) == (3, 5)


EDGES = [gpa + at for gpa, size in REGIONS for at in (-1, 0, 1, size - 16, size - 1, size)]
ADDRESSES = st.one_of(
    st.integers(DATA, DATA + 0x3FFF), st.sampled_from([*EDGES, 0, 2**32 - 1, 2**63, 2**64 - 16, 2**64 - 1]),
    st.integers(0, GUARD[0] - 1),
)  # fmt: skip
LENGTHS = st.one_of(st.integers(0, 64), st.sampled_from([16, 32, 0x4000, 0x8000, 2**31, 2**32 - 1]))
FLAGS = st.one_of(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT]), st.integers(0, 0xFFFF))
DESCRIPTORS = st.tuples(ADDRESSES, LENGTHS, FLAGS, st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)))


@settings(max_examples=150, deadline=None)
@given(
    table=st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    tables=st.lists(DESCRIPTORS, min_size=16, max_size=16),
    heads=st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(0, 0xFFFF)), min_size=SIZE, max_size=SIZE),
    ahead=st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF)),
    start=st.sampled_from([0, 0xFFFC]),
    event_idx=st.booleans(),
)
def test_no_ring_makes_the_device_touch_what_is_not_its_own(
    table: list[tuple[int, int, int, int]],
    tables: list[tuple[int, int, int, int]],
    heads: list[int],
    ahead: int,
    start: int,
    event_idx: bool,
) -> None:
    with ram(*REGIONS, GUARD) as memory:
        driver = driver_on(memory.memory, SIZE, event_idx=event_idx, start=start)
        for index, (gpa, length, flags, following) in enumerate(table):
            driver.put(driver.descriptors, index, gpa, length, flags, following)
        # Tables wherever a descriptor of this test may look for one.
        packed = b"".join(struct.pack("<QIHH", *descriptor) for descriptor in tables)
        memory.memory.write(DATA, packed * 32)
        for slot, head in enumerate(heads):
            entry(slot, head)(driver)
        queue = queue_for(memory, driver)
        idx(start + ahead & 0xFFFF)(driver)
        serve_all(memory, queue, driver)


def serve_all(memory: Ram, queue: VirtQueue, driver: FakeDriver) -> None:
    """Fill what is offered until the ring ends or breaks; only what a descriptor can name may change, and marked."""
    memory.clean()
    before = memory.snapshot()
    allowed = set(driver.used_bytes)
    chain = queue.new_chain()
    try:
        for _ in range(2 * SIZE):
            if not queue.pop(chain):
                break
            assert len(chain.read(0, 1 << 40)) == chain.readable
            room = min(chain.writable, 3000)
            if room:
                allowed |= REACHABLE
            assert chain.write(0, b"\xa5" * room) == room
            queue.push(chain, room)
        queue.wants_interrupt()
        queue.enable_kicks()
    except NeedsReset:
        assert not queue.wants_interrupt() and not queue.enable_kicks()
    assert memory.changes(before) <= allowed


@settings(max_examples=80, deadline=None)
@given(
    size=st.one_of(st.sampled_from([1, 8, 512, 1024]), st.integers(0, 0xFFFF)),
    parts=st.tuples(*[st.one_of(st.sampled_from([RING, RING + 0x4000]), ADDRESSES, st.integers(0, 2**64 - 1))] * 3),
    features=st.sampled_from([0, F_EVENT_IDX, F_INDIRECT_DESC | F_EVENT_IDX]),
)
def test_no_configuration_of_a_ring_leads_outside_memory(
    size: int, parts: tuple[int, int, int], features: int
) -> None:
    with ram(*REGIONS) as memory:
        queue = VirtQueue(memory.table, 0, 1024)
        queue.size, (queue.descriptors, queue.driver_area, queue.device_area) = size, parts
        lengths = (16 * size, 6 + 2 * size, 6 + 8 * size)
        possible = size.bit_count() == 1 and size <= 1024 and all(
            part % alignment == 0 and any(gpa <= part and part + length <= gpa + room for gpa, room in REGIONS)
            for part, length, alignment in zip(parts, lengths, (16, 2, 4), strict=True)
        )
        try:
            queue.start(features)
        except NeedsReset:
            assert not possible and not queue.ready
        else:
            assert possible and queue.ready
            queue.enable_kicks()
