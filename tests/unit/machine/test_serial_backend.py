"""The host's end of the serial line without a guest: input from files and odd descriptors, sockets, full disks."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.devices.serial import Serial
from pyvmm.devices.serial_registers import FCR, MCR, RBR
from pyvmm.errors import ConfigError
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.serial_backend import SerialBackend, SocketSerialBackend, open_serial


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


def run_until(loop: EventLoop, condition: Callable[[], bool]) -> None:
    """Serve ``loop`` until ``condition`` holds; fails after 10 s."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        loop.run_once(0.05)


def read_all(loop: EventLoop, serial: Serial, size: int) -> bytes:
    """``size`` bytes that the guest's side of ``serial`` reads."""
    got = bytearray()

    def read() -> bool:
        while serial.state.rx:
            got.append(serial.read(RBR, 1))
        return len(got) >= size

    run_until(loop, read)
    return bytes(got)


def connected(backend: SerialBackend) -> Serial:
    serial = Serial(backend.output)
    serial.write(FCR, 1, 1)
    backend.attach(serial)
    return serial


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_file_as_input_arrives_whole(loop: EventLoop, tmp_path: Path, size: int) -> None:
    """epoll refuses regular files, so they are read otherwise; the second size is many reads."""
    data = bytes(i * 7 & 0xFF for i in range(size))
    (tmp_path / "input").write_bytes(data)
    fd = os.open(tmp_path / "input", os.O_RDONLY)
    backend = SerialBackend(loop, None)
    backend.read_from(fd)
    serial = connected(backend)
    assert read_all(loop, serial, size) == data
    backend.close()
    os.close(fd)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/"])
def test_what_is_no_stream_is_at_its_end(loop: EventLoop, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    backend = SerialBackend(loop, None)
    backend.read_from(fd)
    serial = connected(backend)
    loop.run_once(0)
    assert serial.state.rx == b""
    backend.close()
    os.close(fd)


def test_a_file_that_cannot_be_read_is_at_its_end(loop: EventLoop, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "only-written", os.O_WRONLY | os.O_CREAT)
    backend = SerialBackend(loop, None)
    backend.read_from(fd)
    connected(backend)
    backend.close()
    os.close(fd)


def test_input_waits_out_a_loopback_test_and_a_reset(loop: EventLoop) -> None:
    out, into = os.pipe()
    backend = SerialBackend(loop, None)
    backend.read_from(out)
    serial = connected(backend)
    serial.write(MCR, 1, 0x10)
    os.write(into, b"x" * 40)
    loop.run_once(1)
    assert serial.state.rx == b""
    serial.reset()
    assert read_all(loop, serial, 40) == b"x" * 40
    backend.close()
    os.close(out)
    os.close(into)


def test_a_full_disk_is_told(loop: EventLoop) -> None:
    backend = open_serial("file:/dev/full", loop)
    backend.output(b"lost")
    assert backend.flush(5)
    assert backend.problem == "No space left on device"
    backend.output(b"also lost")
    backend.close()


class Client:
    """A connected client of a socket backend."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(str(path))


def test_clients_come_and_go_while_the_guest_writes(loop: EventLoop, tmp_path: Path) -> None:
    """The loop takes a client's output away while vCPU threads write to it."""
    path = tmp_path / "socket"
    backend = SocketSerialBackend(loop, str(path))
    failed: list[BaseException] = []
    stop = threading.Event()

    def write() -> None:
        try:
            while not stop.is_set():
                backend.output(b"y" * 1000)
                if backend.gate.full:
                    backend.gate.wait()
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(30):
        client = Client(path)
        run_until(loop, lambda: backend._client is not None)
        assert client.socket.recv(1) == b"y"
        client.socket.close()
        run_until(loop, lambda: backend._client is None)
    stop.set()
    backend.gate.hold_open(True)
    writer.join(10)
    assert not writer.is_alive() and not failed
    backend.close()
    assert not path.exists()


def test_closing_lets_a_slow_client_have_the_rest(loop: EventLoop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    backend = SocketSerialBackend(loop, str(path))
    client = Client(path)
    run_until(loop, lambda: backend._client is not None)
    sent = bytes(range(256)) * 4000
    backend.output(sent)
    got = bytearray()

    def read() -> None:
        while piece := client.socket.recv(100_000):
            got.extend(piece)
            time.sleep(0.02)

    reader = threading.Thread(target=read)
    reader.start()
    backend.close()
    reader.join(20)
    client.socket.close()
    assert bytes(got) == sent


def test_a_client_that_has_sent_all_still_reads(loop: EventLoop, tmp_path: Path) -> None:
    """As ``nc -N`` and ``socat`` do it: only the sending half is shut."""
    path = str(tmp_path / "serial")
    backend = SocketSerialBackend(loop, path)
    try:
        serial = connected(backend)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)
            client.sendall(b"command")
            client.shutdown(socket.SHUT_WR)
            assert read_all(loop, serial, 7) == b"command"
            for _ in range(20):
                loop.run_once(0.01)  # it would be dropped here
            big = bytes(range(256)) * 2000
            backend.output(b"late" + big)
            got = b""
            while len(got) < 4 + len(big):
                piece = client.recv(1 << 16)
                assert piece, f"cut off after {len(got)} bytes"
                got += piece
            assert got == b"late" + big
            with socket.socket(socket.AF_UNIX) as other:
                other.settimeout(10)
                other.connect(path)
                loop.run_once(1)
                assert other.recv(1) == b""  # there still is one
        # Gone for good: nobody is told, writing goes on, the next one is welcome.
        backend.output(b"to nobody" * 1000)
        assert backend.flush(5) and backend.problem is None
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(path)
            loop.run_once(1)
            backend.output(b"hello")
            assert client.recv(5) == b"hello"
    finally:
        backend.close()


def test_a_second_client_is_turned_away(loop: EventLoop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    backend = SocketSerialBackend(loop, str(path))
    first, second = Client(path), Client(path)
    run_until(loop, lambda: backend._client is not None)
    loop.run_once(0.2)
    assert second.socket.recv(1) == b""
    backend.output(b"for the first")
    assert first.socket.recv(100) == b"for the first"
    backend.close()
    first.socket.close()
    second.socket.close()


def test_a_socket_in_use_is_refused_even_if_its_owner_accepts_nobody(loop: EventLoop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy:
        busy.bind(str(path))
        busy.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(3)]
        for client in waiting:  # fill its queue: another connect would block
            try:
                client.connect(str(path))
            except BlockingIOError:
                break
        began = time.monotonic()
        with pytest.raises(ConfigError, match="in use"):
            SocketSerialBackend(loop, str(path))
        assert time.monotonic() - began < 5
        for client in waiting:
            client.close()
    assert path.exists()


def test_a_stale_socket_is_replaced_and_another_file_is_not(loop: EventLoop, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    backend = SocketSerialBackend(loop, str(path))
    backend.close()
    path.write_text("precious")
    with pytest.raises(ConfigError):
        SocketSerialBackend(loop, str(path))
    assert path.read_text() == "precious"


def test_escape_keys_are_seen_when_the_guest_takes_no_input(loop: EventLoop) -> None:
    """A hung guest with a full receiver must not take the way out away."""
    seen: list[bytes] = []
    backend = SerialBackend(loop, None)
    backend.interactive = True
    backend.filter_input = lambda data: seen.append(data) or data  # type: ignore[func-returns-value]
    serial = Serial(backend.output)
    backend.attach(serial)
    out, into = os.pipe()
    backend.read_from(out)
    for piece in (b"abc", b"def", b"\x01x"):
        os.write(into, piece)
        loop.run_once(1)
    assert b"".join(seen) == b"abcdef\x01x"
    backend.close()
    os.close(out)
    os.close(into)
