"""Framing of GDB's remote protocol: what is sent comes out, whatever lies around it and however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.gdb.packets import PACKET_MAX, Decoder, Event, Mark, encode, escape, expand_runs, unescape

ODD = st.sampled_from([b"}", b"#", b"$", b"*", b"0", b"\x03", b"]"])
PAYLOAD = st.binary(max_size=200) | st.lists(ODD).map(b"".join)


def packet(payload: bytes) -> bytes:
    """As GDB sends it: escaped, no run lengths."""
    raw = escape(payload)
    return b"$%s#%02x" % (raw, sum(raw) & 0xFF)


@given(PAYLOAD)
def test_what_is_escaped_can_be_sent_and_comes_back(payload: bytes) -> None:
    raw = escape(payload)
    assert not set(raw) & set(b"#$*")
    assert unescape(raw) == payload


@given(PAYLOAD | st.tuples(st.binary(min_size=1, max_size=1), st.integers(0, 400)).map(lambda run: run[0] * run[1]))
def test_a_reply_is_understood_by_a_client(payload: bytes) -> None:
    frame = encode(payload)
    assert frame[:1] == b"$" and frame[-3:-2] == b"#" and int(frame[-2:], 16) == sum(frame[1:-3]) & 0xFF
    assert not set(frame[1:-3]) & set(b"#$"), "would end or begin a packet"
    raw = expand_runs(frame[1:-3])
    assert raw is not None and unescape(raw) == payload


@pytest.mark.parametrize(
    ("payload", "frame"),
    # Runs as GDB's manual tells them: "0* " is "0000"; counts that would be # or $ are avoided.
    [(b"OK", b"$OK#9a"), (b"", b"$#00"), (b"0000", b"$0* #7a"), (b"0" * 7, b'$0*"0#ac'), (b"a}b", b"$a}]b#9d")],
)
def test_frames_byte_for_byte(payload: bytes, frame: bytes) -> None:
    assert encode(payload) == frame


@settings(max_examples=150)
@given(st.lists(PAYLOAD, max_size=6), st.data())
def test_packets_come_out_whole_however_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(packet(payload) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder, events = Decoder(), list[Event]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += decoder.feed(stream[start:end])
    assert events == payloads


@settings(max_examples=150)
@given(st.binary(max_size=300))
def test_behind_any_garbage_a_packet_is_found(garbage: bytes) -> None:
    decoder = Decoder()
    decoder.feed(garbage)
    # At most a checksum is still expected when garbage ends; a packet begun there ends with ours.
    decoder.feed(b"xx")
    assert decoder.feed(packet(b"qC"))[-1] == b"qC"


@given(PAYLOAD, st.integers(1, 255))
def test_a_wrong_checksum_is_bad(payload: bytes, difference: int) -> None:
    raw = escape(payload)
    assert Decoder().feed(b"$%s#%02x" % (raw, (sum(raw) + difference) & 0xFF)) == [Mark.BAD]


def test_marks_between_packets() -> None:
    assert Decoder().feed(b"+-\x03xyz$g#67+") == [Mark.ACK, Mark.NACK, Mark.INTERRUPT, b"g", Mark.ACK]
    assert Decoder().feed(packet(b"a\x03+-")) == [b"a\x03+-"], "inside a packet they are data"


@pytest.mark.parametrize("broken", [b"$a#zz", b"$a}#de", b"$a#-1"])
def test_packets_that_cannot_be(broken: bytes) -> None:
    assert Decoder().feed(broken) == [Mark.BAD]
    assert Decoder().feed(broken + b"$g#67") == [Mark.BAD, b"g"]


def test_a_packet_that_lost_its_end_gives_way_to_the_next() -> None:
    assert Decoder().feed(b"$m1234$g#67") == [b"g"]


def test_a_packet_without_end_takes_no_memory_and_is_bad_when_it_ends() -> None:
    decoder = Decoder()
    assert decoder.feed(b"$") == []
    for _ in range(20):
        assert decoder.feed(b"a" * PACKET_MAX) == []
    assert decoder._packet is not None and len(decoder._packet) <= PACKET_MAX
    assert decoder.feed(b"#00$g#67") == [Mark.BAD, b"g"]
    assert Decoder().feed(packet(b"a" * PACKET_MAX)) == [b"a" * PACKET_MAX], "the longest allowed"


@given(st.binary(max_size=60))
def test_expanding_any_reply_never_fails(raw: bytes) -> None:
    expanded = expand_runs(raw)
    assert expanded is None or len(expanded) <= 97 * len(raw) + len(raw)
