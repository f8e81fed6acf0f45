"""The socket device: how streams open, carry data both ways, and end."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio import vsock as vsock_module
from pyvmm.virtio import vsock_listener
from pyvmm.virtio.mmio_registers import CONFIG
from pyvmm.virtio.vsock import FIRST_HOST_PORT
from pyvmm.virtio.vsock_packet import (
    BUFFER,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST_CID,
    NO_RECEIVE,
    NO_SEND,
    NOTHING_MORE,
    REQUEST,
    RESET,
    RESPONSE,
    RW,
    SHUTDOWN,
    STREAM,
)
from tests.unit.virtio.vsock_bench import CID, OUTGOING, vsock


def test_the_guest_reads_its_cid(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench:
        assert bench.get(registers.DEVICE_ID) == 19
        assert (bench.get(CONFIG), bench.get(CONFIG + 4)) == (CID, 0)


def test_the_guest_connects_and_data_goes_both_ways(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener:
        bench.send(REQUEST, 5000, 1234)
        response = bench.packet(RESPONSE)
        assert response[:8] == (HOST_CID, CID, 5000, 1234, 0, STREAM, RESPONSE, 0)
        assert (response.buf_alloc, response.fwd_cnt) == (BUFFER, 0)
        stream, _ = listener.accept()
        with stream:
            bench.send(RW, 5000, 1234, b"to the host")
            assert stream.recv(100) == b"to the host"
            stream.sendall(b"to the guest")
            bench.until(lambda: bench.payload() == b"to the guest")
            assert bench.got[-1][0].fwd_cnt == len(b"to the host")


def test_nobody_listens(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench:
        (tmp_path / "v_7").write_text("no socket")
        for port in (6, 7):
            bench.send(REQUEST, port, 1234)
            reset = bench.packet(RESET)
            assert (reset.src_port, reset.dst_port) == (port, 1234)


def test_a_host_program_connects_and_what_it_sent_early_arrives(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench:
        stream, port = bench.from_host(80, b"early")
        with stream:
            assert port == FIRST_HOST_PORT
            bench.until(lambda: bench.payload() == b"early")
            bench.send(RW, port, 80, b"answer")
            assert stream.recv(100) == b"answer"
        other, port = bench.from_host(80)
        other.close()
        assert port == FIRST_HOST_PORT + 1


@pytest.mark.parametrize("line", [b"CONNECT 80 \n", b"CONNECT\n", b"connect 80\n", b"CONNECT -1\n", b"x" * 40,
                                  b"CONNECT 4294967295\n", b"CONNECT 99999999999\n", b"\n"])  # fmt: skip
def test_a_host_program_that_does_not_say_what_it_wants_is_turned_away(tmp_path: Path, line: bytes) -> None:
    with vsock(tmp_path) as bench, bench.program(line) as program:
        bench.settle()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            program.sendall(b"x")  # pyvmm has closed its end
        assert bench.got == []


def test_a_host_program_that_says_nothing_is_turned_away_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock_listener, "HELLO_DEADLINE", 0.05)
    monkeypatch.setattr(vsock_listener, "WAITING_MAX", 1)
    with vsock(tmp_path) as bench, bench.program(b"CONN") as slow:
        bench.settle()
        with bench.program(b"CONNECT 1\n") as one_too_many:
            bench.settle()
            assert _has_ended(one_too_many)
        assert not _has_ended(slow)
        bench.until(lambda: _has_ended(slow))


def _has_ended(program: socket.socket) -> bool:
    program.setblocking(False)
    try:
        return program.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_without_a_driver_a_host_program_is_turned_away(tmp_path: Path) -> None:
    with vsock(tmp_path, ready=False) as bench, bench.program(b"CONNECT 80\n") as program:
        bench.settle()
        assert _has_ended(program)


def test_the_guest_refuses_or_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_module, "REQUEST_DEADLINE", 0.05)
    with vsock(tmp_path) as bench:
        with bench.program(b"CONNECT 80\n") as program:
            bench.send(RESET, bench.packet(REQUEST).src_port, 80)
            assert _has_ended(program)
        with bench.program(b"CONNECT 81\n") as program:
            port = bench.packet(REQUEST).src_port
            reset = bench.packet(RESET)
            assert (reset.src_port, reset.dst_port) == (port, 81) and _has_ended(program)
            bench.send(RESPONSE, port, 81)  # too late
            assert bench.packet(RESET).src_port == port


def test_a_paused_guest_has_all_the_time_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_module, "REQUEST_DEADLINE", 0.05)
    with vsock(tmp_path) as bench:
        bench.transport.pause()
        with bench.program(b"CONNECT 80\n") as program:
            for _ in range(20):
                bench.loop.run_once(0.01)
                bench.serve()
            assert bench.take() == [] and not _has_ended(program)
            bench.transport.resume()
            bench.send(RESPONSE, bench.packet(REQUEST).src_port, 80)
            bench.until(lambda: bench.vsock._connections)
            program.settimeout(5)
            assert program.recv(100).startswith(b"OK ")


def test_a_full_backlog_is_tried_again_until_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_module, "CONNECT_DEADLINE", 0.3)
    with vsock(tmp_path) as bench, bench.listening(5000, backlog=0) as listener:
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        filler.connect(f"{bench.path}_5000")
        bench.send(REQUEST, 5000, 1)
        bench.settle()
        assert bench.got == []
        listener.accept()[0].close()
        bench.packet(RESPONSE)
        bench.send(REQUEST, 5000, 2)
        assert bench.packet(RESET).dst_port == 2
        filler.close()


def test_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_module, "CONNECTIONS_MAX", 2)
    with vsock(tmp_path) as bench, bench.listening(5000) as listener:
        with bench.from_guest(listener, guest_port=1), bench.from_guest(listener, guest_port=2):
            bench.send(REQUEST, 5000, 3)
            assert bench.packet(RESET).dst_port == 3
            with bench.program(b"CONNECT 80\n") as program:
                bench.settle()
                assert _has_ended(program)
            bench.send(RESET, 5000, 1)
        bench.send(REQUEST, 5000, 3)
        bench.packet(RESPONSE)


def test_each_direction_ends_by_itself_guest_first(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        bench.send(RW, 5000, 1234, b"last words")
        bench.send(SHUTDOWN, 5000, 1234, flags=NO_SEND)
        assert stream.recv(100) == b"last words" and stream.recv(100) == b""
        stream.sendall(b"still here")
        bench.until(lambda: bench.payload() == b"still here")
        bench.send(SHUTDOWN, 5000, 1234, flags=NO_RECEIVE)  # flags add up
        assert bench.packet(RESET).dst_port == 1234
        assert bench.vsock._connections == {} and bench.vsock._leaving == set()


def test_each_direction_ends_by_itself_host_first(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        stream.sendall(b"last words")
        stream.shutdown(socket.SHUT_WR)
        shutdown = bench.packet(SHUTDOWN)
        assert shutdown.flags == NO_SEND
        bench.send(RW, 5000, 1234, b"still here")
        assert stream.recv(100) == b"still here"
        bench.send(SHUTDOWN, 5000, 1234, flags=NO_SEND)
        assert stream.recv(100) == b""
        # No direction is left: the guest hears so, and confirms.
        assert bench.packet(SHUTDOWN).flags == NOTHING_MORE
        bench.send(RESET, 5000, 1234)
        assert bench.vsock._connections == {} and bench.operations == []


def test_data_goes_before_the_word_that_there_is_no_more(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        stream.sendall(b"x" * 20000)
        stream.shutdown(socket.SHUT_WR)
        bench.until(lambda: SHUTDOWN in bench.operations)
        assert bench.payload() == b"x" * 20000 and bench.operations[-1] == SHUTDOWN


def test_a_host_program_that_closes_is_a_shutdown_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_module, "SHUTDOWN_DEADLINE", 0.1)
    with vsock(tmp_path) as bench, bench.listening(5000) as listener:
        bench.from_guest(listener, guest_port=1).close()
        assert bench.packet(SHUTDOWN).flags == NOTHING_MORE
        bench.send(RESET, 5000, 1)
        bench.from_guest(listener, guest_port=2).close()
        assert bench.packet(SHUTDOWN).flags == NOTHING_MORE
        assert bench.packet(RESET).dst_port == 2  # this guest did not confirm
        assert bench.vsock._connections == {}


def test_a_host_program_that_stops_reading_is_a_shutdown_of_one(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        stream.shutdown(socket.SHUT_RD)
        bench.send(RW, 5000, 1234, b"nobody reads this")
        assert bench.packet(SHUTDOWN).flags == NO_RECEIVE
        stream.sendall(b"but I can write")
        bench.until(lambda: bench.payload() == b"but I can write")


def test_what_came_before_the_guest_closed_still_arrives(tmp_path: Path) -> None:
    data = bytes(range(256)) * 200
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        # More than the socket takes at once, so that some of it waits in the device.
        bench.vsock._connections[5000, 1234].host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        bench.send(RW, 5000, 1234, data)
        bench.send(SHUTDOWN, 5000, 1234, flags=NOTHING_MORE)
        bench.packet(RESET)
        assert bench.vsock._connections == {} and len(bench.vsock._leaving) == 1
        bench.send(REQUEST, 5000, 1234)  # the port is free again
        bench.packet(RESPONSE)
        got = b""
        stream.setblocking(False)
        while len(got) < len(data):
            bench.loop.run_once(0.01)
            try:
                got += stream.recv(4096)
            except BlockingIOError:
                continue
        bench.settle()
        assert got == data and _has_ended(stream) and bench.vsock._leaving == set()


def test_a_program_that_never_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_module, "DRAIN_DEADLINE", 0.05)
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener):
        bench.vsock._connections[5000, 1234].host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        bench.send(RW, 5000, 1234, bytes(50000))
        bench.send(RESET, 5000, 1234)
        assert len(bench.vsock._leaving) == 1
        bench.until(lambda: not bench.vsock._leaving)


def test_a_reset_by_the_driver_ends_all_connections(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        bench.put(registers.STATUS, 0)
        bench.until(lambda: _has_ended(stream))
        assert bench.vsock._connections == {} and bench.vsock._leaving == set()
        bench.begin()
        bench.from_guest(listener).close()


def test_after_a_load_the_driver_hears_of_the_reset_once(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener:
        bench.event()
        assert bench.drivers[2].collect() == []
        stream = bench.from_guest(listener)
        bench.transport.pause()
        saved = bench.transport.save()
        bench.transport.load(saved)
        bench.transport.resume()
        bench.ram.memory.write(OUTGOING, b"\xff" * 4)
        bench.settle()
        assert len(bench.drivers[2].collect()) == 1 and bench.ram.memory.read(OUTGOING, 4) == bytes(4)
        bench.until(lambda: _has_ended(stream))
        bench.event()
        assert bench.drivers[2].collect() == []
        bench.send(RW, 5000, 1234, b"?")  # the old connection is unknown
        assert bench.packet(RESET).dst_port == 1234
        stream.close()


def test_credit_is_asked_for_told_and_kept(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener:
        bench.send(REQUEST, 5000, 1234, buf_alloc=100)
        bench.packet(RESPONSE)
        stream, _ = listener.accept()
        stream.sendall(b"x" * 250)
        bench.packet(CREDIT_REQUEST)
        bench.settle()
        assert bench.got == []  # the first 100 came before, and nothing comes after
        bench.send(CREDIT_UPDATE, 5000, 1234, buf_alloc=100, fwd_cnt=60)
        bench.settle()
        assert len(bench.payload()) == 60
        bench.send(CREDIT_UPDATE, 5000, 1234, buf_alloc=20, fwd_cnt=160)  # a smaller buffer from now on
        bench.settle()
        assert len(bench.payload()) == 80
        bench.send(CREDIT_UPDATE, 5000, 1234, buf_alloc=10, fwd_cnt=165)  # smaller than what is on its way
        bench.settle()
        assert len(bench.payload()) == 80
        bench.send(CREDIT_REQUEST, 5000, 1234, buf_alloc=1000, fwd_cnt=180)
        bench.settle()
        assert len(bench.payload()) == 150 and bench.operations[-1] in (CREDIT_UPDATE, RW)
        stream.close()


def test_a_program_that_does_not_read_stops_the_guest_and_no_more(tmp_path: Path) -> None:
    with vsock(tmp_path) as bench, bench.listening(5000) as listener, bench.from_guest(listener) as stream:
        bench.vsock._connections[5000, 1234].host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sent = 0
        while bench.vsock._connections[5000, 1234].may_bring(4096):
            bench.send(RW, 5000, 1234, bytes(4096))
            sent += 4096
            bench.settle()
            assert sent < 1 << 20
        assert len(bench.vsock._connections[5000, 1234]._to_host) <= BUFFER
        bench.got.clear()
        stream.setblocking(False)
        got = 0
        while got < sent:
            bench.settle()
            try:
                got += len(stream.recv(8192))
            except BlockingIOError:
                continue
        bench.settle()
        assert CREDIT_UPDATE in bench.operations and bench.got[-1][0].fwd_cnt > sent - BUFFER // 2
        assert bench.vsock._connections[5000, 1234].may_bring(BUFFER // 2 - 1)
