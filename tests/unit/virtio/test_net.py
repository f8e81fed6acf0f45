"""virtio-net: real pump, real descriptors, a driver and a peer in Python."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.net.announcement import self_announcement
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio import net_features as features
from pyvmm.virtio.device import F_VERSION_1
from pyvmm.virtio.queue import F_EVENT_IDX
from tests.unit.virtio.fake_driver import Buffer
from tests.unit.virtio.net_card import ANY, BUFFERS, EVERYTHING, MAC, Card, card, frame, until

BOTH = pytest.mark.parametrize("packets", [False, True], ids=["stream", "tap"])
PLAIN = F_VERSION_1
NEEDS_CSUM, TCPV4, UDP = 1, 1, 3


def header(flags: int = 0, gso: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, gso_size, start, offset, 0)


def settled(c: Card) -> dict[str, int]:
    """The counters once the driver's transmit queue is empty."""
    until(lambda: not c.queues[1].collect() and len(c.queues[1].free) == c.queues[1].size, "the end of transmission")
    return c.device.statistics()


# -- frames -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("negotiated", [PLAIN, ANY, ANY & ~F_EVENT_IDX], ids=["plain", "any", "flags"])
def test_frames_arrive_whole_and_in_order_both_ways(packets: bool, negotiated: int) -> None:
    with card(packets=packets) as c:
        c.bring_up(negotiated)
        lead = bytes(12) if packets else b""
        for number in range(300):
            c.post(1)
            sent = frame(number, 14 + number * 4 % 1500)
            c.backend.send(sent)
            got = c.received()
            assert got is not None and got[1:] == (sent, 1)
            c.transmit(sent)
            assert c.backend.receive() == lead + sent
        counters = settled(c)  # the peer has a frame a moment before it is counted
        assert counters["rx_frames"] == counters["tx_frames"] == 300
        assert sum(counters.values()) == 600 + counters["rx_bytes"] + counters["tx_bytes"]  # nothing was dropped


@BOTH
def test_bursts_arrive_in_order(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        for number in range(200):
            c.backend.send(frame(number))
        for number in range(200):  # they wait in the backend while there are no buffers
            c.post(1)
            got = c.received()
            assert got is not None and got[1] == frame(number)
        for number in range(200):
            c.transmit(frame(number))
        for number in range(200):
            assert c.backend.receive()[-60:] == frame(number)


@BOTH
def test_frames_wait_for_buffers_and_the_driver_is_asked_to_ring(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        c.backend.send(frame(1))
        time.sleep(0.05)
        before = time.thread_time()
        assert c.received(wait=False) is None
        c.post(1)
        got = c.received()
        assert got is not None and got[1] == frame(1)
        assert time.thread_time() - before < 5


@BOTH
def test_a_large_frame_is_spread_over_buffers_and_small_ones_after_it_are_not(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        for number, size in enumerate([60, 1514, 1515, 9000, 65000, 60, 30000]):
            c.post(len(c.queues[0].free))
            c.backend.send(frame(number, size))
            got = c.received()
            assert got is not None
            assert got[1:] == (frame(number, size), -(-(size + 12) // 1526))


@BOTH
def test_a_frame_that_needs_more_buffers_than_there_are_waits_for_them(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        c.post(2, 1000)
        c.memory.clean()
        before = c.memory.snapshot()
        c.backend.send(frame(7, 3000))
        c.backend.send(frame(8))
        time.sleep(0.05)
        used = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - used < 0.08, "waiting is not spinning"
        assert c.received(wait=False) is None
        c.memory.changes(before)  # what was tried out is marked, too
        c.post(2, 1000)
        got = c.received()
        assert got is not None and got[1:] == (frame(7, 3000), 4)
        c.post(1)
        got = c.received()
        assert got is not None and got[1] == frame(8)


@BOTH
def test_frames_too_large_for_any_buffers_are_dropped(packets: bool) -> None:
    """Without MRG_RXBUF a frame must fit one buffer; with it, all the queue could hold."""
    with card(packets=packets) as c:
        c.bring_up(PLAIN)
        c.post(2)
        c.backend.send(frame(1, 1515))
        c.backend.send(frame(2, 1514))
        got = c.received()
        assert got is not None and got[1:] == (frame(2, 1514), 1)
        assert c.device.statistics()["rx_oversized"] == 1
        c.bring_up(ANY, size=4)
        c.post(4)
        c.backend.send(frame(3, 4 * 1526))
        c.backend.send(frame(4))
        got = c.received()
        assert got is not None and got[1] == frame(4)
        assert c.device.statistics()["rx_oversized"] == 2


def test_the_mtu_bounds_frames_but_not_segments() -> None:
    with card(packets=True, mtu=1500) as c:
        c.bring_up(EVERYTHING | features.F_MTU)
        assert struct.unpack_from("<H", c.device.configuration(), 10)[0] == 1500
        c.post(64)
        c.backend.send(frame(1, 1530))
        c.backend.send(frame(2, 1530), header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16))
        got = c.received()
        assert got is not None and got[1] == frame(2, 1530)
        assert c.device.statistics()["rx_oversized"] == 1


def test_runts_are_dropped() -> None:
    with card() as c:
        c.bring_up()
        c.post(1)
        c.backend.send(bytes(13))
        c.backend.send(frame(1, 14))
        got = c.received()
        assert got is not None and got[1] == frame(1, 14)
        assert c.device.statistics()["rx_undersized"] == 1


@BOTH
@given(st.lists(st.integers(1, 1511), max_size=6, unique=True).map(sorted), st.integers(14, 1500))
@settings(max_examples=40, deadline=None)
def test_however_a_chain_is_cut_the_frame_is_the_same(packets: bool, cuts: list[int], size: int) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        c.transmit(frame(3, size), cuts=tuple(cut for cut in cuts if cut < size + 12))
        assert c.backend.receive()[-size:] == frame(3, size)


@BOTH
def test_a_chain_of_more_pieces_than_writev_takes(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        data = bytes(12) + frame(5, 1488)
        c.memory.memory.write(0x80000, data)
        table = 0x90000
        pieces = [Buffer(0x80000 + at, 1, False) for at in range(len(data))]
        driver = c.queues[1]
        driver.offer([*pieces[:1024], Buffer(0x80000 + 1024, len(data) - 1024, False)], indirect_table=table)
        c.ring(1)
        # One more than a table may have: refused like any chain that is too long.
        until(lambda: c.needs_reset, "DEVICE_NEEDS_RESET")
        c.bring_up()
        c.queues[1].offer([*pieces[:1023], Buffer(0x80000 + 1023, len(data) - 1023, False)], indirect_table=table)
        c.ring(1)
        assert c.backend.receive()[-1488:] == frame(5, 1488)


def test_a_peer_that_does_not_read_stops_the_sender_but_loses_nothing() -> None:
    with card() as c:
        c.bring_up()
        c.backend.narrow()
        sent, large = 32, 60000
        for number in range(sent):
            at = 0x200000 + number * 0xF000
            c.memory.memory.write(at, bytes(12) + frame(number, large))
            c.offer(1, [Buffer(at, 12 + large, False)])
        time.sleep(0.05)
        c.queues[1].collect()
        assert len(c.queues[1].free) < 64, "the socket took everything: no back-pressure was there"
        for number in range(sent):
            assert c.backend.receive() == frame(number, large)
        assert settled(c)["tx_frames"] == sent


# -- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_header", "size", "seen"),
    [
        (header(), 60, header()),
        (header(flags=0xFE), 60, header()),  # bits that the device ignores
        (header(hdr_len=7, gso_size=7, start=7, offset=7), 60, header()),
        (header(NEEDS_CSUM, start=34, offset=16), 60, header(NEEDS_CSUM, start=34, offset=16)),
        (header(NEEDS_CSUM, start=34, offset=24), 60, header(NEEDS_CSUM, start=34, offset=24)),
        (header(NEEDS_CSUM, start=34, offset=25), 60, None),
        (header(NEEDS_CSUM, start=13, offset=16), 60, None),
        (header(NEEDS_CSUM, start=0xFFFF, offset=0xFFFF), 60, None),
        (header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16), 3000, header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16)),
        (header(NEEDS_CSUM, TCPV4, 9999, 1448, 34, 16), 3000, header(NEEDS_CSUM, TCPV4, 3000, 1448, 34, 16)),
        (header(NEEDS_CSUM, TCPV4, 54, 0, 34, 16), 3000, None),
        (header(0, TCPV4, 54, 1448, 34, 16), 3000, None),
        (header(NEEDS_CSUM, TCPV4, 54, 1448, 34, 16), 53, None),
        (header(NEEDS_CSUM, TCPV4 | 0x80, 54, 1448, 34, 16), 3000, None),  # ECN was not offered
        (header(NEEDS_CSUM, UDP, 42, 1448, 34, 6), 3000, None),
        (header(NEEDS_CSUM, 0x7F, 42, 1448, 34, 6), 3000, None),
    ],
)
def test_headers_are_checked_before_the_host_sees_them(given_header: bytes, size: int, seen: bytes | None) -> None:
    with card(packets=True) as c:
        c.bring_up(EVERYTHING)
        c.transmit(frame(1, size), given_header)
        c.transmit(frame(2))
        if seen is not None:
            assert c.backend.receive() == seen + frame(1, size)
        assert c.backend.receive() == header() + frame(2)
        assert settled(c)["tx_malformed"] == (seen is None)


@pytest.mark.parametrize("given_header", [header(NEEDS_CSUM, start=34, offset=16), header(1, TCPV4, 54, 1448, 34, 16)])
def test_offloads_that_were_not_negotiated_are_malformed(given_header: bytes) -> None:
    with card(packets=True) as c:
        c.bring_up(ANY)
        c.transmit(frame(1), given_header)
        assert settled(c)["tx_malformed"] == 1 and c.backend.silent()


@BOTH
@pytest.mark.parametrize("size", [0, 1, 12, 25, 65613, 200_000])
def test_chains_that_are_no_frame_are_dropped(packets: bool, size: int) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        c.offer(1, [Buffer(0x200000, size, False)])
        assert settled(c)["tx_malformed"] == 1
        c.transmit(frame(2))
        assert c.backend.receive()[-60:] == frame(2)


def test_without_guest_csum_the_driver_sees_no_flags() -> None:
    with card(packets=True) as c:
        for negotiated, seen in ((ANY, 0), (EVERYTHING, 2)):
            c.bring_up(negotiated)
            c.post(1)
            c.backend.send(frame(1), header(flags=2))  # DATA_VALID
            got = c.received()
            assert got is not None and got[0][0] == seen


# -- hostile rings ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("queue", [0, 1])
@pytest.mark.parametrize("buffer", [Buffer(1 << 40, 2000, True), Buffer(0x200000, 8, True), Buffer(0x200000, 0, True)])
def test_a_broken_buffer_needs_a_reset_and_a_reset_mends_it(packets: bool, queue: int, buffer: Buffer) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        if queue == 1 and buffer.gpa < 1 << 40:
            buffer = Buffer(1 << 40, 100, False)
        c.offer(queue, [buffer])
        c.backend.send(frame(1))
        until(lambda: c.needs_reset, "DEVICE_NEEDS_RESET")
        assert c.signal.pulses()
        c.bring_up()
        c.post(1)
        c.transmit(frame(2))
        assert c.backend.receive()[-60:] == frame(2)
        c.backend.send(frame(3))
        got = c.received()
        assert got is not None and got[1] == frame(3)


def test_what_was_read_into_good_buffers_is_marked_when_the_next_one_is_broken() -> None:
    with card(packets=True) as c:
        c.bring_up()
        c.post(1, 1000)
        c.offer(0, [Buffer(0x201000, 2000, False)])
        c.memory.clean()
        before = c.memory.snapshot()
        c.backend.send(frame(1, 3000))
        until(lambda: c.needs_reset, "DEVICE_NEEDS_RESET")
        assert any(BUFFERS <= gpa < BUFFERS + 1000 for gpa in c.memory.changes(before))


def test_receive_buffers_that_may_be_read_need_a_reset() -> None:
    with card() as c:
        c.bring_up()
        c.offer(0, [Buffer(0x200000, 100, False), Buffer(0x201000, 2000, True)])
        c.backend.send(frame(1))
        until(lambda: c.needs_reset, "DEVICE_NEEDS_RESET")


def test_queues_that_are_not_set_up_are_left_alone() -> None:
    with card() as c:
        c.bring_up()
        for index in (0, 1):
            c.put(registers.QUEUE_SEL, index)
            c.put(registers.QUEUE_READY, 0)
        c.backend.send(frame(1))
        c.ring(0)
        c.ring(1)
        time.sleep(0.05)
        assert not c.needs_reset


@BOTH
def test_a_peer_that_hung_up_before_the_driver_came_is_told_of(packets: bool) -> None:
    """Frames from before are thrown away then; that there is nobody any more must not go with them."""
    with card(packets=packets) as c:
        c.backend.send(frame(1))
        c.backend.peer.close()
        c.bring_up()
        until(lambda: not c.device.link_up, "the link's end")
        assert not c.get(registers.CONFIG + 4) & 0x10000  # status, behind the last two bytes of the MAC
        assert len(c.reports) == 1 and "link is down" in c.reports[0]
        assert c.device.statistics()["rx_inactive"] == 1


# -- moving -------------------------------------------------------------------------------------


@BOTH
def test_a_guest_that_has_moved_is_announced_by_the_host(packets: bool) -> None:
    """Whatever its driver can, behind all filters, in order with its own frames."""
    with card(packets=packets) as c:
        c.device.moved()  # no driver yet: there is nobody to be found
        c.bring_up(PLAIN)
        lead = bytes(12) if packets else b""
        for number in range(20):
            c.transmit(frame(number))
            assert c.backend.receive() == lead + frame(number)
            c.device.moved()
            assert c.backend.receive() == lead + self_announcement(MAC)
        until(lambda: c.device.filters.idle, "the native path again")


def test_the_backend_learns_where_the_guest_is() -> None:
    with card(packets=True) as c:
        c.bring_up(PLAIN)
        c.device.left()
        assert c.backend.released
        c.device.arriving()
        assert not c.backend.released
        assert c.backend.announced == [self_announcement(MAC)]
