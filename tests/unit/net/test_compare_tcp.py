"""TCP by position in the stream: what is released when, and what makes a checkpoint due."""

from __future__ import annotations

import pytest

from pyvmm.net.compare import Compare, CompareTunables, Mode, Reason
from pyvmm.net.filter import Frame
from tests.unit.net.packets import ACK, FIN, NO_HEADER, PSH, RST, SYN, URG, Segment, sack, timestamps

P, S, CLIENT = 0xFFFFFFF0, 5000, 777
"""Initial sequence numbers of primary, secondary and client: the primary's soon wraps."""


class Pair:
    """A comparison in hybrid mode, with the handshake of one connection done unless told otherwise."""

    def __init__(self, handshake: bool = True) -> None:
        self.compare = Compare()
        self.compare.set_mode(Mode.HYBRID, 1, 0)
        self.now = 0
        if handshake:
            self.primary(Segment(P, CLIENT + 1, SYN | ACK))
            assert self.secondary(Segment(S, CLIENT + 1, SYN | ACK)) == [Segment(P, CLIENT + 1, SYN | ACK).frame()]

    def primary(self, *segments: Segment) -> list[Frame]:
        for each in segments:
            assert self.compare.primary(each.frame(), self.now)
        return self.compare.release()

    def secondary(self, *segments: Segment, epoch: int = 1) -> list[Frame]:
        for each in segments:
            self.compare.secondary(each.frame(), epoch, self.now)
        return self.compare.release()

    def later(self, ms: int) -> None:
        self.now += ms
        self.compare.scan(self.now)

    @property
    def why(self) -> Reason | None:
        due = self.compare.checkpoint_due
        return due.reason if due else None

    def checkpoint(self, epoch: int) -> list[Frame]:
        self.compare.begin_epoch(epoch)
        self.compare.commit(epoch, self.now)
        return self.compare.release()

    @property
    def waiting(self) -> tuple[int, int]:
        return self.compare.connections()[0].waiting


def data(at: int, payload: bytes, ack: int = CLIENT + 1, flags: int = ACK, **more: object) -> Segment:
    """``at`` counts from the first byte of the stream."""
    return Segment(P + 1 + at, ack, flags, payload).but(**more)


def test_equal_bytes_in_other_segments_are_released_as_the_primary_cut_them() -> None:
    pair = Pair()
    first, second = data(0, b"hello "), data(6, b"world, hello")
    assert pair.primary(first, second) == []
    assert pair.secondary(data(0, b"hello wor")) == [first.frame()]
    assert pair.secondary(data(9, b"ld, hel")) == []
    assert pair.secondary(data(16, b"lo")) == [second.frame()]
    assert pair.why is None and pair.waiting == (0, 0)


def test_the_secondary_may_be_ahead() -> None:
    pair = Pair()
    pair.secondary(data(0, b"abc"), data(3, b"def"))
    assert pair.primary(data(0, b"abcd")) == [data(0, b"abcd").frame()]
    assert pair.waiting == (0, 1)
    assert pair.primary(data(4, b"ef")) == [data(4, b"ef").frame()]
    assert pair.waiting == (0, 0)


def test_segments_out_of_order_wait_for_the_gap() -> None:
    pair = Pair()
    assert pair.primary(data(3, b"def"), data(0, b"abc")) == []
    assert pair.secondary(data(3, b"def")) == []
    assert pair.secondary(data(0, b"abc")) == [data(3, b"def").frame(), data(0, b"abc").frame()]


def test_what_was_equal_goes_out_again_at_once() -> None:
    pair = Pair()
    pair.primary(data(0, b"abcdef"))
    pair.secondary(data(0, b"abcdef"))
    assert pair.primary(data(2, b"cde")) == [data(2, b"cde").frame()]
    keepalive = data(5, b"\0")
    assert pair.primary(keepalive) == [keepalive.frame()], "one byte before the next, whatever it is (RFC 9293, 3.8.4)"
    assert pair.secondary(data(0, b"abcdef")) == [] and pair.waiting == (0, 0)


def test_a_difference_names_the_byte_and_nothing_of_it_goes_out_before_the_commit() -> None:
    pair = Pair()
    first, second = data(0, b"all the same"), data(12, b"not this")
    pair.primary(first, second)
    assert pair.secondary(data(0, b"all the same"), data(12, b"not that")) == [first.frame()]
    due = pair.compare.checkpoint_due
    assert due is not None and due.reason is Reason.PAYLOAD
    assert due.position == (P + 1 + 18) & 0xFFFFFFFF
    assert (due.primary, due.secondary) == (b"is", b"at")
    assert str(due.flow) == "tcp 10.0.0.1:80 - 10.0.0.2:40000"
    assert pair.primary(data(20, b"more")) == [], "nor what follows"
    assert pair.checkpoint(2) == [second.frame(), data(20, b"more").frame()]
    assert pair.why is None
    # The primary's state is the secondary's now: its number, and all that was sent.
    assert pair.primary(data(24, b"x")) == []
    assert pair.secondary(data(24, b"x"), epoch=2) == [data(24, b"x").frame()]


def test_early_resume_keeps_the_epochs_apart() -> None:
    pair = Pair()
    old, new = data(0, b"old"), data(3, b"new")
    pair.primary(old)
    pair.compare.begin_epoch(2)
    assert pair.primary(new) == [], "sent after the pause"
    assert pair.secondary(data(0, b"oldnew")) == [old.frame()], "the epoch that ended is still compared, but no other"
    late = data(6, b"late")
    pair.secondary(data(3, b"new"), epoch=2)
    pair.compare.commit(2, 0)
    assert pair.compare.release() == [new.frame()], "equal in the new epoch"
    assert pair.primary(late) == []
    assert pair.secondary(late, epoch=1) == [], "the secondary's output of an ended epoch is dropped"
    assert pair.secondary(late, epoch=2) == [late.frame()]


def test_the_commit_releases_nothing_that_was_sent_after_the_pause() -> None:
    pair = Pair()
    pair.primary(data(0, b"old"))
    pair.compare.begin_epoch(2)
    pair.primary(data(3, b"new"))
    pair.compare.commit(2, 0)
    assert pair.compare.release() == [data(0, b"old").frame()]


def test_an_acknowledgment_waits_for_the_secondarys() -> None:
    pair = Pair()
    bare = data(0, b"", CLIENT + 101)
    assert pair.primary(bare) == []
    common = data(0, b"", CLIENT + 100)
    assert pair.secondary(common) == [common.frame()]
    assert pair.secondary(data(0, b"", CLIENT + 150)) == [bare.frame()]
    closed = data(0, b"", CLIENT + 120, window=0)
    assert pair.primary(closed) == [closed.frame()]
    held = data(0, b"equal", CLIENT + 151)
    assert pair.primary(held) == []
    assert pair.secondary(data(0, b"equal", CLIENT + 150)) == [data(0, b"", CLIENT + 150).frame()], "what both have"
    pair.later(3000)
    assert pair.why is Reason.ACK


@pytest.mark.parametrize("six", [False, True])
def test_a_client_is_told_what_both_have_acknowledged(six: bool) -> None:
    """Or it would hear of no progress where the primary acknowledges in one step, and the secondary in three."""
    ends = {"source": "fd00::1", "destination": "fd00::2"} if six else {}
    pair = Pair(handshake=False)
    syn = Segment(P, CLIENT + 1, SYN | ACK).but(**ends)
    pair.primary(syn)
    pair.secondary(syn.but(seq=S))
    clock = b"\x01\x01" + timestamps(5, 6)
    held = data(0, b"equal", CLIENT + 91, PSH | ACK, options=clock + sack((CLIENT + 99, CLIENT + 103))).but(**ends)
    assert pair.primary(held) == []
    common = data(0, b"", CLIENT + 31, options=clock + b"\x01" * 10, window=1000).but(**ends)
    assert pair.secondary(data(0, b"equal", CLIENT + 31).but(**ends)) == [common.but(seq=P + 1).frame()]
    lost = sack((CLIENT + 71, CLIENT + 81))
    theirs = data(5, b"", CLIENT + 31, options=b"\x01\x01" + timestamps(9, 7) + lost, window=5).but(**ends)
    ours = theirs.but(options=b"\x01\x01" + timestamps(5, 7) + lost)
    assert pair.secondary(theirs, theirs) == [ours.frame()] * 2, "so that the client sends it again, on one clock"
    assert pair.secondary(data(5, b"", CLIENT + 91).but(**ends)) == [held.frame()]
    assert pair.secondary(theirs.but(ack=CLIENT + 91)) == [], "nothing waits any more"
    assert pair.compare.counters()["acknowledged"] == 3


def test_acknowledgments_wrap() -> None:
    pair = Pair(handshake=False)
    before, after = Segment(1, 0xFFFFFF00), Segment(1, 0x10)
    pair.primary(before, after)
    assert pair.secondary(Segment(1, 0xFFFFFF80))[0] == before.frame()
    assert pair.secondary(Segment(1, 0x10)) == [after.frame()]


def test_a_rolled_back_secondary_has_not_acknowledged_what_it_had() -> None:
    pair = Pair()
    pair.secondary(data(0, b"", CLIENT + 500))
    pair.checkpoint(2)
    assert pair.primary(data(0, b"", CLIENT + 400)) == []
    assert pair.secondary(data(0, b"", CLIENT + 400), epoch=2) == [data(0, b"", CLIENT + 400).frame()]


def test_the_end_is_a_position() -> None:
    pair = Pair()
    assert pair.primary(data(0, b"bye", flags=ACK | FIN)) == []
    assert pair.secondary(data(0, b"bye")) == []
    assert pair.secondary(data(3, b"", flags=ACK | FIN)) == [data(0, b"bye", flags=ACK | FIN).frame()]


@pytest.mark.parametrize("primary_ends", [True, False])
def test_an_end_against_more_bytes(primary_ends: bool) -> None:
    pair = Pair()
    sides = [data(0, b"bye", flags=ACK | FIN), data(0, b"bye and more")]
    if not primary_ends:
        sides.reverse()
    pair.primary(sides[0])
    assert pair.secondary(sides[1]) == []
    assert pair.why is Reason.FIN


def test_simultaneous_close() -> None:
    pair = Pair()
    end, last = data(0, b"", flags=ACK | FIN), data(1, b"", CLIENT + 2)
    pair.primary(end, last)
    assert pair.secondary(data(0, b"", CLIENT + 2, ACK | FIN)) == [end.frame(), last.frame()]


def test_resets_are_the_same_or_not() -> None:
    pair = Pair()
    reset = data(0, b"", flags=RST)
    pair.primary(reset)
    assert pair.secondary(reset) == [reset.frame()]
    pair.primary(data(1, b"", flags=RST))
    assert pair.secondary(data(2, b"", flags=RST)) == []
    assert pair.why is Reason.RST


def test_a_reset_of_nothing() -> None:
    pair = Pair(handshake=False)
    refusal = Segment(0, CLIENT + 1, RST | ACK)
    pair.secondary(refusal)
    assert pair.primary(refusal) == [refusal.frame()]


def test_options_of_a_syn_must_match_but_for_the_time() -> None:
    mss = bytes.fromhex("020405b4")
    pair = Pair(handshake=False)
    syn = Segment(P, CLIENT + 1, SYN | ACK, options=mss + timestamps(1000, 5))
    pair.primary(syn)
    assert pair.secondary(syn.but(seq=S, options=b"\x01" + mss + timestamps(2000, 5))) == [syn.frame()]
    again = Segment(P, CLIENT + 1, SYN | ACK, options=mss, ports=(81, 5))
    pair.primary(again)
    assert pair.secondary(again.but(seq=S, options=bytes.fromhex("02040500"))) == []
    assert pair.why is Reason.SYN


def test_a_syn_sent_again_and_one_that_is_new() -> None:
    pair = Pair()
    syn = Segment(P, CLIENT + 1, SYN | ACK)
    assert pair.primary(syn) == [syn.frame()]
    assert pair.secondary(syn.but(seq=S)) == [] and pair.waiting == (0, 0)
    assert pair.secondary(syn) == [] and pair.waiting == (0, 0), "its rewriter knows the number by now"
    new = Segment(P + 70000, CLIENT + 1, SYN | ACK)
    assert pair.primary(new) == []
    assert pair.primary(new.but(seq=P + 70001, flags=ACK | PSH, payload=b"hi")) == []
    assert len(pair.secondary(new.but(seq=99))) == 1
    assert len(pair.secondary(new.but(seq=P + 70001, flags=ACK, payload=b"hi"))) == 1
    assert pair.why is None and pair.waiting == (0, 0)


def test_one_side_goes_on_to_a_new_connection_alone() -> None:
    pair = Pair()
    pair.secondary(data(0, b"of the old one"))
    pair.primary(Segment(P + 70000, CLIENT + 1, SYN | ACK))
    assert pair.why is Reason.START


def test_outbound_connections_from_other_ports() -> None:
    pair = Pair(handshake=False)
    pair.primary(Segment(P, 0, SYN, ports=(40001, 80)))
    pair.secondary(Segment(S, 0, SYN, ports=(40002, 80)))
    assert pair.why is None
    pair.later(3000)
    assert pair.why is Reason.PRIMARY_ALONE


def test_a_connection_from_before() -> None:
    """Its numbers are not known; both sides had sent the same when this began."""
    pair = Pair(handshake=False)
    again, new = Segment(1000, 5, payload=b"sent before"), Segment(1011, 5, payload=b"new")
    assert pair.primary(again, new) == []
    assert pair.secondary(Segment(1011, 5, payload=b"ne")) == [again.frame()]
    assert pair.secondary(Segment(1013, 5, payload=b"w")) == [new.frame()]


def test_urgent_data_is_announced_by_both() -> None:
    pair = Pair()
    urgent = data(0, b"now!", flags=ACK | URG, urgent=4)
    assert pair.primary(urgent) == []
    assert pair.secondary(data(0, b"no", flags=ACK | URG, urgent=4)) == []
    assert pair.secondary(data(2, b"w!", flags=ACK | URG, urgent=2)) == [urgent.frame()]
    pair.primary(data(4, b"x"))
    pair.secondary(data(4, b"x", flags=ACK | URG, urgent=1))
    pair.later(3000)
    assert pair.why is Reason.SECONDARY_ALONE


def test_window_timestamps_selective_acknowledgments_and_addresses_are_not_compared() -> None:
    pair = Pair()
    ours = data(0, b"same", window=5, options=timestamps(9, 9) + sack((CLIENT + 50, CLIENT + 60)))
    pair.primary(ours)
    assert pair.secondary(data(0, b"same", window=7, options=timestamps(3, 3))) == [ours.frame()]


def test_age_is_a_reason_of_either_side() -> None:
    for first, reason in (("primary", Reason.PRIMARY_ALONE), ("secondary", Reason.SECONDARY_ALONE)):
        pair = Pair()
        getattr(pair, first)(data(0, b"alone"))
        pair.later(2999)
        assert pair.why is None
        pair.later(1)
        assert pair.why is reason


def test_a_full_queue_is_a_checkpoint_and_no_loss() -> None:
    pair = Pair()
    sent = [data(i, b"x") for i in range(1030)]
    assert pair.primary(*sent) == []
    assert {pair.why} == {Reason.PRIMARY_FULL}
    assert pair.checkpoint(2) == [each.frame() for each in sent]
    pair.secondary(*(data(1030 + i, b"x") for i in range(1025)), epoch=2)
    assert (pair.why, pair.waiting) == (Reason.SECONDARY_FULL, (0, 0))


def test_a_queue_that_overflowed_before_its_epoch_was_compared_says_so_then() -> None:
    pair = Pair()
    pair.compare.begin_epoch(2)
    pair.secondary(*(data(i, b"x") for i in range(1030)), epoch=2)
    assert pair.why is None
    pair.compare.commit(2, 0)
    assert pair.why is Reason.SECONDARY_FULL


def test_no_more_memory_is_told_to_the_caller() -> None:
    compare = Compare(CompareTunables(max_bytes=1 << 20))
    compare.set_mode(Mode.HOLD, 1, 0)
    big = Segment(1, 1, payload=bytes(60000)).frame()
    taken = [compare.primary(big, 0) for _ in range(20)]
    assert taken == [True] * 17 + [False] * 3
    due = compare.checkpoint_due
    assert due is not None and due.reason is Reason.PRIMARY_FULL and compare.counters()["refused"] == 3
    compare.begin_epoch(2)
    compare.commit(2, 0)
    assert compare.release() == [big] * 17
    assert compare.primary(big, 0)


def test_a_vlan_is_another_connection() -> None:
    pair = Pair(handshake=False)
    tagged = Segment(1, 1, payload=b"in 5", vlan=(5,))
    pair.primary(tagged)
    assert pair.secondary(tagged.but(vlan=(6,)), tagged.but(vlan=())) == []
    assert pair.secondary(tagged) == [tagged.frame()]


def test_the_header_of_offloads_goes_along() -> None:
    compare = Compare()
    compare.set_mode(Mode.HYBRID, 1, 0)
    header = bytes.fromhex("0101420000a0220010000000")
    large = Frame(header, Segment(1, 1, payload=bytes(50000)).frame().data)
    compare.primary(large, 0)
    for at in range(0, 50000, 1000):
        compare.secondary(Frame(NO_HEADER, Segment(1 + at, 1, payload=bytes(1000)).frame().data), 1, 0)
    assert compare.release() == [large]
