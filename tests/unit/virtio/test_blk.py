"""The block device: requests by the book, and a driver that lies in each field."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import DeadlineError, SectionError
from pyvmm.native import lib
from pyvmm.virtio import blk
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.device import F_VERSION_1
from pyvmm.virtio.mmio_registers import DEVICE_NEEDS_RESET
from pyvmm.virtio.queue import F_EVENT_IDX
from tests.framework.stuck_memory import stuck_memory
from tests.unit.virtio.block_bench import (
    ALL,
    DATA,
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNSUPP,
    ZEROES,
    block_bench,
    disk,
    header,
    ranges,
)  # fmt: skip
from tests.unit.virtio.fake_driver import Buffer

SECTORS = 2048
NO_SECTOR = (1 << 64) - 1


def test_it_is_a_disk_of_the_images_size(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        assert bench.get(registers.DEVICE_ID) == 2
        space = bench.blk.configuration()
        capacity, size_max, seg_max = struct.unpack_from("<QII", space)
        assert (capacity, size_max, seg_max) == (SECTORS, 0, 254)
        assert struct.unpack_from("<I", space, 20) == (512,) and space[32] == 1 and len(space) == 60
        most, count, alignment = struct.unpack_from("<III", space, 36)
        assert (most, count, alignment) == (lib.PV_BLOCK_RANGE_SECTORS, 16, 1 << space[24])


def test_what_is_written_is_read_and_in_the_file(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        before = Path(bench.blk.image.path).read_bytes()
        assert bench.request(IN, 3, room=1024) == (OK, before[1536:2560])
        data = os.urandom(4096)
        assert bench.request(OUT, 2040, data) == (OK, b"")
        assert bench.request(FLUSH) == (OK, b"")
        assert Path(bench.blk.image.path).read_bytes() == before[: 2040 * 512] + data
        assert bench.request(IN, 2040, room=4096) == (OK, data)
        assert bench.signal.pulses() >= 1
        assert bench.blk.statistics() == {
            "reads": 2, "reads_failed": 0, "reads_bytes": 5120, "writes": 1, "writes_failed": 0, "writes_bytes": 4096,
            "flushes": 1, "flushes_failed": 0, "flushes_bytes": 0,
        }  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_framing_means_nothing(tmp_path: Path, data: st.DataObject) -> None:
    """2.7.4.3 and 5.2.6: header, data and status may be cut into descriptors anywhere."""
    cuts = tuple(data.draw(st.lists(st.integers(1, 2100), max_size=20)))
    with block_bench(disk(tmp_path, content=bytes(range(256)) * 64)) as bench:
        assert bench.request(OUT, 1, b"abcd" * 256, cuts=cuts) == (OK, b"")
        expected = bytes(range(256)) * 2 + b"abcd" * 256 + bytes(range(256)) * 2
        assert bench.request(IN, 0, room=2048, cuts=cuts) == (OK, expected)


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (IN, SECTORS, b"", 512, IOERR),
        (IN, SECTORS - 1, b"", 1024, IOERR),
        (IN, NO_SECTOR, b"", 512, IOERR),
        (IN, 1 << 55, b"", 512, IOERR),  # sector * 512 is 0 modulo 2^64
        (IN, 0, b"", 511, IOERR),
        (IN, 0, b"", 0, OK),
        (IN, SECTORS + 1, b"", 0, IOERR),
        (IN, 0, b"x" * 512, 512, IOERR),
        (OUT, SECTORS, b"x" * 512, 0, IOERR),
        (OUT, 1 << 55, b"x" * 512, 0, IOERR),
        (OUT, 0, b"x" * 100, 0, IOERR),
        (OUT, 0, b"", 512, IOERR),
        (GET_ID, 0, b"", 0, IOERR),
        (DISCARD, 0, b"", 0, IOERR),
        (DISCARD, 0, ranges((0, 8, 0))[:-1], 0, IOERR),
        (DISCARD, 0, ranges((0, 8, 1)), 0, UNSUPP),
        (DISCARD, 0, ranges((0, 8, 2)), 0, UNSUPP),
        (DISCARD, 0, ranges((SECTORS - 1, 2, 0)), 0, IOERR),
        (DISCARD, 0, ranges((NO_SECTOR, 2, 0)), 0, IOERR),
        (DISCARD, 0, ranges(*[(0, 1, 0)] * 17), 0, IOERR),
        (DISCARD, 0, ranges(*[(0, 1, 0)] * 16), 0, OK),
        (ZEROES, 0, ranges((0, 0xFFFFFFFF, 0)), 0, IOERR),
        (ZEROES, 0, ranges((0, 1, 0x80000000)), 0, UNSUPP),
        (ZEROES, 0, ranges((0, 1, 0), (SECTORS, 1, 0)), 0, IOERR),
        (2, 0, b"", 0, UNSUPP),
        (0x80000001, 0, b"", 512, UNSUPP),
        (0xFFFFFFFF, NO_SECTOR, b"x" * 700, 300, UNSUPP),
    ],
)  # fmt: skip
def test_each_lie_in_a_header_has_its_status(
    tmp_path: Path, kind: int, sector: int, data: bytes, room: int, status: int
) -> None:
    with block_bench(disk(tmp_path)) as bench:
        before = Path(bench.blk.image.path).read_bytes()
        answer = bench.request(kind, sector, data, room)
        assert answer == (status, bytes(room))  # what was not read is zeros, not what lay there
        if status != OK:
            assert Path(bench.blk.image.path).read_bytes() == before
        assert bench.request(IN, 0, room=512)[0] == OK and bench.lines == []


def test_a_header_that_is_cut_off_is_an_error_and_a_missing_status_needs_a_reset(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        head = bench.offer(header(IN)[:15], 513)
        bench.ring()
        assert bench.wait() == [(head, 513)] and bench.memory.read(DATA + 15 + 512, 1)[0] == IOERR
        bench.offer(header(FLUSH), 0)
        bench.ring()
        bench.wait_for_status(DEVICE_NEEDS_RESET)
        assert bench.driver.collect() == []
        bench.put(registers.STATUS, 0)
        bench.start()
        assert bench.request(IN, 0, room=512)[0] == OK


def test_a_broken_ring_needs_a_reset_and_gets_one(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        bench.driver.make_available(999)
        bench.ring()
        bench.wait_for_status(DEVICE_NEEDS_RESET)
        bench.put(registers.STATUS, 0)
        bench.start(F_VERSION_1)
        assert bench.request(IN, 0, room=512)[0] == OK


def test_the_serial_number(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path), serial="disk-of-20-characters"[:20]) as bench:
        assert bench.request(GET_ID, room=20) == (OK, b"disk-of-20-character")
        assert bench.request(GET_ID, room=5) == (OK, b"disk-")
        assert bench.request(GET_ID, room=32) == (OK, b"disk-of-20-character" + bytes(12))


def test_zeroes_and_discards(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        expected = bytearray(Path(bench.blk.image.path).read_bytes())
        for sector, count, flags in ((3, 1, 0), (8, 17, 1), (1000, 500, 0), (2047, 1, 1)):
            assert bench.request(ZEROES, 0, ranges((sector, count, flags)))[0] == OK
            expected[sector * 512 : (sector + count) * 512] = bytes(count * 512)
            assert Path(bench.blk.image.path).read_bytes() == expected
        allocated = os.stat(bench.blk.image.path).st_blocks
        assert bench.request(DISCARD, 0, ranges((0, 1024, 0), (1024, 1024, 0)))[0] == OK
        assert os.stat(bench.blk.image.path).st_blocks < allocated
        assert Path(bench.blk.image.path).read_bytes() == bytes(SECTORS * 512)


def test_features_not_negotiated_are_not_served(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path), start=False) as bench:
        bench.start(ALL & ~(blk.F_DISCARD | blk.F_WRITE_ZEROES))
        for kind in (DISCARD, ZEROES):
            assert bench.request(kind, 0, ranges((0, 8, 0)))[0] == UNSUPP


def test_a_read_only_disk_is_not_written(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path, read_only=True)) as bench:
        before = Path(bench.blk.image.path).read_bytes()
        assert bench.blk.features & blk.F_RO and not bench.blk.features & (blk.F_DISCARD | blk.F_WRITE_ZEROES)
        assert bench.request(OUT, 0, b"x" * 512)[0] == IOERR
        assert bench.request(DISCARD, 0, ranges((0, 8, 0)))[0] == UNSUPP
        assert bench.request(FLUSH)[0] == OK and bench.request(IN, 0, room=512) == (OK, before[:512])
        assert Path(bench.blk.image.path).read_bytes() == before


@pytest.mark.parametrize("event_idx", [0, F_EVENT_IDX])
def test_many_requests_in_flight(tmp_path: Path, event_idx: int) -> None:
    """A ring full of one-sector requests, several times round; each gets its own sector."""
    with block_bench(disk(tmp_path), start=False) as bench:
        driver = bench.start(ALL & ~F_EVENT_IDX | event_idx, size=64)
        content = Path(bench.blk.image.path).read_bytes()
        for turn in range(12):
            wanted: dict[int, tuple[int, int]] = {}
            before = driver.available_idx
            for i in range(21):  # three descriptors each
                sector = turn * 97 + i * 5
                at = DATA + i * 1024
                wanted[bench.offer(header(IN, sector), 513, (528,), at)] = (at + 16, sector)
            if driver.must_kick(before):
                bench.ring()
            for head, written in bench.wait(21):
                at, sector = wanted.pop(head)
                assert written == 513
                assert bench.memory.read(at, 513) == content[sector * 512 :][:512] + b"\0"


def test_a_truncated_image_is_an_error_told_once(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        os.truncate(bench.blk.image.path, 4096)
        for _ in range(3):
            assert bench.request(IN, 4, room=4096) == (IOERR, bytes(4096))
        assert bench.request(IN, 0, room=4096)[0] == OK
        assert len(bench.lines) == 1 and "reads fail: Input/output error" in bench.lines[0]
        assert bench.blk.statistics()["reads_failed"] == 3


def test_a_removed_image_goes_on(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        os.unlink(bench.blk.image.path)
        assert bench.request(OUT, 9, b"still" * 1024)[0] == OK
        assert bench.request(IN, 9, room=5120) == (OK, b"still" * 1024)


def test_the_driver_chooses_write_through(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        assert not bench.blk._native.write_through
        bench.bus.write(registers.CONFIG + blk.WRITEBACK_AT, 1, 0)
        assert bench.blk._native.write_through and bench.blk.configuration()[blk.WRITEBACK_AT] == 0
        assert bench.request(OUT, 0, b"x" * 512)[0] == OK
        bench.bus.write(registers.CONFIG, 4, 7)
        assert bench.blk.configuration()[:4] == SECTORS.to_bytes(4, "little")
        bench.put(registers.STATUS, 0)
        bench.start(ALL & ~blk.F_CONFIG_WCE)
        assert not bench.blk._native.write_through
        bench.put(registers.STATUS, 0)
        bench.start(ALL & ~(blk.F_CONFIG_WCE | blk.F_FLUSH))
        assert bench.blk._native.write_through  # no way to ask for a flush


def test_state_goes_to_a_disk_of_the_same_size_only(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        bench.bus.write(registers.CONFIG + blk.WRITEBACK_AT, 1, 0)
        assert bench.request(OUT, 5, b"s" * 512)[0] == OK
        bench.transport.pause()
        saved = bench.transport.save()
        bench.transport.reset()
        assert not bench.blk._native.write_through or bench.blk.state.writeback
        bench.transport.load(saved)
        bench.transport.resume()
        assert bench.blk._native.write_through
        assert bench.request(IN, 5, room=512) == (OK, b"s" * 512)
        for field, value in (("capacity", 1), ("read_only", True), ("writeback", 3)):
            with pytest.raises(SectionError, match=field):
                bench.transport.load({**saved, "device": {**saved["device"], field: value}})
        assert bench.request(IN, 5, room=512) == (OK, b"s" * 512)


def test_nothing_is_in_flight_while_paused(tmp_path: Path) -> None:
    with block_bench(disk(tmp_path)) as bench:
        for turn in range(30):
            heads = [bench.offer(header(OUT if i & 1 else IN, i) + b"x" * 512 * (i & 1), 513 - 512 * (i & 1),
                                 at=DATA + i * 2048) for i in range(20)]  # fmt: skip
            bench.ring()
            bench.transport.pause()
            assert bench.blk.queues[0].in_flight == 0
            early = bench.driver.collect()
            if turn == 7:
                bench.transport.load(bench.transport.save())
            assert bench.driver.collect() == []
            bench.transport.resume()
            assert sorted(head for head, _ in early + bench.wait(20 - len(early))) == sorted(heads)


def test_a_request_that_hangs_is_a_deadline_and_the_device_goes_on(tmp_path: Path) -> None:
    """A reset must not return while the host still writes to the driver's memory, nor wait for ever without a word."""
    untouched = DATA + 0x10000
    with block_bench(disk(tmp_path)) as bench:
        region = bench.memory.regions[1]
        bench.blk.io_deadline = 0.2
        bench.memory.write(DATA, header(IN))
        with stuck_memory(region.hva + untouched - region.gpa, 4096):
            stuck = bench.driver.offer(
                [Buffer(DATA, 16, False), Buffer(untouched, 512, True), Buffer(DATA + 16, 1, True)]
            )  # fmt: skip
            bench.ring()
            bench.wait_for_empty_ring()
            with pytest.raises(DeadlineError, match="did not end within"):
                bench.transport.pause()
            with pytest.raises(DeadlineError, match="did not end within"):
                bench.put(registers.STATUS, 0)
            assert bench.driver.collect() == []
        assert bench.wait() == [(stuck, 513)]
        bench.transport.pause()
        bench.transport.resume()
        bench.put(registers.STATUS, 0)
        bench.start()
        assert bench.request(IN, 1, room=512)[0] == OK


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 0xFFFFFFFF) | st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES]),
            st.integers(0, NO_SECTOR) | st.integers(0, SECTORS), st.binary(max_size=600), st.integers(0, 1100),
            st.lists(st.integers(1, 1700), max_size=5),
        ), max_size=8)
)  # fmt: skip
def test_no_request_touches_more_than_its_buffers(
    tmp_path: Path, requests: list[tuple[int, int, bytes, int, list[int]]]
) -> None:
    with block_bench(disk(tmp_path)) as bench:
        for kind, sector, data, room, cuts in requests:
            bench.memory.write(DATA, b"\x55" * 4096)
            status, _ = bench.request(kind, sector, data, room, tuple(cuts))
            assert status in (OK, IOERR, UNSUPP)
            end = DATA + 16 + len(data) + room + 1
            assert bench.memory.read(DATA, 16 + len(data)) == header(kind, sector) + data
            assert bench.memory.read(end, 512) == b"\x55" * 512
        assert os.path.getsize(bench.blk.image.path) == SECTORS * 512
        assert not bench.get(registers.STATUS) & DEVICE_NEEDS_RESET


def test_buffers_of_a_chain_may_be_many_and_scattered(tmp_path: Path) -> None:
    """More segments than one preadv takes."""
    with block_bench(disk(tmp_path), start=False) as bench:
        bench.start(size=256)
        content = Path(bench.blk.image.path).read_bytes()
        bench.memory.write(DATA, header(IN, 7))
        buffers = [Buffer(DATA, 16, False)]
        buffers += [Buffer(DATA + 0x1000 + 1000 * i, 512, True) for i in reversed(range(200))]
        buffers.append(Buffer(DATA + 0x800, 1, True))
        bench.driver.offer(buffers)
        bench.ring()
        assert bench.wait()[0][1] == 200 * 512 + 1
        got = b"".join(bench.memory.read(buffer.gpa, 512) for buffer in buffers[1:-1])
        assert got == content[7 * 512 : 207 * 512] and bench.memory.read(DATA + 0x800, 1) == b"\0"
