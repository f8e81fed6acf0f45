"""The filters of the proxy in chains of their own, and frames on the way between two of them."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ChannelError
from pyvmm.net.colo_compare import ColoCompare
from pyvmm.net.compare import CheckpointDue, CompareTunables, Mode, Reason
from pyvmm.net.filter import Direction, FilterChain, Frame
from pyvmm.net.frame_stream import LARGEST, EpochFrame, FrameDecoder, encode
from pyvmm.net.mirror import FilterMirror, FilterRedirector
from pyvmm.net.rewriter import FilterRewriter
from tests.unit.net.packets import ACK, SYN, Segment, udp

TX, RX = Direction.TX, Direction.RX
P, S, CLIENT = 5000, 0xFFFFFF00, 100


class Primary:
    """A chain with a mirror and a comparison: ``mirrored`` and ``due`` are what leaves it aside."""

    def __init__(self, tunables: CompareTunables | None = None) -> None:
        self.mirrored: list[Frame] = []
        self.due: list[CheckpointDue] = []
        self.now = 0
        self.chain = FilterChain(lambda: None)
        self.compare = ColoCompare(self.due.append, tunables, clock=lambda: self.now)
        self.chain.add(self.compare)
        self.chain.add(FilterMirror(lambda direction, frame: self.mirrored.append(frame)))

    def sends(self, frame: Frame) -> None:
        self.chain.enter(TX, frame)

    def out(self) -> list[Frame]:
        self.chain.settle()
        frames = list(self.chain.to_backend)
        self.chain.to_backend.clear()
        return frames


class Secondary:
    """A chain with a rewriter and a redirector."""

    def __init__(self) -> None:
        self.redirected: list[Frame] = []
        self.chain = FilterChain(lambda: None)
        self.rewriter = FilterRewriter()
        self.redirector = FilterRedirector(lambda direction, frame: self.redirected.append(frame))
        self.chain.add(self.rewriter)
        self.chain.add(self.redirector)

    def hears(self, frame: Frame) -> Frame:
        self.redirector.deliver(RX, frame)
        self.chain.settle()
        return self.chain.to_guest.popleft()

    def sends(self, frame: Frame) -> Frame:
        self.chain.enter(TX, frame)
        return self.redirected.pop()


def client(segment: Segment) -> Frame:
    return segment.but(source="10.0.0.2", destination="10.0.0.1", ports=(40000, 80)).frame()


def test_a_connection_through_both_chains_and_a_failover() -> None:
    ours, theirs = Primary(), Secondary()
    ours.compare.set_mode(Mode.HYBRID, 1)

    def both_hear(segment: Segment) -> Frame:
        ours.chain.enter(RX, client(segment))
        assert ours.chain.to_guest.popleft() == client(segment)
        return theirs.hears(ours.mirrored.pop())

    def both_send(mine: Segment, other: Segment) -> None:
        ours.sends(mine.frame())
        assert ours.out() == []
        ours.compare.secondary(theirs.sends(other.frame()), 1)
        assert ours.out() == [mine.frame()]

    both_hear(Segment(CLIENT, 0, SYN))
    both_send(Segment(P, CLIENT + 1, SYN | ACK), Segment(S, CLIENT + 1, SYN | ACK))
    assert both_hear(Segment(CLIENT + 1, P + 1, ACK, b"GET")) == client(Segment(CLIENT + 1, S + 1, ACK, b"GET"))
    both_send(Segment(P + 1, CLIENT + 4, ACK, b"answer"), Segment(S + 1, CLIENT + 4, ACK, b"answer"))
    assert ours.due == []
    theirs.chain.remove(theirs.redirector)
    theirs.chain.enter(RX, client(Segment(CLIENT + 4, P + 7)))
    assert theirs.chain.to_guest.popleft() == client(Segment(CLIENT + 4, S + 7))
    theirs.chain.enter(TX, Segment(S + 7, CLIENT + 4, ACK, b"the survivor's").frame())
    assert list(theirs.chain.to_backend) == [Segment(P + 7, CLIENT + 4, ACK, b"the survivor's").frame()]


def test_a_checkpoint_is_asked_for_once() -> None:
    primary = Primary()
    primary.compare.set_mode(Mode.HYBRID, 1)
    for each in (b"a", b"b", b"c"):
        primary.sends(udp(each, ports=(53, each[0])))
        primary.compare.secondary(udp(b"x", ports=(53, each[0])), 1)
    assert [each.reason for each in primary.due] == [Reason.PAYLOAD]
    primary.compare.begin_epoch(2)
    primary.compare.commit(2)
    assert primary.out() == [udp(each, ports=(53, each[0])) for each in (b"a", b"b", b"c")]
    primary.sends(udp(b"alone"))
    primary.now = 3000
    primary.compare.scan()
    assert [each.reason for each in primary.due] == [Reason.PAYLOAD, Reason.PRIMARY_ALONE]
    primary.compare.set_mode(Mode.PASS)
    assert primary.out() == [udp(b"alone")]
    primary.sends(udp(b"solo"))
    assert primary.out() == [udp(b"solo")]


def test_no_room_is_counted_and_asked_about() -> None:
    primary = Primary(CompareTunables(max_bytes=1 << 20))
    primary.compare.set_mode(Mode.HOLD, 1)
    for _ in range(20):
        primary.sends(udp(bytes(60000)))
    assert primary.compare.dropped == 3 and [each.reason for each in primary.due] == [Reason.PRIMARY_FULL]


def test_a_comparison_that_is_taken_away_holds_nothing_back() -> None:
    primary = Primary()
    primary.compare.set_mode(Mode.HYBRID, 1)
    primary.sends(udp(b"held"))
    primary.chain.remove(primary.compare)
    assert primary.out() == [udp(b"held")]


FRAMES = st.builds(Frame, st.binary(min_size=12, max_size=12), st.binary(min_size=14, max_size=200))


SENT = st.tuples(st.sampled_from([TX, RX]), st.integers(0, 3), FRAMES)


@given(st.lists(SENT, max_size=8), st.data())
def test_frames_arrive_whatever_the_pieces(sent: list[tuple[Direction, int, Frame]], data: st.DataObject) -> None:
    epoch, wire, expected = 2**63, b"", []
    for direction, step, frame in sent:
        epoch += step
        wire += encode(direction, epoch, frame)
        expected.append(EpochFrame(0, direction, epoch, frame))
    decoder, found = FrameDecoder(), []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        found += decoder.feed(wire[:size])
        wire = wire[size:]
    assert found == expected


@pytest.mark.parametrize(
    "wire",
    [
        struct.pack(">I", LARGEST + 1),
        struct.pack(">I", 8),
        struct.pack(">I", 9 + 12 + 13),
        struct.pack(">IBQ", 9, 2, 0),
        encode(TX, 5, udp(b"a")) + encode(RX, 4, udp(b"b")),
        struct.pack(">IBBQ", 10, 0, 0, 1),
    ],
)
def test_what_is_no_frame_ends_the_connection(wire: bytes) -> None:
    with pytest.raises(ChannelError):
        FrameDecoder().feed(wire)


@given(st.binary(max_size=400))
def test_no_bytes_do_more_than_that(wire: bytes) -> None:
    with contextlib.suppress(ChannelError):
        assert len(FrameDecoder().feed(wire)) <= len(wire) // 13
