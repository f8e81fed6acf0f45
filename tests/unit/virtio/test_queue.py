"""A well-behaved driver against the queue: the device sees exactly its buffers, it sees exactly what was used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.native import ffi
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC, QUEUE_MAX, NeedsReset, VirtQueue
from tests.unit.virtio.fake_driver import DATA_REGION, REGIONS, RING, Buffer, FakeDriver, Ram, driver_on, ram

TABLES = DATA_REGION[0]  # indirect tables: 64 bytes of descriptors each, not aligned
BUFFERS = DATA_REGION[0] + 0x4000


def queue_for(memory: Ram, driver: FakeDriver, *, indirect: bool = True) -> VirtQueue:
    """A started queue whose indices are where the driver's are."""
    queue = VirtQueue(memory.table, 0, QUEUE_MAX)
    queue.size, queue.descriptors = driver.size, driver.descriptors
    queue.driver_area, queue.device_area = driver.available, driver.used
    queue.start((F_EVENT_IDX if driver.event_idx else 0) | (F_INDIRECT_DESC if indirect else 0))
    native = queue._native
    native.next_avail = native.next_used = native.notified = driver.available_idx
    return queue


@st.composite
def chain_lengths(draw: st.DrawFn) -> tuple[list[int], list[int], bool]:
    """(lengths to read, lengths to write, indirect); the buffers together fit 1000 bytes."""
    lengths = st.lists(st.integers(0, 150), max_size=3)
    readable, writable = draw(lengths), draw(lengths)
    if not readable and not writable:
        readable = [draw(st.integers(0, 9))]
    return readable, writable, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(3, 6),
    event_idx=st.booleans(),
    start=st.sampled_from([0, 1, 0xFFF0, 0xFFFF]),
    batches=st.lists(st.lists(chain_lengths(), min_size=1, max_size=4), min_size=1, max_size=8),
    wants=st.booleans(),
    data=st.data(),
)
def test_what_is_offered_is_what_arrives(
    order: int,
    event_idx: bool,
    start: int,
    batches: list[list[tuple[list[int], list[int], bool]]],
    wants: bool,
    data: st.DataObject,
) -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, 1 << order, event_idx=event_idx, start=start)
        queue = queue_for(memory, driver)
        queue.enable_kicks()
        for batch in batches:
            expected: dict[int, tuple[bytes, list[Buffer]]] = {}
            before_offer = driver.available_idx
            # Right up to where DATA_REGION ends and its neighbour begins, and beyond.
            at = BUFFERS + 0x4000 - data.draw(st.integers(0, 1500))
            for slot, (readable, writable, indirect) in enumerate(batch):
                if len(driver.free) < (1 if indirect else len(readable) + len(writable)):
                    continue
                buffers, content = [], b""
                for writes, length in [*((False, n) for n in readable), *((True, n) for n in writable)]:
                    buffers.append(Buffer(at, length, writes))
                    if not writes:
                        piece = bytes((at + i) * 7 & 0xFF for i in range(length))
                        memory.memory.write(at, piece)
                        content += piece
                    at += length + 1
                head = driver.offer(buffers, TABLES + 200 * slot + slot if indirect else None)
                expected[head] = content, [b for b in buffers if b.writable]
            if not expected:
                continue
            assert driver.must_kick(before_offer)
            driver.want_interrupts(wants)
            queue.disable_kicks()
            memory.clean()
            before = memory.snapshot()

            out, seen = [], {}
            while True:
                chain = queue.new_chain()
                if not queue.pop(chain):
                    break
                out.append(chain)
            assert queue.in_flight == len(out)
            wanted = set()
            for chain in data.draw(st.permutations(out)):
                content, buffers = expected[chain.native.head]
                room = sum(b.length for b in buffers)
                assert (chain.readable, chain.writable) == (len(content), room)
                assert chain.read(0, 1 << 20) == content
                assert chain.read(3, 5) == content[3:8]
                written = data.draw(st.integers(0, room))
                answer = bytes(i * 5 + 1 & 0xFF for i in range(written))
                assert chain.write(0, answer) == written
                queue.push(chain, written)
                seen[chain.native.head] = written
                places = [b.gpa + i for b in buffers for i in range(b.length)][:written]
                assert bytes(memory.memory.read_uint(p, 1) for p in places) == answer
                wanted |= set(places)
            assert memory.changes(before) <= wanted | driver.used_bytes
            assert queue.wants_interrupt() == wants
            assert not queue.wants_interrupt()  # once
            assert not queue.enable_kicks()
            assert dict(driver.collect()) == seen and seen.keys() == expected.keys()


@pytest.mark.parametrize("event_idx", [False, True])
def test_enabling_kicks_says_that_something_came_meanwhile(event_idx: bool) -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, 8, event_idx=event_idx, start=0xFFFF)
        queue = queue_for(memory, driver)
        queue.enable_kicks()
        queue.disable_kicks()
        chain = queue.new_chain()
        before = driver.available_idx
        driver.offer([Buffer(BUFFERS, 1, False)])
        assert queue.pop(chain)
        # Not kicked for the second while it is being served, and told of it when it says that it waits.
        before = driver.available_idx
        driver.offer([Buffer(BUFFERS, 1, False)])
        assert not driver.must_kick(before)
        assert queue.enable_kicks()


def test_an_interrupt_comes_when_used_event_is_passed_and_only_then() -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, 8, event_idx=True, start=0xFFFE)
        queue = queue_for(memory, driver)
        chain = queue.new_chain()
        memory.memory.write_uint(driver.available + 4 + 16, 2, 0)  # when entry 0, the third from here, is filled
        asked = []
        for _ in range(4):
            driver.offer([Buffer(BUFFERS, 1, False)])
            assert queue.pop(chain)
            queue.push(chain, 0)
            asked.append(queue.wants_interrupt())
        assert asked == [False, False, True, False]


def test_marks_reach_every_page_of_a_large_used_ring() -> None:
    with ram(*REGIONS) as memory:
        driver = FakeDriver(memory.memory, QUEUE_MAX, RING, RING + 0x4000, RING + 0x5000)
        queue = queue_for(memory, driver)
        chain = queue.new_chain()
        memory.clean()
        before = memory.snapshot()
        for _ in range(QUEUE_MAX):
            driver.offer([Buffer(BUFFERS, 1, False)])
            assert queue.pop(chain)
            queue.push(chain, 0)
        changed = memory.changes(before)
        assert max(changed & driver.used_bytes) > driver.used + 4096


def test_what_was_written_for_a_chain_is_marked_also_when_another_chain_broke_the_queue() -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, 8)
        queue = queue_for(memory, driver)
        chain, bad = queue.new_chain(), queue.new_chain()
        driver.offer([Buffer(BUFFERS, 4, True)])
        driver.offer([Buffer(1 << 40, 4, True)])
        assert queue.pop(chain)
        with pytest.raises(NeedsReset):
            queue.pop(bad)
        memory.clean()
        before = memory.snapshot()
        [(hva, size)] = chain.writable_segments()
        ffi.memmove(ffi.cast("char *", hva), b"read", size)  # as preadv(2) does, behind the queue's back
        with pytest.raises(NeedsReset):
            queue.push(chain, size)
        assert memory.changes(before) == set(range(BUFFERS, BUFFERS + 4))


def test_a_chain_may_be_given_back_only_once_and_with_no_more_than_it_holds() -> None:
    with ram(*REGIONS) as memory:
        driver = driver_on(memory.memory, 8)
        queue = queue_for(memory, driver)
        chain = queue.new_chain()
        driver.offer([Buffer(BUFFERS, 4, True)])
        assert queue.pop(chain)
        with pytest.raises(ValueError, match="5 is too much"):
            queue.push(chain, 5)
        queue.push(chain, 4)
        with pytest.raises(ValueError, match="not out"):
            queue.push(chain, 4)


@pytest.mark.parametrize("size", [0, 3, 2 * QUEUE_MAX])
def test_a_device_cannot_offer_an_impossible_size(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        VirtQueue(None, 0, size)


def test_a_driver_cannot_take_more_than_is_offered() -> None:
    with ram(*REGIONS) as memory:
        queue = VirtQueue(memory.table, 0, 8)
        queue.size, queue.descriptors, queue.driver_area, queue.device_area = 16, 0x10000, 0x12000, 0x13000
        with pytest.raises(NeedsReset, match="16 of 8"):
            queue.start(0)
        assert not queue.ready
