"""Sequence numbers, timestamps and checksums of one guest made those of another."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import ChannelError
from pyvmm.net.filter import Direction, Frame
from pyvmm.net.rewriter import RECORD, Rewriter, RewriterTunables
from tests.unit.net.packets import (
    ACK,
    FIN,
    RST,
    SYN,
    Segment,
    ethernet,
    icmp,
    ipv4,
    ipv6,
    sack,
    timestamps,
)

TX, RX = Direction.TX, Direction.RX
P, S, CLIENT = 0xFFFFFF00, 0x300, 40_000
"""Initial sequence numbers; their difference wraps."""


class Guest:
    """A secondary's guest behind its rewriter, connected. It has TSval 500 where the primary has 9000."""

    def __init__(self, outbound: bool = False, tunables: RewriterTunables | None = None) -> None:
        self.rewriter = Rewriter(tunables)
        if outbound:
            assert self.sends(Segment(S, 0, SYN, options=timestamps(500, 0))).seq == S
            answer = self.hears(Segment(CLIENT, P + 1, SYN | ACK, options=timestamps(1, 9000)))
            assert (answer.seq, answer.ack, answer.options) == (CLIENT, S + 1, timestamps(1, 500))
        else:
            self.hears(Segment(CLIENT, 0, SYN, options=timestamps(1, 0)))
            syn = Segment(S, CLIENT + 1, SYN | ACK, options=timestamps(500, 1))
            assert self.sends(syn) == syn
            first = self.hears(Segment(CLIENT + 1, P + 1, ACK, options=timestamps(2, 9000)))
            assert (first.ack, first.options) == (S + 1, timestamps(2, 500))

    def sends(self, segment: Segment) -> Segment:
        return parse(self.rewriter.rewrite(TX, segment.frame(), 0), segment)

    def hears(self, segment: Segment) -> Segment:
        frame = segment.but(ports=(40000, 80), source="10.0.0.2", destination="10.0.0.1").frame()
        return parse(self.rewriter.rewrite(RX, frame, 0), segment)


def parse(frame: Frame, like: Segment) -> Segment:
    """Back to a segment; what it was made of must be a frame again, so its checksum is right."""
    tcp = frame.data[34:]
    seq, ack, offset = struct.unpack(">4xIIH", tcp[:14])
    size = (offset >> 12) * 4
    found = like.but(seq=seq, ack=ack, options=tcp[20 : 20 + len(like.options)])
    source = Segment(seq, ack, offset & 0x1FF, tcp[size:], tcp[20:size], like.window, like.urgent)
    if frame.data[26:30] == bytes([10, 0, 0, 2]):
        source = source.but(ports=(40000, 80), source="10.0.0.2", destination="10.0.0.1")
    assert source.frame().data == frame.data
    return found


@pytest.mark.parametrize("outbound", [True, False])
def test_a_connection_from_its_beginning_to_its_end(outbound: bool) -> None:
    guest = Guest(outbound)
    sent = guest.sends(Segment(S + 1, CLIENT + 1, ACK, b"hello", timestamps(600, 2)))
    assert (sent.seq, sent.ack, sent.options) == (P + 1, CLIENT + 1, timestamps(9100, 2))
    heard = guest.hears(Segment(CLIENT + 1, P + 6, ACK, b"hi", timestamps(3, 9100)))
    assert (heard.seq, heard.ack, heard.options) == (CLIENT + 1, S + 6, timestamps(3, 600))
    far = guest.sends(Segment(S + 0x200, CLIENT + 3, ACK | FIN))
    assert far.seq == (P + 0x200) & 0xFFFFFFFF
    assert guest.hears(Segment(CLIENT + 3, P + 0x201, ACK | FIN)).ack == S + 0x201
    assert guest.sends(Segment(S + 0x201, CLIENT + 4, ACK)).seq == (P + 0x201) & 0xFFFFFFFF


def test_selective_acknowledgments_of_the_clients_are_shifted_and_the_guests_are_not() -> None:
    guest = Guest()
    heard = guest.hears(Segment(CLIENT + 1, P + 1, options=b"\x01" + sack((P + 10, P + 20), (P + 0x1000, P + 0x1001))))
    assert heard.ack == S + 1 and heard.options == b"\x01" + sack((S + 10, S + 20), (S + 0x1000, S + 0x1001))
    ours = sack((CLIENT + 9, CLIENT + 12))
    assert guest.sends(Segment(S + 1, CLIENT + 1, options=ours)).options == ours


def test_nothing_is_changed_before_the_number_is_known() -> None:
    rewriter = Rewriter()
    for segment in (Segment(S, CLIENT + 1, SYN | ACK), Segment(S, CLIENT + 1, SYN | ACK)):
        assert rewriter.rewrite(TX, segment.frame(), 0) == segment.frame()
    stranger = Segment(5, 6, ACK, b"of another", ports=(81, 40000)).frame()
    assert rewriter.rewrite(TX, stranger, 0) == stranger and rewriter.counters()["connections"] == 1


def test_a_syn_sent_again_has_the_primarys_number_once_it_is_known() -> None:
    guest = Guest()
    assert guest.sends(Segment(S, CLIENT + 1, SYN | ACK)).seq == P


def test_after_a_checkpoint_there_are_no_offsets() -> None:
    guest = Guest()
    guest.rewriter.checkpoint(0)
    same = Segment(P + 1, CLIENT + 1, ACK, b"x", timestamps(9200, 1))
    assert guest.sends(same) == same
    answer = Segment(CLIENT + 1, P + 2, ACK, b"", timestamps(5, 9200))
    assert guest.hears(answer) == answer
    again = Segment(P, CLIENT + 1, SYN | ACK, options=timestamps(9300, 1))
    assert guest.sends(again) == again, "in SYN-RECEIVED, with the primary's number"
    assert guest.hears(Segment(CLIENT + 1, P + 1, options=timestamps(6, 9200))).options == timestamps(6, 9200)
    assert guest.sends(same) == same


def test_a_new_connection_of_the_same_addresses_learns_anew() -> None:
    guest = Guest()
    assert guest.sends(Segment(7000, CLIENT + 1, SYN | ACK)).seq == 7000
    assert guest.hears(Segment(CLIENT + 1, 100_001)).ack == 7001
    assert guest.sends(Segment(7001, CLIENT + 1)).seq == 100_001
    assert guest.sends(Segment(7002, 0, RST)).seq == 100_002


def test_timestamps_never_go_back_behind_what_a_client_has_seen() -> None:
    guest = Guest()
    guest.hears(Segment(CLIENT + 1, P + 1, options=timestamps(3, 9400)))
    assert guest.sends(Segment(S + 1, CLIENT + 1, options=timestamps(700, 3))).options == timestamps(9400, 3)
    assert guest.sends(Segment(S + 1, CLIENT + 1, options=timestamps(750, 3))).options == timestamps(9450, 3)
    assert guest.sends(Segment(S + 1, CLIENT + 1, options=timestamps(750, 3))).options == timestamps(9450, 3)
    assert guest.hears(Segment(CLIENT + 1, P + 1, options=timestamps(4, 9450))).options == timestamps(4, 750)
    guest.hears(Segment(CLIENT + 1, P + 1, options=timestamps(4, 9450 + 1_000_000)))
    assert guest.sends(Segment(S + 1, CLIENT + 1, options=timestamps(760, 3))).options == timestamps(9460, 3), "absurd"


def test_timestamps_of_connections_without_an_offset_do_not_either() -> None:
    rewriter = Rewriter()
    guest = Guest.__new__(Guest)
    guest.rewriter = rewriter
    guest.sends(Segment(1, 1, options=timestamps(100, 0)))
    guest.hears(Segment(1, 2, options=timestamps(1, 150)))
    assert guest.sends(Segment(1, 1, options=timestamps(120, 1))).options == timestamps(150, 1)


def test_a_partial_checksum_is_left_alone() -> None:
    guest = Guest()
    tcp = bytearray(Segment(S + 1, CLIENT + 1, ACK, b"offload").tcp())
    tcp[16:18] = b"\x12\x34"
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)
    frame = guest.rewriter.rewrite(TX, Frame(header, ethernet(0x0800, ipv4("10.0.0.1", "10.0.0.2", 6, bytes(tcp)))), 0)
    assert frame.header == header and frame.data[34 + 4 : 34 + 8] == struct.pack(">I", P + 1)
    assert frame.data[34 + 16 : 34 + 18] == b"\x12\x34"
    elsewhere = struct.pack("<BBHHHHH", 1, 0, 0, 0, 14, 16, 0)
    frame = guest.rewriter.rewrite(TX, Frame(elsewhere, Segment(S + 1, CLIENT + 1).frame().data), 0)
    assert frame.data == Segment(P + 1, CLIENT + 1).frame().data, "the sum meant is not this one"


def test_data_on_a_syn_and_signed_segments_are_left_alone() -> None:
    for syn in (Segment(S, 0, SYN, b"early"), Segment(S, 0, SYN, options=bytes([19, 18]) + bytes(16))):
        guest = Guest.__new__(Guest)
        guest.rewriter = Rewriter()
        guest.sends(syn)
        assert guest.hears(Segment(CLIENT, P + 1, SYN | ACK)).ack == P + 1
        assert guest.sends(Segment(S + 1, CLIENT + 1)).seq == S + 1
        assert guest.rewriter.counters()["opaque"] == 1


@pytest.mark.parametrize("six", [False, True])
def test_a_segment_quoted_by_an_error_is_the_guests_own(six: bool) -> None:
    source, destination = ("fd00::1", "fd00::2") if six else ("10.0.0.1", "10.0.0.2")
    rewriter = Rewriter()
    rewriter.rewrite(TX, Segment(S, 0, SYN, source=source, destination=destination).frame(), 0)
    ends = {"source": destination, "destination": source, "ports": (40000, 80)}
    rewriter.rewrite(RX, Segment(CLIENT, P + 1, SYN | ACK).but(**ends).frame(), 0)

    def error(seq: int) -> Frame:
        tcp = Segment(seq, CLIENT + 1, source=source, destination=destination).tcp()[:8]
        packet = ipv6(source, destination, 6, tcp) if six else ipv4(source, destination, 6, tcp)
        kind = b"\x02\x00" if six else b"\x03\x04"
        return icmp(kind + bytes(4) + b"\x05\xdc" + packet, "fd00::9" if six else "10.0.0.9", source)

    assert rewriter.rewrite(RX, error(P + 5), 0).data == error(S + 5).data
    assert rewriter.counters()["quoted"] == 1


def test_connections_do_not_leak_into_each_other() -> None:
    guest = Guest()
    for other in ({"ports": (80, 40001)}, {"vlan": (3,)}, {"destination": "10.0.0.3"}, {"ports": (40000, 80)}):
        segment = Segment(S + 1, CLIENT + 1).but(**other)
        assert guest.rewriter.rewrite(TX, segment.frame(), 0) == segment.frame()


def test_the_table_has_a_limit_and_no_live_connection_goes_for_a_new_one() -> None:
    guest = Guest(tunables=RewriterTunables(max_connections=4))
    for port in range(1, 10):
        guest.rewriter.rewrite(TX, Segment(port, CLIENT + 1, SYN | ACK, ports=(80, port)).frame(), 0)
    counters = guest.rewriter.counters()
    assert (counters["connections"], counters["forgotten"], counters["refused"]) == (4, 6, 0)
    assert guest.sends(Segment(S + 1, CLIENT + 1)).seq == P + 1
    guest.rewriter.scan(120_001)
    assert guest.rewriter.counters()["connections"] == 1
    guest.rewriter.scan(6 * 24 * 3_600_000)
    assert guest.rewriter.counters()["connections"] == 0


def test_what_a_client_sends_makes_no_entry() -> None:
    rewriter = Rewriter()
    for flags in (SYN, ACK, RST, SYN | ACK):
        rewriter.rewrite(RX, Segment(1, 1, flags, options=timestamps(1, 1)).frame(), 0)
    assert rewriter.counters()["connections"] == 0


def test_the_next_secondary_goes_on_with_what_the_survivor_rewrites() -> None:
    survivor = Guest()
    records = survivor.rewriter.records()
    assert len(records) == RECORD
    heir = Guest.__new__(Guest)
    heir.rewriter = Rewriter()
    heir.rewriter.checkpoint(0, records)
    for each in (survivor, heir):
        sent = each.sends(Segment(S + 1, CLIENT + 1, options=timestamps(600, 2)))
        assert (sent.seq, sent.options) == (P + 1, timestamps(9100, 2))
        assert each.hears(Segment(CLIENT + 1, P + 1)).ack == S + 1
    with pytest.raises(ChannelError):
        heir.rewriter.checkpoint(0, records + b"x")


NUMBERS = st.integers(0, 2**32 - 1)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.binary(max_size=40), st.integers(0, 3), st.booleans(), st.integers(1, 3))
def test_checksums_stay_right_and_there_and_back_is_the_identity(
    ours: int, theirs: int, client: int, at: int, payload: bytes, padding: int, six: bool, blocks: int
) -> None:
    ends = {"source": "fd00::1", "destination": "fd00::2"} if six else {}
    back = {"source": "fd00::2", "destination": "fd00::1"} if six else {"source": "10.0.0.2", "destination": "10.0.0.1"}
    rewriter = Rewriter()
    rewriter.rewrite(TX, Segment(ours, client, SYN | ACK, options=timestamps(at, 0)).but(**ends).frame(), 0)

    def from_client(number: Callable[[int], int]) -> Frame:
        options = b"\x01" * padding + sack(*((number(n), number(n + 3)) for n in range(blocks)))
        return Segment(client, number(1), ACK, payload, options, ports=(40000, 80)).but(**back).frame()

    assert rewriter.rewrite(RX, from_client(lambda n: theirs + n), 0) == from_client(lambda n: ours + n)
    sent = Segment(ours + at, client, ACK, payload, b"\x01" * padding).but(**ends)
    assert rewriter.rewrite(TX, sent.frame(), 0) == sent.but(seq=theirs + at).frame()
