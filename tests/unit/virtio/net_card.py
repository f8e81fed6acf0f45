"""A network device with its real pump, over a transport, between a driver in Python and a peer at the other end."""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyvmm.devices.bus import MMIO_SPACE, Bus
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio import net_features as features
from pyvmm.virtio.device import F_VERSION_1
from pyvmm.virtio.mmio import WINDOW, VirtioMmio
from pyvmm.virtio.mmio_registers import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
from pyvmm.virtio.net import VirtioNet
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC
from tests.unit.virtio.fake_driver import Buffer, FakeDriver, FakeSignal, Ram, ram

RINGS = 0x10000
BUFFERS = 0x100000
SIZE = 0x400000
MAC = bytes.fromhex("525400123456")
DEADLINE = 10.0
ANY = F_VERSION_1 | features.F_MRG_RXBUF | F_EVENT_IDX | F_INDIRECT_DESC | features.F_STATUS
CONTROLLED = ANY | features.F_CTRL_VQ
EVERYTHING = CONTROLLED | features.OFFLOADS


def frame(number: int, size: int = 60) -> bytes:
    """A frame that shows whose it is and whether all of it is there."""
    return (number.to_bytes(4, "big") * (size // 4 + 1))[:size]


class PairBackend:
    """One end of a socket pair: a stream of frames, or (``packets``) a frame a read led by a header, like a tap."""

    name = "pair"

    def __init__(self, *, packets: bool = False, mtu: int | None = None) -> None:
        kind = socket.SOCK_SEQPACKET if packets else socket.SOCK_STREAM
        self._mine, self.peer = socket.socketpair(socket.AF_UNIX, kind)
        for end in (self._mine, self.peer):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._mine.setblocking(False)
        self.peer.settimeout(DEADLINE)
        self.carries_header = packets
        self.mtu = mtu
        self.offloads: list[int] = []
        self.released = False
        self.announced: list[bytes] = []

    @property
    def fd(self) -> int:
        return self._mine.fileno()

    def set_offload(self, flags: int) -> None:
        self.offloads.append(flags)

    def release(self) -> None:
        self.released = True

    def claim(self) -> None:
        self.released = False

    def announce(self, frame: bytes) -> None:
        self.announced.append(frame)

    def close(self) -> None:
        self._mine.close()
        self.peer.close()

    def narrow(self) -> None:
        """Let the card's end hold no more than a frame or so that the peer has not read."""
        self._mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

    # -- the peer's side --

    def send(self, frame: bytes, header: bytes = bytes(12)) -> None:
        self.peer.sendall(header + frame if self.carries_header else struct.pack(">I", len(frame)) + frame)

    def receive(self) -> bytes:
        """The next frame; with its header from a backend that carries it."""
        if self.carries_header:
            return self.peer.recv(1 << 17)
        return self._exactly(struct.unpack(">I", self._exactly(4))[0])

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            piece = self.peer.recv(size - len(got))
            assert piece, "the card hung up"
            got += piece
        return got

    def silent(self, seconds: float = 0.05) -> bool:
        return not select.select([self.peer], [], [], seconds)[0]


class Card:
    """The device on a bus, and its driver."""

    def __init__(self, memory: Ram, backend: PairBackend) -> None:
        self.memory = memory
        self.backend = backend
        self.signal = FakeSignal()
        self.bells = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)]
        self.reports: list[str] = []
        self.device = VirtioNet(memory.table, backend, MAC, self.reports.append)
        self.transport = VirtioMmio(self.device, self.signal.fd, self.ring)
        self.device.take_doorbells(self.bells, self.transport.interrupt)
        self.bus = Bus("memory", MMIO_SPACE)
        self.bus.claim(0, WINDOW, self.transport)
        self.queues: list[FakeDriver] = []
        self.posted: dict[int, Buffer] = {}
        self.free_at = BUFFERS

    def close(self) -> None:
        self.device.close()
        for fd in self.bells:
            os.close(fd)

    def ring(self, queue: int) -> None:
        os.eventfd_write(self.bells[queue], 1)

    def get(self, offset: int) -> int:
        return self.bus.read(offset, 4)

    def put(self, offset: int, value: int) -> None:
        self.bus.write(offset, 4, value)

    def bring_up(self, negotiated: int = ANY, size: int = 64) -> None:
        """By the book (3.1.1); asserts that the device agrees."""
        self.put(registers.STATUS, 0)
        for bit in (ACKNOWLEDGE, DRIVER):
            self.put(registers.STATUS, self.get(registers.STATUS) | bit)
        for select_ in (0, 1):
            self.put(registers.DRIVER_FEATURES_SEL, select_)
            self.put(registers.DRIVER_FEATURES, negotiated >> 32 * select_ & 0xFFFFFFFF)
        self.put(registers.STATUS, self.get(registers.STATUS) | FEATURES_OK)
        assert self.get(registers.STATUS) & FEATURES_OK, "features refused"
        self.queues, self.posted, self.free_at = [], {}, BUFFERS
        for index, entries in enumerate((size, size, min(size, 64))):
            base = RINGS + index * 0x10000
            driver = FakeDriver(
                self.memory.memory, entries, base, base + 0x4000, base + 0x8000, bool(negotiated & F_EVENT_IDX)
            )
            self.queues.append(driver)
            self.put(registers.QUEUE_SEL, index)
            self.put(registers.QUEUE_NUM, entries)
            for register, gpa in (
                (registers.QUEUE_DESC_LOW, driver.descriptors), (registers.QUEUE_DRIVER_LOW, driver.available),
                (registers.QUEUE_DEVICE_LOW, driver.used),
            ):  # fmt: skip
                self.put(register, gpa)
                self.put(register + 4, 0)
            self.put(registers.QUEUE_READY, 1)
        self.put(registers.STATUS, self.get(registers.STATUS) | DRIVER_OK)

    @property
    def needs_reset(self) -> bool:
        return bool(self.get(registers.STATUS) & registers.DEVICE_NEEDS_RESET)

    def offer(self, queue: int, buffers: list[Buffer]) -> int:
        """Make a chain available and ring if the device wants to hear."""
        driver = self.queues[queue]
        before = driver.available_idx
        head = driver.offer(buffers)
        if driver.must_kick(before):
            self.ring(queue)
        return head

    def room(self, size: int) -> int:
        """GPA of ``size`` fresh bytes."""
        at = self.free_at
        self.free_at += size + 63 & ~63
        if self.free_at > SIZE:
            at, self.free_at = BUFFERS, BUFFERS + (size + 63 & ~63)
        return at

    def post(self, count: int, size: int = 1526) -> None:
        """Give the device ``count`` receive buffers."""
        for _ in range(count):
            buffer = Buffer(self.room(size), size, True)
            self.posted[self.offer(0, [buffer])] = buffer

    def transmit(self, frame: bytes, header: bytes = bytes(12), cuts: tuple[int, ...] = ()) -> None:
        """Send ``frame``, the chain cut at ``cuts``; used chains are taken back as they come."""
        data = header + frame
        at = self.room(len(data))
        self.memory.memory.write(at, data)
        places = [0, *cuts, len(data)]
        pieces = [Buffer(at + a, b - a, False) for a, b in itertools.pairwise(places)]
        until(lambda: self.queues[1].collect() is not None and len(self.queues[1].free) >= len(pieces), "room to send")
        self.offer(1, pieces)

    def received(self, wait: bool = True) -> tuple[bytes, bytes, int] | None:
        """(header, frame, buffers) of the next frame; ``None``: none came."""
        got = self._collect_one()
        deadline = time.monotonic() + DEADLINE
        while wait and not got:
            assert time.monotonic() < deadline, "a frame did not come"
            time.sleep(0.0005)
            got = self._collect_one()
        if not got:
            return None
        header = self.memory.memory.read(self.posted[got[0][0]].gpa, 12)
        count = struct.unpack_from("<H", header, 10)[0]
        while len(got) < count:
            more = self._collect_one()
            assert more, "the buffers of a frame must come all at once"
            got += more
        data = b"".join(self.memory.memory.read(self.posted.pop(head).gpa, size) for head, size in got)
        return header, data[12:], count

    def _collect_one(self) -> list[tuple[int, int]]:
        driver = self.queues[0]
        if driver.used_idx == self.memory.memory.read_uint(driver.used + 2, 2):
            return []
        at = driver.used + 4 + 8 * (driver.used_idx % driver.size)
        head, written = struct.unpack("<II", self.memory.memory.read(at, 8))
        driver.free += driver.chains.pop(head)
        driver.used_idx = driver.used_idx + 1 & 0xFFFF
        return [(head, written)]

    def command(self, kind: int, number: int, data: bytes) -> int:
        """The answer to a command on the control queue."""
        at = self.room(2 + len(data) + 1)
        self.memory.memory.write(at, bytes([kind, number]) + data + b"\xff")
        end = at + 2 + len(data)
        self.offer(2, [Buffer(at, 2, False), Buffer(at + 2, len(data), False), Buffer(end, 1, True)])
        until(lambda: bool(self.queues[2].collect()), "the command's answer")
        return self.memory.memory.read(end, 1)[0]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.0005)


@contextmanager
def card(*, packets: bool = False, mtu: int | None = None) -> Iterator[Card]:
    """A card whose driver has not started yet."""
    with ram((0, SIZE)) as memory:
        made = Card(memory, PairBackend(packets=packets, mtu=mtu))
        try:
            yield made
        finally:
            made.close()
