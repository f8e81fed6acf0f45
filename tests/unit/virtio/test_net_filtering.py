"""A chain of filters in a running device: order, contents, and nothing lost while it changes."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from pyvmm.net.filter import Direction, Filter, Frame
from pyvmm.virtio import mmio_registers as registers
from tests.unit.virtio.fake_driver import Buffer
from tests.unit.virtio.net_card import Card, card, frame, until

BOTH = pytest.mark.parametrize("packets", [False, True], ids=["stream", "tap"])
TX, RX, ALL = Direction.TX, Direction.RX, Direction.ALL


class Count(Filter):
    """Passes everything and remembers it."""

    def __init__(self, direction: Direction = ALL) -> None:
        super().__init__("count", direction)
        self.seen: list[tuple[Direction, bytes]] = []
        self.threads: set[str] = set()

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        self.seen.append((direction, frame.data))
        self.threads.add(threading.current_thread().name)
        return frame


class DropOdd(Filter):
    """Drops every other frame."""

    def __init__(self) -> None:
        super().__init__("drop-odd")

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        return None if frame.data[3] & 1 else frame


class Grow(Filter):
    """Makes frames longer."""

    def __init__(self) -> None:
        super().__init__("grow")

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        return Frame(frame.header, frame.data + direction.value.encode())


class Delay(Filter):
    """Holds frames until told, from another thread."""

    def __init__(self) -> None:
        super().__init__("delay")
        self.held: list[tuple[Direction, Frame]] = []

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        self.held.append((direction, frame))
        return None

    def release(self) -> list[tuple[Direction, Frame]]:
        return self.held


def both_ways(c: Card, number: int) -> tuple[bytes, bytes]:
    """What arrives of frame ``number`` at the guest, and at the peer."""
    c.post(1)
    c.backend.send(frame(number))
    got = c.received()
    c.transmit(frame(number))
    assert got is not None
    sent = c.backend.receive()
    return got[1], sent[12:] if c.backend.carries_header else sent


@BOTH
def test_frames_see_python_only_while_there_is_a_filter(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        assert both_ways(c, 1) == (frame(1), frame(1))
        count = Count()
        c.device.filters.add(count)
        for number in range(2, 100):
            assert both_ways(c, number) == (frame(number), frame(number))
        c.device.filters.remove(count)
        assert both_ways(c, 100) == (frame(100), frame(100))
        assert count.seen == [(way, frame(number)) for number in range(2, 100) for way in (RX, TX)]
        assert count.threads == {"net pair"}
        # The peer has a frame a moment before it is counted.
        until(lambda: [c.device.statistics()[way] for way in ("rx_frames", "tx_frames")] == [100, 100], "the count")


@BOTH
def test_frames_are_dropped_and_changed(packets: bool) -> None:
    with card(packets=packets) as c:
        c.device.filters.add(DropOdd())
        c.device.filters.add(Grow())
        c.bring_up()
        c.post(3)
        for number in (1, 2, 3, 4):
            c.backend.send(frame(number))
            c.transmit(frame(number))
        for number in (2, 4):
            got = c.received()
            assert got is not None and got[1] == frame(number) + b"rx"
            assert c.backend.receive()[-62:] == frame(number) + b"tx"
        assert c.received(wait=False) is None


@BOTH
def test_held_frames_go_on_when_they_are_injected(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        c.post(2)
        delay = Delay()
        c.device.filters.add(delay)
        c.backend.send(frame(1))
        c.transmit(frame(2))
        until(lambda: len(delay.held) == 2, "the frames")
        assert c.received(wait=False) is None and c.backend.silent()
        for direction, held in delay.held:
            delay.inject(direction, held)
        got = c.received()
        assert got is not None and got[1] == frame(1)
        assert c.backend.receive()[-60:] == frame(2)


@BOTH
def test_filtered_frames_wait_for_buffers_too(packets: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        c.device.filters.add(Count())
        for number in range(20):
            c.backend.send(frame(number))
        time.sleep(0.05)
        used = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - used < 0.08, "waiting is not spinning"
        for number in range(20):
            c.post(1)
            got = c.received()
            assert got is not None and got[1] == frame(number)


@BOTH
def test_nothing_is_lost_or_overtaken_while_filters_come_and_go(packets: bool) -> None:
    """Also while the machine is paused and goes on, and while a filter that holds frames is taken out."""
    with card(packets=packets) as c:
        c.bring_up()
        frames, got, sent = 1200, [], []
        ended = threading.Event()

        def meddle() -> None:
            while not ended.is_set():
                for each in (Count(), Delay(), Count(RX), Count(TX)):
                    c.device.filters.add(each)
                    time.sleep(0.002)
                    c.transport.pause()
                    c.transport.resume()
                    c.device.filters.remove(each)
                    time.sleep(0.001)

        def peer() -> None:
            for number in range(frames):
                c.backend.send(frame(number))
                sent.append(c.backend.receive())

        threads = [threading.Thread(target=meddle), threading.Thread(target=peer)]
        for thread in threads:
            thread.start()
        try:
            for number in range(frames):
                c.post(1)
                c.transmit(frame(number))
                arrived = c.received()
                assert arrived is not None
                got.append(arrived[1])
        finally:
            ended.set()
            for thread in threads:
                thread.join(20)
        assert got == [frame(number) for number in range(frames)]
        assert [each[-60:] for each in sent] == got
        until(lambda: c.device.filters.idle, "the end")


def test_a_filter_that_fails_takes_the_card_down_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Filter):
        def handle(self, direction: Direction, frame: Frame) -> Frame | None:
            raise ZeroDivisionError

    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with card() as c:
        c.bring_up()
        c.device.filters.add(Fails("fails"))
        c.transmit(frame(1))
        until(lambda: bool(seen), "the exception")
        assert c.needs_reset and seen[0].exc_type is ZeroDivisionError
        c.put(registers.STATUS, 0)


# -- the link, pauses ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("filtered", [False, True])
def test_a_link_that_is_down_loses_frames_and_says_so(packets: bool, filtered: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        if filtered:
            c.device.filters.add(Count())
        c.post(2)
        c.signal.pulses()
        c.device.set_link(False)
        assert c.signal.pulses() == 1 and c.device.configuration()[6] == 0
        c.device.set_link(False)
        assert c.signal.pulses() == 0
        c.backend.send(frame(1))
        c.transmit(frame(1))
        until(lambda: c.device.statistics()["rx_link_down"] == c.device.statistics()["tx_link_down"] == 1, "the loss")
        c.device.set_link(True)
        assert c.device.configuration()[6] == 1
        assert both_ways(c, 2) == (frame(2), frame(2))


@BOTH
@pytest.mark.parametrize("filtered", [False, True])
def test_a_peer_that_hangs_up_is_a_link_that_is_down_for_good(packets: bool, filtered: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        if filtered:
            c.device.filters.add(Count())
        c.post(1)
        c.backend.peer.close()
        until(lambda: not c.device.link_up, "the loss")
        assert len(c.reports) == 1 and c.reports[0].startswith("pair: ")
        c.device.set_link(True)
        assert not c.device.link_up and c.device.configuration()[6] == 0
        before = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - before < 0.08, "waiting is not spinning"
        c.transmit(frame(1))
        until(lambda: c.device.statistics()["tx_link_down"] == 1, "the loss of a frame")
        assert not c.needs_reset


@pytest.mark.parametrize("length", [0, 65601, 0xFFFFFFFF])
def test_a_length_that_is_none_ends_the_link(length: int) -> None:
    with card() as c:
        c.bring_up()
        c.post(4)
        c.backend.send(frame(1))
        c.backend.peer.sendall(struct.pack(">I", length) + bytes(100))
        got = c.received()
        assert got is not None and got[1] == frame(1)
        until(lambda: bool(c.reports), "the report")
        assert c.reports == ["pair: the peer sent a length that no frame has: the guest's network link is down"]


def test_a_stream_in_small_pieces() -> None:
    with card() as c:
        c.bring_up()
        c.post(4)
        data = b"".join(struct.pack(">I", 60) + frame(number) for number in (1, 2))
        for at in range(len(data)):
            c.backend.peer.sendall(data[at : at + 1])
            if at % 16 == 0:
                time.sleep(0.001)
        for number in (1, 2):
            got = c.received()
            assert got is not None and got[1] == frame(number)


@BOTH
@pytest.mark.parametrize("filtered", [False, True])
def test_nothing_moves_in_a_pause_and_nothing_is_lost_after_it(packets: bool, filtered: bool) -> None:
    with card(packets=packets) as c:
        c.bring_up()
        if filtered:
            c.device.filters.add(Count())
        assert both_ways(c, 1) == (frame(1), frame(1))
        c.post(2)
        c.transport.pause()
        c.backend.send(frame(2))
        c.transmit(frame(2))
        time.sleep(0.05)
        assert c.received(wait=False) is None and c.backend.silent()
        assert not any(queue.in_flight for queue in c.device.queues)
        c.transport.save()
        c.transport.resume()
        got = c.received()
        assert got is not None and got[1] == frame(2)
        assert c.backend.receive()[-60:] == frame(2)


@BOTH
def test_what_came_before_the_driver_is_stale(packets: bool) -> None:
    with card(packets=packets) as c:
        c.backend.send(frame(1))
        c.bring_up()
        assert c.device.statistics()["rx_inactive"] == 1
        assert both_ways(c, 2) == (frame(2), frame(2))
        c.put(registers.STATUS, 0)
        c.backend.send(frame(3))
        c.bring_up()
        assert both_ways(c, 4) == (frame(4), frame(4))


@BOTH
def test_a_filtered_queue_full_of_nonsense_delays_frames_but_loses_none(packets: bool) -> None:
    """More of it than is looked at with the lock held once."""
    with card(packets=packets) as c:
        c.bring_up(size=256)
        c.device.filters.add(Count(TX))
        for _ in range(3):
            c.transport.pause()
            for _ in range(200):
                c.offer(1, [Buffer(0x300000, 3, False)])
            c.transmit(frame(7))
            c.transport.resume()
            assert c.backend.receive()[-60:] == frame(7)
            until(lambda: c.queues[1].collect() is not None and len(c.queues[1].free) == 256, "the chains")
        assert c.device.statistics()["tx_malformed"] == 600


def test_a_peer_that_hangs_up_on_a_filtered_card_is_told_of_once() -> None:
    with card() as c:
        c.bring_up()
        c.device.filters.add(Count())
        assert both_ways(c, 1) == (frame(1), frame(1))
        c.backend.peer.close()
        until(lambda: not c.device.link_up, "the link's end")
        time.sleep(0.05)
        assert len(c.reports) == 1
