"""The socket device behind a transport, with a guest that speaks by hand, and host programs on real unix sockets."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.unix_listener import listen_unix
from pyvmm.virtio.vsock import EVENT, RECEIVE, TRANSMIT, VirtioVsock
from pyvmm.virtio.vsock_packet import HEADER, HOST_CID, REQUEST, RESPONSE, RW, STREAM, Header
from tests.unit.virtio.device_bench import QUEUE_SIZE, DeviceBench
from tests.unit.virtio.fake_driver import RING_REGION, Buffer, Ram, ram

CID = 3
BUFFERS = 0x100000
BUFFER_SIZE = 0x1000
OUTGOING = BUFFERS + QUEUE_SIZE * BUFFER_SIZE
REGIONS = (RING_REGION, (BUFFERS, (QUEUE_SIZE + 40) * BUFFER_SIZE))
GUEST_BUFFER = 1 << 18


class VsockBench(DeviceBench):
    """``got`` holds the packets that came, as (header, payload)."""

    def __init__(self, memory: Ram, folder: Path) -> None:
        self.loop = EventLoop()
        self.path = folder / "v"
        listener = listen_unix(str(self.path), "--vsock", backlog=8)
        self.vsock = VirtioVsock(memory.table, self.loop, CID, listener, str(self.path))
        super().__init__(memory, self.vsock)
        self.got: list[tuple[Header, bytes]] = []
        self._sent = 0
        self._offered: dict[int, int] = {}
        self._free = [BUFFERS + i * BUFFER_SIZE for i in range(QUEUE_SIZE)]

    def begin(self, buffers: int = QUEUE_SIZE) -> None:
        """The driver gets ready and offers ``buffers`` to receive into."""
        self._offered.clear()
        self._free = [BUFFERS + i * BUFFER_SIZE for i in range(QUEUE_SIZE)]
        self.negotiate()
        self.offer(buffers)

    def offer(self, count: int) -> None:
        """More buffers to receive into."""
        for _ in range(count):
            gpa = self._free.pop()
            self._offered[self.drivers[RECEIVE].offer([Buffer(gpa, BUFFER_SIZE, True)])] = gpa
        self.ring_bell(RECEIVE)

    def send(self, operation: int, host_port: int, guest_port: int, payload: bytes = b"", **fields: int) -> None:
        """A packet of the guest's; ``fields`` override those of an honest header."""
        honest = Header(CID, HOST_CID, guest_port, host_port, len(payload), STREAM, operation, 0, GUEST_BUFFER, 0)
        header = honest._replace(**fields)
        # Small ones may wait beside each other.
        self._sent += 1
        at = OUTGOING + (64 * (self._sent % QUEUE_SIZE) if len(payload) <= 64 - HEADER.size else 0x1000)
        self.ram.memory.write(at, header.encode() + payload)
        self.drivers[TRANSMIT].offer([Buffer(at, HEADER.size + len(payload), False)])
        self.ring_bell(TRANSMIT)

    def take(self, *, again: bool = True) -> list[tuple[Header, bytes]]:
        """The packets that came; their buffers are offered ``again``."""
        if not self.drivers:
            return []
        self.drivers[TRANSMIT].collect()
        came = []
        for head, written in self.drivers[RECEIVE].collect():
            gpa = self._offered.pop(head)
            data = self.ram.memory.read(gpa, written)
            came.append((Header.decode(data[: HEADER.size]), data[HEADER.size :]))
            assert len(data) - HEADER.size == came[-1][0].length
            self._free.append(gpa)
        self.got += came
        if again and came:
            self.offer(len(came))
        return came

    def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        """Serve until ``condition`` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            self.loop.run_once(0.01)
            self.serve()
            self.take()

    def settle(self) -> None:
        """Serve until nothing happens any more."""
        for _ in range(4):
            self.loop.run_once(0)
            self.serve()
            self.take()

    def packet(self, operation: int) -> Header:
        """Wait for the next packet with ``operation``, drop it and those before it."""
        self.until(lambda: any(header.operation == operation for header, _ in self.got))
        while True:
            header, _ = self.got.pop(0)
            if header.operation == operation:
                return header

    @property
    def operations(self) -> list[int]:
        """Those of the packets that came."""
        return [header.operation for header, _ in self.got]

    def payload(self) -> bytes:
        """All that came in RW packets."""
        return b"".join(data for header, data in self.got if header.operation == RW)

    @contextlib.contextmanager
    def listening(self, port: int, backlog: int = 8) -> Iterator[socket.socket]:
        """A host program that listens on ``port``."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"{self.path}_{port}")
            listener.listen(backlog)
            yield listener

    def from_guest(self, listener: socket.socket, port: int = 5000, guest_port: int = 1234) -> socket.socket:
        """A stream that the guest opens; the host's end."""
        self.send(REQUEST, port, guest_port)
        self.packet(RESPONSE)
        stream, _ = listener.accept()
        stream.settimeout(10)
        return stream

    def from_host(self, guest_port: int = 80, rest: bytes = b"") -> tuple[socket.socket, int]:
        """A stream that a host program opens; its end, and its port."""
        program = self.program(b"CONNECT %d\n" % guest_port + rest)
        host_port = self.packet(REQUEST).src_port
        self.send(RESPONSE, host_port, guest_port)
        assert program.recv(100) == b"OK %d\n" % host_port
        return program, host_port

    def program(self, line: bytes) -> socket.socket:
        """A host program that connects and writes ``line``."""
        program = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        program.settimeout(10)
        program.connect(str(self.path))
        program.sendall(line)
        return program

    def close(self) -> None:
        """The end."""
        self.vsock.close()
        self.loop.close()

    def event(self, gpa: int = OUTGOING) -> None:
        """Offer a buffer for an event."""
        self.drivers[EVENT].offer([Buffer(gpa, 4, True)])
        self.ring_bell(EVENT)


@contextlib.contextmanager
def vsock(folder: Path, *, ready: bool = True) -> Iterator[VsockBench]:
    """A bench, closed at the end; nothing of it is left then."""
    with ram(*REGIONS) as memory:
        bench = VsockBench(memory, folder)
        try:
            if ready:
                bench.begin()
            yield bench
        finally:
            bench.close()
        assert not bench.path.exists()
