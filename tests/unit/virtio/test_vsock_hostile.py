"""The socket device under guests that lie in every field, and its credit against a model of the rule."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.virtio.vsock import ANSWERS_MAX, RECEIVE, TRANSMIT
from pyvmm.virtio.vsock_packet import (
    BUFFER,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    HOST_CID,
    NO_SEND,
    REQUEST,
    RESET,
    RESPONSE,
    RW,
    SHUTDOWN,
    STREAM,
    Credit,
    Header,
)
from tests.unit.virtio.fake_driver import Buffer
from tests.unit.virtio.vsock_bench import CID, OUTGOING, VsockBench, vsock

_U32 = 0xFFFFFFFF


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, _U32),
    st.lists(st.tuples(st.sampled_from(["send", "hear", "receive", "forward", "tell"]), st.integers(0, 2 * BUFFER)),
             max_size=60),
)  # fmt: skip
def test_credit_follows_the_rule_wherever_the_counters_are(start: int, steps: list[tuple[str, int]]) -> None:
    """The model counts without end; the guest is honest, and knows only what it was told."""
    credit = Credit()
    credit.sent = credit.peer_forwarded = credit.received = credit.forwarded = credit.told = start
    sent = peer_forwarded = received = forwarded = told = start
    peer_buffer = 0
    for what, size in steps:
        if what == "send":
            room = max(0, peer_buffer - (sent - peer_forwarded))
            assert credit.room == room
            credit.send(min(size, room))
            sent += min(size, room)
        elif what == "hear":
            peer_buffer, peer_forwarded = size, min(sent, peer_forwarded + size // 2)
            credit.heard(peer_buffer, peer_forwarded & _U32)
        elif what == "receive":
            allowed = received + size - told <= BUFFER
            assert credit.covers(size) == allowed
            if allowed:
                credit.receive(size)
                received += size
        elif what == "forward":
            credit.forward(min(size, received - forwarded))
            forwarded += min(size, received - forwarded)
        else:
            assert credit.tell() == (BUFFER, forwarded & _U32)
            told = forwarded
        assert received - forwarded <= BUFFER
        assert credit.is_news == (forwarded != told and received - told > BUFFER // 2)


@pytest.mark.parametrize(
    ("operation", "fields"),
    [(RW, {}), (RESPONSE, {}), (SHUTDOWN, {}), (CREDIT_UPDATE, {}), (CREDIT_REQUEST, {}), (0, {}), (99, {}),
     (REQUEST, {"kind": 2}), (REQUEST, {"kind": 0}), (REQUEST, {"dst_cid": 1}), (REQUEST, {"dst_cid": 2**64 - 1})],
)  # fmt: skip
def test_what_belongs_to_no_connection_is_answered_with_reset(
    tmp_path: Path, operation: int, fields: dict[str, int]
) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000):
        bench.send(operation, 5000, 77, b"", **fields)
        reset = bench.packet(RESET)
        assert (reset.src_cid, reset.dst_cid) == (fields.get("dst_cid", HOST_CID), CID)
        assert (reset.src_port, reset.dst_port, reset.kind) == (5000, 77, fields.get("kind", STREAM))
        assert bench.got == [] and bench.vsock._connections == {}


@pytest.mark.parametrize(
    ("operation", "src_cid"), [(REQUEST, 4), (REQUEST, 2), (REQUEST, 2**63), (REQUEST, CID + 2**32), (RESET, CID)]
)
def test_what_cannot_be_answered_is_dropped(tmp_path: Path, operation: int, src_cid: int) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000):
        bench.send(operation, 5000, 77, src_cid=src_cid)
        bench.settle()
        assert bench.got == [] and bench.vsock._connections == {}


@pytest.mark.parametrize(
    ("operation", "payload", "fields"),
    [(REQUEST, b"", {}), (RESPONSE, b"", {}), (RW, b"", {"length": 1}), (RW, b"", {"length": _U32}),
     (RW, bytes(BUFFER + 1), {}), (0, b"", {}), (8, b"", {})],
)  # fmt: skip
def test_what_an_open_connection_must_not_bring_ends_it(
    tmp_path: Path, operation: int, payload: bytes, fields: dict[str, int]
) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        bench.send(operation, 5000, 1234, payload, **fields)
        bench.packet(RESET)
        assert stream.recv(1) == b"" and bench.vsock._connections == {} and not bench.broken


def test_data_after_the_word_that_there_is_no_more_ends_the_connection(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        bench.send(SHUTDOWN, 5000, 1234, flags=NO_SEND | 0xFFFFFFFC)
        bench.send(RW, 5000, 1234, b"more")
        bench.packet(RESET)
        assert stream.recv(10) == b""


def test_data_before_the_host_has_accepted_ends_the_connection(tmp_path: Path) -> None:
    filler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with vsock(tmp_path) as bench, bench.listening(5000, backlog=0), filler:
        filler.connect(f"{bench.path}_5000")
        bench.send(REQUEST, 5000, 1234)
        bench.send(RW, 5000, 1234, b"too early")
        bench.packet(RESET)
        assert bench.vsock._connections == {}


@pytest.mark.parametrize(
    ("queue", "buffer"),
    [(TRANSMIT, Buffer(OUTGOING, HEADER.size - 1, False)), (TRANSMIT, Buffer(OUTGOING, HEADER.size, True)),
     (RECEIVE, Buffer(OUTGOING, HEADER.size, True)), (RECEIVE, Buffer(OUTGOING, 100, False)),
     (2, Buffer(OUTGOING, 3, True)), (2, Buffer(OUTGOING, 4, False))],
)  # fmt: skip
def test_buffers_that_cannot_be_need_a_reset(tmp_path: Path, queue: int, buffer: Buffer) -> None:
    with vsock(tmp_path, ready=False) as bench:
        bench.begin(buffers=0)
        bench.vsock.state.reset_wanted = True
        if queue == RECEIVE:
            bench.send(RW, 1, 2)  # its answer is to go there
        bench.drivers[queue].offer([buffer])
        bench.ring_bell(queue)
        assert bench.broken


def test_answers_without_room_stop_the_guest_and_room_lets_it_go_on(tmp_path: Path) -> None:
    with vsock(tmp_path, ready=False) as bench:
        bench.begin(buffers=0)
        for guest_port in range(ANSWERS_MAX + 8):
            bench.send(RW, 1, guest_port)
            bench.drivers[TRANSMIT].collect()
        assert len(bench.vsock._answers) == ANSWERS_MAX
        bench.offer(1)
        bench.until(lambda: len(bench.got) == ANSWERS_MAX + 8)
        assert [header.dst_port for header, _ in bench.got] == list(range(ANSWERS_MAX + 8))


FIELDS = st.fixed_dictionaries({}, optional={
    "src_cid": st.sampled_from([0, 2, CID, CID + 2**32, 2**64 - 1]),
    "dst_cid": st.sampled_from([0, 1, HOST_CID, CID, 2**64 - 1]),
    "length": st.sampled_from([0, 1, 5, 4096, BUFFER, BUFFER + 1, _U32]),
    "kind": st.integers(0, 3),
    "flags": st.sampled_from([0, 1, 2, 3, 4, _U32]),
    "buf_alloc": st.sampled_from([0, 1, 100, BUFFER, _U32]),
    "fwd_cnt": st.sampled_from([0, 1, 100, 2**31, _U32]),
})  # fmt: skip
STEPS = st.lists(st.one_of(
    st.tuples(st.just("packet"), st.integers(0, 9), st.sampled_from([5000, 5001, 1 << 30, (1 << 30) + 1]),
              st.integers(1, 3), st.binary(max_size=300), FIELDS),
    st.tuples(st.sampled_from(["program", "reset", "save", "pause"]), st.integers(1, 3)),
    st.tuples(st.sampled_from(["write", "close", "half"]), st.integers(0, 5)),
), max_size=25)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_whatever_the_guest_says_the_device_lives(steps: list[tuple[object, ...]]) -> None:
    """Hostile packets and impatient programs, mixed: nothing raises, counts stay bounded, every socket is closed."""
    with tempfile.TemporaryDirectory() as folder, vsock(Path(folder)) as bench, bench.listening(5000) as listener:
        listener.setblocking(False)
        programs: list[socket.socket] = []
        try:
            for step in steps:
                _carry_out(bench, programs, step)
                bench.settle()
                with contextlib.suppress(BlockingIOError):
                    programs.append(listener.accept()[0])
                for connection in bench.vsock._connections.values():
                    assert len(connection._to_host) <= BUFFER
                assert not bench.broken
        finally:
            for program in programs:
                program.close()
        bench.until(lambda: not bench.vsock._leaving)


def _carry_out(bench: VsockBench, programs: list[socket.socket], step: tuple[object, ...]) -> None:
    match step:
        case ("packet", int(operation), int(host_port), int(guest_port), bytes(payload), dict(fields)):
            bench.send(operation, host_port, guest_port, payload, **fields)
        case ("program", int(port)):
            programs.append(bench.program(b"CONNECT %d\nearly" % port))
        case ("reset", _):
            bench.put(0x70, 0)
            bench.begin()
        case ("save", _):
            bench.transport.load(bench.transport.save())
            bench.transport.kick()
        case ("pause", _):
            bench.transport.pause()
            bench.settle()
            bench.transport.resume()
        case (str(what), int(which)) if programs:
            program = programs[which % len(programs)]
            with contextlib.suppress(OSError):
                if what == "write":
                    program.send(b"x" * 1000)
                elif what == "half":
                    program.shutdown(socket.SHUT_WR)
                else:
                    program.close()


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_a_header_is_what_was_packed(data: bytes) -> None:
    header = Header.decode(data)
    assert header.encode() == data
    assert struct.unpack_from("<QQ", header.refusal()) == (header.dst_cid, header.src_cid)
