"""The memory balloon: pages that go back to the host, statistics, hints and reports."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import SectionError
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.balloon import (
    DEFLATE,
    F_FREE_PAGE_HINT,
    F_PAGE_REPORTING,
    F_STATS_VQ,
    HINT,
    HINT_DONE,
    INFLATE,
    LIST_MAX,
    REPORT,
    STATS,
    VirtioBalloon,
)
from pyvmm.virtio.mmio_registers import CONFIG
from tests.unit.virtio.device_bench import DeviceBench
from tests.unit.virtio.fake_driver import DATA_REGION, RING_REGION, Buffer, Ram, ram

DATA = DATA_REGION[0]
RAM = 0x100000
PAGES = 64
HALF = PAGES // 2 * PAGE_SIZE
REGIONS = (RING_REGION, DATA_REGION, (RAM, HALF), (RAM + HALF, HALF))
FIRST = RAM // PAGE_SIZE


class BalloonBench(DeviceBench):
    """A balloon in a guest whose pages from RAM on are full of ones."""

    def __init__(self, memory: Ram, target: int = 0) -> None:
        self.balloon = VirtioBalloon(memory.table, memory.memory, target)
        super().__init__(memory, self.balloon)
        memory.memory.write(RAM, b"\1" * (PAGES * PAGE_SIZE))
        memory.clean()

    def give(self, pages: list[int], queue: int = INFLATE) -> None:
        self.ram.memory.write(DATA, struct.pack(f"<{len(pages)}I", *pages))
        self.drivers[queue].offer([Buffer(DATA, 4 * len(pages), False)])
        self.ring_bell(queue)

    def zero_pages(self) -> set[int]:
        """Which of the pages from RAM on are zero; these must be marked dirty, and no others."""
        found = set()
        for page in range(PAGES):
            data = self.ram.memory.read(RAM + page * PAGE_SIZE, PAGE_SIZE)
            assert data in (bytes(PAGE_SIZE), b"\1" * PAGE_SIZE)
            region = self.ram.memory.regions[2 + page // (PAGES // 2)]
            assert region.dirty.test(page % (PAGES // 2)) == (data[0] == 0)
            if data[0] == 0:
                found.add(page)
        return found

    def blocks(self) -> int:
        """Pages of the memfds that the host holds; reading one makes it hold it again."""
        return sum(os.fstat(region.fd).st_blocks for region in self.ram.memory.regions[2:]) // 8


def test_inflated_pages_go_back_to_the_host_and_read_as_zeros() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        assert bench.get(registers.DEVICE_ID) == 5 and bench.blocks() == PAGES
        # In any order, one of them twice, across the seam of two regions.
        chosen = {3, 4, 5, 31, 32, 33, 60}
        bench.give([FIRST + page for page in (60, 33, 31, 32, 4, 3, 5, 4)])
        assert bench.drivers[INFLATE].collect()[0][1] == 0
        assert bench.blocks() == PAGES - len(chosen) and bench.zero_pages() == chosen
        bench.give([FIRST + 4], DEFLATE)
        assert bench.drivers[DEFLATE].collect() and bench.zero_pages() == chosen


def test_the_target_is_told_and_what_the_driver_has_is_read() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory, 5 * PAGE_SIZE)
        bench.negotiate()
        assert bench.get(CONFIG) == 5
        bench.signal.pulses()
        bench.balloon.set_target(9 * PAGE_SIZE + 1)
        assert bench.get(CONFIG) == 9 and bench.balloon.target == 9 * PAGE_SIZE and bench.signal.pulses() == 1
        bench.put(CONFIG + 4, 7)
        bench.put(CONFIG, 99)  # not the driver's
        assert bench.balloon.actual == 7 * PAGE_SIZE and bench.get(CONFIG) == 9
        assert bench.balloon.statistics() == {"target": 9 * PAGE_SIZE, "actual": 7 * PAGE_SIZE, "reported_free": 0}
        for wrong in (-1, memory.memory.size + 1):
            with pytest.raises(ValueError, match="a balloon of"):
                bench.balloon.set_target(wrong)
        bench.put(registers.STATUS, 0)
        assert (bench.balloon.target, bench.balloon.actual) == (9 * PAGE_SIZE, 0)


def test_pages_that_are_no_ram_are_passed_over() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        bench.give([0, FIRST - 1, FIRST, FIRST + PAGES, 0xFFFFFFFF, 0x80000])
        assert not bench.broken and bench.zero_pages() == {0}


def test_the_ring_in_the_balloon_is_the_drivers_misfortune_only() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        bench.give([RING_REGION[0] // PAGE_SIZE, DATA // PAGE_SIZE])
        assert memory.memory.read(DATA, PAGE_SIZE) == bytes(PAGE_SIZE)
        bench.ring_bell(INFLATE)
        bench.put(registers.STATUS, 0)
        bench.negotiate()
        bench.give([FIRST])
        assert bench.zero_pages() == {0}


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_lists_that_are_none_need_a_reset(queue: int) -> None:
    for buffers, table in (([Buffer(DATA, 8, True)], None), ([Buffer(DATA, 6, False)], None),
                           ([Buffer(DATA, 4, False), Buffer(DATA, 4, True)], None),
                           ([Buffer(DATA, 0x4000, False)] * (LIST_MAX * 4 // 0x4000) + [Buffer(DATA, 4, False)],
                            DATA + 0x4000)):  # fmt: skip
        with ram(*REGIONS) as memory:
            bench = BalloonBench(memory)
            bench.negotiate()
            bench.drivers[queue].offer(buffers, table)
            bench.ring_bell(queue)
            assert bench.broken and bench.zero_pages() == set()


def test_a_host_that_does_not_take_pages_is_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gpa: int, size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        monkeypatch.setattr(memory.memory, "zero", refuse)
        bench.give([FIRST])
        assert bench.broken and bench.zero_pages() == set()


def offer_statistics(bench: BalloonBench, *pairs: tuple[int, int], tail: bytes = b"") -> None:
    data = b"".join(struct.pack("<HQ", *pair) for pair in pairs) + tail
    bench.ram.memory.write(DATA, data)
    bench.drivers[STATS].offer([Buffer(DATA, len(data), False)])
    bench.ring_bell(STATS)


def test_statistics_come_when_asked_for() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        told: list[dict[str, int]] = []
        bench.balloon.on_statistics = told.append
        bench.negotiate()
        offer_statistics(bench, (4, 1000), (5, 2000), (999, 1), (0, 2**64 - 1), tail=b"12345")
        assert told == [{"free_memory": 1000, "total_memory": 2000}] and bench.drivers[STATS].collect() == []
        bench.balloon.request_statistics()
        bench.serve()
        assert len(bench.drivers[STATS].collect()) == 1 and len(told) == 1
        offer_statistics(bench, (4, 900))
        assert bench.balloon.guest_statistics == told[1] == {"free_memory": 900}


def test_the_statistics_buffer_survives_a_pause_a_save_and_a_load() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        offer_statistics(bench, (4, 1))
        bench.transport.pause()
        bench.balloon.request_statistics()  # while nothing may move
        bench.serve()
        assert bench.drivers[STATS].collect() == []
        saved = bench.transport.save()
        bench.transport.resume()
        bench.serve()
        assert len(bench.drivers[STATS].collect()) == 1
        other = BalloonBench(memory)
        other.drivers = bench.drivers
        other.transport.load(saved)
        other.transport.kick()
        other.serve()
        assert other.balloon.guest_statistics == {"free_memory": 1}


def test_reported_pages_go_back_to_the_host_if_they_are_whole() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        bench.drivers[REPORT].offer([Buffer(RAM + 2 * PAGE_SIZE, 4 * PAGE_SIZE, True),
                                     Buffer(RAM + 10 * PAGE_SIZE + 1, 2 * PAGE_SIZE, True),
                                     Buffer(RAM + 20 * PAGE_SIZE, 100, True),
                                     Buffer(RAM + 30 * PAGE_SIZE, 4 * PAGE_SIZE, True)])  # fmt: skip
        bench.ring_bell(REPORT)
        assert len(bench.drivers[REPORT].collect()) == 1 and bench.blocks() == PAGES - 9
        assert bench.zero_pages() == {2, 3, 4, 5, 11, 30, 31, 32, 33} and bench.balloon.reported == 9 * PAGE_SIZE


def command(bench: BalloonBench, value: int) -> None:
    bench.ram.memory.write_uint(DATA, 4, value)
    bench.drivers[HINT].offer([Buffer(DATA, 4, False)])
    bench.ring_bell(HINT)


def hint(bench: BalloonBench, page: int, count: int) -> None:
    bench.drivers[HINT].offer([Buffer(RAM + page * PAGE_SIZE, count * PAGE_SIZE, True)])
    bench.ring_bell(HINT)


def test_hints_are_those_that_answer_the_command_and_keep_their_content() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        hints: list[Any] = []

        def end() -> None:
            hints.append("end")

        assert not bench.balloon.start_hinting(lambda gpa, size: None, end)
        bench.negotiate()
        assert bench.get(CONFIG + 8) == 0
        hint(bench, 1, 1)  # unasked
        assert bench.balloon.start_hinting(lambda gpa, size: hints.append((gpa, size)), end)
        wanted = bench.get(CONFIG + 8)
        assert wanted > HINT_DONE
        hint(bench, 2, 1)  # before the command
        command(bench, wanted + 1)
        hint(bench, 3, 1)  # of another command
        command(bench, wanted)
        hint(bench, 4, 3)
        hint(bench, 30, 4)  # across the seam
        command(bench, 0)
        hint(bench, 40, 1)  # after the end
        page = PAGE_SIZE
        assert hints == [(RAM + 4 * page, 3 * page), (RAM + 30 * page, 2 * page), (RAM + 32 * page, 2 * page), "end"]
        assert bench.zero_pages() == set() and not bench.broken
        bench.balloon.stop_hinting()
        assert bench.get(CONFIG + 8) == HINT_DONE
        bench.balloon.start_hinting(lambda gpa, size: None, end)
        assert bench.get(CONFIG + 8) not in (wanted, 0, 1)
        bench.put(registers.STATUS, 0)
        assert hints[4:] == ["end"]


def test_a_driver_without_hints_is_not_asked() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate(0, [INFLATE, DEFLATE])
        assert not bench.balloon.start_hinting(lambda gpa, size: None, lambda: None)
        bench.give([FIRST])
        assert bench.zero_pages() == {0}


@pytest.mark.parametrize(("features", "queues", "purposes"), [
    (F_PAGE_REPORTING, [0, 1, 4], {4: REPORT}),  # as 5.5.2 numbers them
    (F_PAGE_REPORTING, [0, 1, 2], {2: REPORT}),  # as Linux does over MMIO
    (F_FREE_PAGE_HINT | F_PAGE_REPORTING, [0, 1, 2, 3], {2: HINT, 3: REPORT}),
    (F_STATS_VQ | F_PAGE_REPORTING, [0, 1, 2, 4], {2: STATS, 4: REPORT}),
])  # fmt: skip
def test_queues_without_their_feature_leave_a_gap_or_none(
    features: int, queues: list[int], purposes: dict[int, int]
) -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate(features, queues)
        for index, purpose in purposes.items():
            assert bench.balloon._purpose(bench.balloon.queues[index]) == purpose
            if purpose == REPORT:
                bench.drivers[index].offer([Buffer(RAM, PAGE_SIZE, True)])
                bench.ring_bell(index)
                assert bench.zero_pages() == {0}


def test_a_queue_of_a_feature_that_nobody_wanted_needs_a_reset() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate(0)
        bench.drivers[4].offer([Buffer(RAM, PAGE_SIZE, True)])
        bench.ring_bell(4)
        assert bench.broken and bench.zero_pages() == set()


def test_state_that_contradicts_itself_is_refused() -> None:
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        saved = bench.transport.save()
        saved["device"] = {**saved["device"], "hinting": True}
        with pytest.raises(SectionError, match="no command"):
            bench.transport.load(saved)


CHAINS = st.lists(st.tuples(
    st.sampled_from([INFLATE, DEFLATE, STATS, HINT, REPORT]),
    st.lists(st.tuples(st.sampled_from([DATA, DATA + 3, RAM, RAM + 5, RAM + 31 * PAGE_SIZE, 0x10000]),
                       st.sampled_from([0, 1, 4, 8, 10, 64, PAGE_SIZE, 3 * PAGE_SIZE]), st.booleans()),
             min_size=1, max_size=3),
    st.sampled_from(["", "pause", "save", "request", "hint", "stop", "reset"])), max_size=10)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(CHAINS, st.binary(max_size=64))
def test_no_driver_breaks_more_than_its_own_guest(
    chains: list[tuple[int, list[tuple[int, int, bool]], str]], data: bytes
) -> None:
    """Whatever it offers and whenever: nothing raises, every zeroed page is marked, and state can be saved."""
    with ram(*REGIONS) as memory:
        bench = BalloonBench(memory)
        bench.negotiate()
        for queue, buffers, event in chains:
            memory.memory.write(DATA, data)
            driver = bench.drivers[queue]
            if len(driver.free) >= len(buffers):
                driver.offer([Buffer(*buffer) for buffer in sorted(buffers, key=lambda b: b[2])])
            bench.ring_bell(queue)
            if event == "pause":
                bench.transport.pause()
                bench.ring_bell(queue)
                bench.transport.resume()
                bench.serve()
            elif event == "save":
                bench.transport.pause()
                saved = bench.transport.save()
                bench.transport.load(saved)
                assert bench.transport.save() == saved
                bench.transport.resume()
            elif event == "request":
                bench.balloon.request_statistics()
            elif event == "hint":
                bench.balloon.start_hinting(lambda gpa, size: None, lambda: None)
            elif event == "stop":
                bench.balloon.stop_hinting()
            elif event == "reset":
                bench.put(registers.STATUS, 0)
                bench.negotiate()
            bench.serve()
