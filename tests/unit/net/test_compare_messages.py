"""What has no stream: UDP, ICMP, ARP, neighbour discovery, extension headers, fragments, what nobody knows."""

from __future__ import annotations

import struct

import pytest

from pyvmm.errors import ChannelError, ConfigError, StateError
from pyvmm.net.compare import Compare, CompareTunables, Mode, Policy, Reason
from pyvmm.net.filter import Frame
from tests.unit.net.packets import FRAGMENT, NO_HEADER, TCP, UDP, Segment, arp, ethernet, icmp, ipv4, ipv6, udp

SIX = ("fd00::1", "fd00::2")


def compare(**tunables: object) -> Compare:
    made = Compare(CompareTunables(**tunables))  # type: ignore[arg-type]
    made.set_mode(Mode.HYBRID, 1, 0)
    return made


def why(pair: Compare) -> Reason | None:
    due = pair.checkpoint_due
    return due.reason if due else None


def meet(primary: Frame, secondary: Frame) -> Reason | None:
    """Both send one; it is released exactly if there is no reason for a checkpoint."""
    pair = compare()
    pair.primary(primary, 0)
    assert pair.release() == []
    pair.secondary(secondary, 1, 0)
    assert pair.release() == ([] if why(pair) else [primary])
    return why(pair)


def four(body: bytes, protocol: int = UDP, **how: object) -> Frame:
    return Frame(NO_HEADER, ethernet(0x0800, ipv4("10.0.0.1", "10.0.0.2", protocol, body, **how)))  # type: ignore[arg-type]


def six(body: bytes, protocol: int = UDP, **how: object) -> Frame:
    return Frame(NO_HEADER, ethernet(0x86DD, ipv6(*SIX, protocol, body, **how)))  # type: ignore[arg-type]


def echo(text: bytes) -> bytes:
    return struct.pack(">BBHHH", 0, 0, 0, 5, 1) + text


def six_fragment(identification: int, offset: int, more: bool, body: bytes, protocol: int = UDP) -> Frame:
    header = struct.pack(">BBHI", protocol, 0, offset | more, identification)
    return six(body, protocol, extensions=header, first=FRAGMENT)


@pytest.mark.parametrize(
    ("primary", "secondary", "reason"),
    [
        (udp(b"same"), udp(b"same"), None),
        (udp(b"same"), udp(b"some"), Reason.PAYLOAD),
        (udp(b"same"), udp(b"same and more"), Reason.LENGTH),
        (udp(b""), udp(b""), None),
        (udp(b"x", *SIX), udp(b"x", *SIX), None),
        (udp(b"x", *SIX), udp(b"y", *SIX), Reason.PAYLOAD),
        (udp(b"x", vlan=(1, 2)), udp(b"x", vlan=(1, 2)), None),
        (icmp(echo(b"ping")), icmp(echo(b"ping")), None),
        (icmp(echo(b"ping")), icmp(echo(b"pong")), Reason.PAYLOAD),
        (icmp(b"\x81" + echo(b"ping")[1:], *SIX), icmp(b"\x81" + echo(b"ping")[1:], *SIX), None),
        (icmp(b"\x88" + bytes(7) + b"target 1" * 2, *SIX), icmp(b"\x88" + bytes(7) + b"target 2" * 2, *SIX),
         Reason.PAYLOAD),
        (arp("10.0.0.7"), arp("10.0.0.7", padding=b"whatever"), None),
        (arp("10.0.0.7"), arp("10.0.0.8"), Reason.PAYLOAD),
        (four(b"sctp?", 132), four(b"sctp?", 132), None),
        (four(b"sctp?", 132), four(b"sctp!", 132), Reason.PAYLOAD),
        (four(b"short", TCP), four(b"short", TCP), None),
        (four(bytes(12), identification=1), four(bytes(12), identification=9), None),
        (four(b"x" * 8, 132, ttl=64), four(b"x" * 8, 132, ttl=63), Reason.HEADER),
        (four(b"x" * 8, 132, tos=0x10), four(b"x" * 8, 132, tos=0x11), None),
        (four(b"x" * 8, 132, tos=0x10), four(b"x" * 8, 132, tos=0x20), Reason.HEADER),
        (four(b"x" * 8, 132, options=b"\x07\x07\x04AAA\0\0"), four(b"x" * 8, 132, options=b"\x07\x07\x04BBB\0\0"),
         Reason.HEADER),
        (six(b"x" * 8, 132, extensions=bytes([132, 0, 1, 4, 0, 0, 0, 0]), first=60),
         six(b"x" * 8, 132, extensions=bytes([132, 0, 1, 4, 0, 0, 0, 1]), first=60), Reason.HEADER),
        (Frame(NO_HEADER, ethernet(0x88B5, b"loop")), Frame(NO_HEADER, ethernet(0x88B5, b"loop")), None),
        (Frame(NO_HEADER, ethernet(0x88B5, b"loop")), Frame(NO_HEADER, ethernet(0x88B5, b"lisp")), Reason.PAYLOAD),
        (Frame(NO_HEADER, ethernet(0x0800, b"\x45")), Frame(NO_HEADER, ethernet(0x0800, b"\x45")), None),
        (Frame(NO_HEADER, ethernet(0x0800, b"\x45")), Frame(NO_HEADER, ethernet(0x0800, b"\x46")), Reason.PAYLOAD),
    ],
)  # fmt: skip
def test_messages(primary: Frame, secondary: Frame, reason: Reason | None) -> None:
    assert meet(primary, secondary) is reason


def test_tcp_behind_extension_headers_is_tcp() -> None:
    segment = Segment(1, 1, payload=b"hello", source=SIX[0], destination=SIX[1])
    hops = bytes([60, 0, 1, 4, 0, 0, 0, 0]) + bytes([51, 0, 1, 4, 0, 0, 0, 0])
    wrapped = six(segment.tcp(), TCP, extensions=hops + bytes([6, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2]), first=0)
    pair = compare()
    pair.primary(wrapped, 0)
    for part in (segment.but(payload=b"hel"), segment.but(seq=4, payload=b"lo")):
        assert pair.release() == []
        pair.secondary(part.frame(), 1, 0)
    assert pair.release() == [wrapped]


def test_a_checksum_left_to_the_device_says_nothing() -> None:
    partial = udp(b"same").data
    partial = partial[:40] + b"\xab\xcd" + partial[42:]
    assert meet(Frame(struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0), partial), udp(b"same")) is None


def test_messages_may_overtake_each_other() -> None:
    pair = compare()
    pair.primary(udp(b"a"), 0)
    pair.primary(udp(b"b"), 0)
    pair.primary(udp(b"to another", ports=(53, 1000)), 0)
    pair.secondary(udp(b"to another", ports=(53, 1000)), 1, 0)
    assert pair.release() == [udp(b"to another", ports=(53, 1000))]
    pair = compare()
    pair.secondary(udp(b"b"), 1, 0)
    pair.secondary(udp(b"a"), 1, 0)
    pair.primary(udp(b"a"), 0)
    pair.primary(udp(b"b"), 0)
    assert pair.release() == [udp(b"a"), udp(b"b")] and pair.checkpoint_due is None


def fragments(identification: int, last: bytes = b"tail") -> list[Frame]:
    return [
        four(b"head" * 4, identification=identification, fragment=0x2000),
        four(last, identification=identification, fragment=2),
    ]


def test_fragments_are_the_same_whatever_their_identification() -> None:
    for make in (fragments, lambda i: [six_fragment(i, 0, True, b"head" * 4), six_fragment(i, 16, False, b"tail")]):
        pair = compare()
        for primary, secondary in zip(make(5), make(77), strict=True):
            pair.primary(primary, 0)
            pair.secondary(secondary, 1, 0)
        assert pair.release() == make(5) and pair.checkpoint_due is None


def test_fragments_of_different_datagrams_do_not_match() -> None:
    pair = compare()
    first, second = fragments(5), fragments(6)
    others = fragments(50), fragments(60)
    for primary, secondary in ((first[0], others[0][0]), (second[0], others[1][0])):
        pair.primary(primary, 0)
        pair.secondary(secondary, 1, 0)
    assert len(pair.release()) == 2
    pair.primary(first[1], 0)
    pair.secondary(others[1][1], 1, 0)
    due = pair.checkpoint_due
    assert due is not None and due.reason is Reason.HEADER and due.flow.kind == "fragment"
    assert meet(fragments(1)[1], fragments(1, b"tall")[1]) is Reason.PAYLOAD
    assert meet(fragments(1)[0], four(b"head" * 4, identification=1, fragment=0x2001)) is Reason.HEADER


def test_a_policy_for_each_kind() -> None:
    pair = compare(policy={"arp": Policy.RELEASE, "other": Policy.CHECKPOINT})
    pair.primary(arp("10.0.0.3"), 0)
    pair.secondary(arp("10.0.0.4"), 1, 0)
    assert pair.release() == [arp("10.0.0.3")] and why(pair) is None
    unknown = Frame(NO_HEADER, ethernet(0x88B5, b"x"))
    pair.secondary(unknown, 1, 0)
    pair.primary(unknown, 0)
    assert pair.release() == [] and why(pair) is Reason.POLICY
    pair.begin_epoch(2)
    pair.primary(unknown, 0)
    pair.commit(2, 0)
    assert pair.release() == [unknown] and why(pair) is Reason.POLICY, "the new epoch's"
    with pytest.raises(ConfigError, match="tcpp"):
        compare(policy={"tcpp": Policy.RELEASE})


def test_more_connections_than_are_tracked_are_a_checkpoint_and_no_loss() -> None:
    pair = compare(max_connections=4)
    sent = [udp(b"x", ports=(53, port)) for port in range(1, 7)]
    for each in sent[:4]:
        pair.primary(each, 0)
        pair.secondary(each, 1, 0)
    assert pair.release() == sent[:4]
    for each in sent:
        pair.primary(each, 0)
    due = pair.checkpoint_due
    assert due is not None and due.reason is Reason.CONNECTIONS and due.coalesced == 1
    pair.begin_epoch(2)
    pair.commit(2, 0)
    assert sorted(pair.release(), key=lambda each: each.data) == sent and pair.checkpoint_due is None


def test_idle_connections_make_room_and_age() -> None:
    pair = compare(max_connections=4, idle_timeout=1000)
    for port in range(1, 100):
        pair.primary(udp(b"x", ports=(53, port)), port)
        pair.secondary(udp(b"x", ports=(53, port)), 1, port)
    assert len(pair.release()) == 99 and len(pair.connections()) == 4
    pair.scan(1098)
    assert len(pair.connections()) == 2
    assert pair.counters()["connections_forgotten"] == 97


def test_periodic_holds_all_and_alone_holds_nothing() -> None:
    pair = Compare()
    pair.primary(udp(b"alone"), 0)
    assert pair.release() == [udp(b"alone")]
    pair.set_mode(Mode.HOLD, 1, 0)
    pair.primary(udp(b"first"), 0)
    pair.begin_epoch(2)
    pair.primary(udp(b"second"), 0)
    assert pair.release() == []
    pair.commit(2, 0)
    assert pair.release() == [udp(b"first")] and pair.checkpoint_due is None
    pair.scan(10_000)
    assert pair.checkpoint_due is None
    pair.set_mode(Mode.PASS, 0, 0)
    assert pair.release() == [udp(b"second")]


def test_one_checkpoint_is_under_way_at_most() -> None:
    pair = compare()
    with pytest.raises(StateError):
        pair.begin_epoch(1)
    pair.begin_epoch(2)
    with pytest.raises(StateError):
        pair.begin_epoch(3)
    with pytest.raises(StateError):
        pair.commit(3, 0)
    pair.commit(2, 0)
    pair.commit(2, 0)
    with pytest.raises(StateError):
        pair.set_mode(Mode.HYBRID, 5, 0)


def test_a_difference_while_a_checkpoint_is_under_way_wants_no_other() -> None:
    pair = compare()
    pair.primary(udp(b"a"), 0)
    pair.begin_epoch(2)
    pair.secondary(udp(b"b"), 1, 0)
    assert why(pair) is None
    pair.scan(100_000)
    assert why(pair) is None
    pair.primary(udp(b"c"), 100_000)
    pair.commit(2, 104_000)
    assert pair.release() == [udp(b"a")]
    pair.scan(106_999)
    assert why(pair) is None, "the time of a frame begins with its epoch's comparison"
    pair.scan(107_000)
    due = pair.checkpoint_due
    assert due is not None and (due.reason, due.epoch) == (Reason.PRIMARY_ALONE, 2)


def test_what_the_secondary_must_not_send() -> None:
    pair = compare()
    for frame, epoch in ((udp(b"x"), 2), (udp(b"x"), -1), (Frame(NO_HEADER, b"short"), 1),
                         (Frame(NO_HEADER, bytes(70000)), 1)):  # fmt: skip
        with pytest.raises(ChannelError):
            pair.secondary(frame, epoch, 0)
    with pytest.raises(StateError):
        pair.primary(Frame(NO_HEADER, b"short"), 0)
    with pytest.raises(ValueError, match="12 bytes"):
        pair.primary(Frame(b"", bytes(60)), 0)
    assert pair.counters()["bad"] == 4
