"""RAM frames: what is packed arrives, and what cannot be right writes nothing."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ChannelError
from pyvmm.machine.dirty_tracker import PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.migration.channel import Channel
from pyvmm.migration.protocol import Message
from pyvmm.migration.ram import BATCH, FLAG_LZ4, HEAD, RamCounters, RamReceiver, RamSender
from pyvmm.native import ffi, lib

PAGES = 200


class Link:
    """Two memories of two regions, and a sender and receiver between them."""

    def __init__(self, *, compress: bool = False, limit: int = 0) -> None:
        one, other = socket.socketpair()
        self.near, self.far = Channel(one, stall=5.0), Channel(other, stall=5.0)
        self.memories = [
            GuestMemory([Region(0, PAGES * PAGE_SIZE, "low"), Region(1 << 32, PAGES * PAGE_SIZE, "high")])
            for _ in range(2)
        ]
        self.counters = RamCounters()
        self.sender = RamSender(self.near, self.counters, lambda: limit, compress=compress)
        self.receiver = RamReceiver(self.memories[1])

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in (self.near, self.far):
            channel.close()
        for memory in self.memories:
            memory.close()

    def transfer(self, sets: list[PageSet] | None) -> int:
        """A round; how many frames it took."""
        frames = 0

        def take() -> None:
            nonlocal frames
            while True:
                kind, payload = self.far.receive()
                if kind == Message.PASS:
                    return
                frames += 1
                self.receiver.take(payload)

        thread = threading.Thread(target=take)
        thread.start()
        if sets is None:
            self.sender.send_present(self.memories[0])
        else:
            self.sender.send_dirty(sets)
        self.sender.end_round()
        thread.join(20)
        return frames

    def harvest(self) -> list[PageSet]:
        sets = []
        for region in self.memories[0].regions:
            bits = ffi.new("uint64_t[]", len(region.dirty.native))
            lib.pv_dirty_harvest(region.dirty.native, bits, len(bits))
            sets.append(PageSet(region, bits, int(lib.pv_dirty_count(bits, len(bits)))))
        return sets

    def same(self) -> bool:
        return all(
            self.memories[0].read(r.gpa, r.size) == self.memories[1].read(r.gpa, r.size)
            for r in self.memories[0].regions
        )


WRITES = st.lists(
    st.tuples(st.sampled_from([0, 1 << 32]), st.integers(0, PAGES - 1), st.sampled_from([0, 1, 2, 3])), max_size=30
)


@settings(deadline=None, max_examples=40)
@given(rounds=st.lists(WRITES, min_size=1, max_size=4), compress=st.booleans())
def test_after_each_round_both_memories_are_the_same(rounds: list[list[tuple[int, int, int]]], compress: bool) -> None:
    with Link(compress=compress) as link:
        for number, writes in enumerate(rounds):
            for base, page, kind in writes:
                content = [bytes(PAGE_SIZE), b"\1" * PAGE_SIZE, os.urandom(PAGE_SIZE), bytes(PAGE_SIZE - 1) + b"\2"]
                link.memories[0].write(base + page * PAGE_SIZE, content[kind])
            sets = link.harvest()
            link.transfer(sets if number else None)
            assert link.same()
        assert link.counters.pages >= link.counters.zero_pages


def test_untouched_memory_is_not_looked_at_and_zero_pages_take_no_memory() -> None:
    with Link() as link:
        link.memories[0].write(5 * PAGE_SIZE, b"x")
        link.memories[0].write(6 * PAGE_SIZE, bytes(PAGE_SIZE))
        link.transfer(None)
        assert (link.counters.pages, link.counters.zero_pages) == (2, 1)
        assert os.fstat(link.memories[0].regions[0].fd).st_blocks * 512 == 2 * PAGE_SIZE
        assert os.fstat(link.memories[1].regions[0].fd).st_blocks * 512 == PAGE_SIZE


def test_a_page_that_becomes_zero_later_is_zero_there_too() -> None:
    with Link() as link:
        link.memories[0].write(0, b"x" * PAGE_SIZE * 3)
        link.transfer(None)
        link.harvest()
        link.memories[0].write(PAGE_SIZE, bytes(PAGE_SIZE))
        link.transfer(link.harvest())
        assert link.same() and link.counters.zero_pages == 1


def test_the_bandwidth_limit_is_kept() -> None:
    import time

    with Link(limit=2_000_000) as link:
        link.memories[0].write(0, os.urandom(PAGES * PAGE_SIZE))
        started = time.monotonic()
        link.transfer(None)
        assert time.monotonic() - started > 0.25  # 800 KiB at 2 MB/s are 0.41 s


@settings(deadline=None, max_examples=200)
@given(st.one_of(
    st.binary(max_size=64),
    st.builds(lambda region, flags, size, rest: HEAD.pack(region, flags, size) + rest,
              st.integers(0, 3), st.integers(0, 3), st.integers(0, BATCH + 5), st.binary(max_size=5000)),
    st.builds(lambda page, count, body: HEAD.pack(0, 0, 8 + len(body)) + struct.pack("<II", page, count) + body,
              st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF), st.sampled_from([b"", b"x" * PAGE_SIZE])),
))  # fmt: skip
def test_no_frame_writes_outside_or_half(payload: bytes) -> None:
    with Link() as link:
        before = [link.memories[1].read(r.gpa, r.size) for r in link.memories[1].regions]
        try:
            link.receiver.take(memoryview(bytearray(payload)))
        except ChannelError:
            assert before == [link.memories[1].read(r.gpa, r.size) for r in link.memories[1].regions]


@pytest.mark.parametrize(("page", "count"), [(PAGES, 1), (0, PAGES + 1), (PAGES - 1, 2), (0xFFFFFFFF, 1), (0, 0),
                                             (1, 0x7FFFFFFF)])  # fmt: skip
def test_pages_outside_are_refused(page: int, count: int) -> None:
    with Link() as link:
        for kind in (0, lib.PV_RUN_ZERO):
            batch = struct.pack("<II", page, count | kind) + (b"" if kind else b"x" * PAGE_SIZE)
            with pytest.raises(ChannelError, match="not in region low"):
                link.receiver.take(memoryview(bytearray(HEAD.pack(0, 0, len(batch)) + batch)))


def test_a_good_record_before_a_bad_one_is_not_written_either() -> None:
    with Link() as link:
        batch = struct.pack("<II", 0, 1) + b"x" * PAGE_SIZE + struct.pack("<II", PAGES, 1) + b"y" * PAGE_SIZE
        with pytest.raises(ChannelError):
            link.receiver.take(memoryview(bytearray(HEAD.pack(0, 0, len(batch)) + batch)))
        assert link.memories[1].read(0, 1) == b"\0"


def test_what_does_not_unpack_is_refused() -> None:
    with Link() as link, pytest.raises(ChannelError, match="does not unpack"):
        link.receiver.take(memoryview(bytearray(HEAD.pack(0, FLAG_LZ4, 100) + b"\xff" * 30)))


def test_the_checksum_is_the_published_one() -> None:
    """RFC 3720, B.4: 32 bytes of zeros, of ones, ascending."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)):
        assert lib.pv_crc32c(0, data, len(data)) == crc
        half = lib.pv_crc32c(0, data[:13], 13)
        assert lib.pv_crc32c(half, data[13:], 19) == crc
