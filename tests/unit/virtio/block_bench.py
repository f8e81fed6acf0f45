"""A block device with its threads, behind a transport, and a driver that makes requests of it."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyvmm.block.image import Image, open_image
from pyvmm.native import lib
from pyvmm.virtio import blk, mmio
from pyvmm.virtio import mmio_registers as registers
from pyvmm.virtio.blk import VirtioBlk
from pyvmm.virtio.device import F_VERSION_1
from pyvmm.virtio.mmio import VirtioMmio
from pyvmm.virtio.queue import F_EVENT_IDX, F_INDIRECT_DESC
from tests.unit.virtio.fake_device import Bench
from tests.unit.virtio.fake_driver import Buffer, FakeDriver, Ram, driver_on, ram

IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = (
    lib.PV_BLOCK_T_IN, lib.PV_BLOCK_T_OUT, lib.PV_BLOCK_T_FLUSH, lib.PV_BLOCK_T_GET_ID, lib.PV_BLOCK_T_DISCARD,
    lib.PV_BLOCK_T_WRITE_ZEROES,
)  # fmt: skip
OK, IOERR, UNSUPP = lib.PV_BLOCK_S_OK, lib.PV_BLOCK_S_IOERR, lib.PV_BLOCK_S_UNSUPP
RING_REGION = (0x10000, 0x8000)
DATA = 0x40000
DATA_SIZE = 0x80000
ALL = (
    F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | blk.F_SEG_MAX | blk.F_BLK_SIZE | blk.F_FLUSH | blk.F_TOPOLOGY
    | blk.F_CONFIG_WCE | blk.F_DISCARD | blk.F_WRITE_ZEROES
)  # fmt: skip
DEADLINE = 20.0


def header(kind: int, sector: int = 0) -> bytes:
    """5.2.6: type, reserved, sector."""
    return struct.pack("<IIQ", kind, 0, sector)


def ranges(*each: tuple[int, int, int]) -> bytes:
    """(sector, sectors, flags) of a discard or write-zeroes request."""
    return b"".join(struct.pack("<QII", *one) for one in each)


class BlkBench(Bench):
    """``lines`` is what the device reported to the user."""

    def __init__(self, memory: Ram, image: Image, serial: str = "") -> None:
        super().__init__(memory)
        self.memory = memory.memory
        self.lines: list[str] = []
        self.blk = VirtioBlk(memory.table, image, serial, self.lines.append)
        self.device = self.blk  # type: ignore[assignment]
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.transport = VirtioMmio(self.blk, self.signal.fd, lambda queue: os.eventfd_write(self.bell, 1))
        self.bus.release(0)
        self.bus.claim(0, mmio.WINDOW, self.transport)
        assert self.blk.take_doorbells([self.bell], self.transport.interrupt)
        self.driver: FakeDriver = driver_on(self.memory, 64)

    def start(self, features: int = ALL, size: int = 64) -> FakeDriver:
        """Initialize by the book."""
        self.status(registers.ACKNOWLEDGE, registers.DRIVER)
        self.features(features & (self.blk.features | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC))
        assert self.status(registers.FEATURES_OK) & registers.FEATURES_OK
        self.driver = driver_on(self.memory, size, event_idx=bool(features & F_EVENT_IDX))
        self.queue(0, self.driver)
        self.status(registers.DRIVER_OK)
        return self.driver

    def ring(self) -> None:
        """As the driver does."""
        self.put(registers.QUEUE_NOTIFY, 0)

    def wait(self, count: int = 1) -> list[tuple[int, int]]:
        """(head, written) of ``count`` completed requests."""
        done: list[tuple[int, int]] = []
        until = time.monotonic() + DEADLINE
        while len(done) < count:
            done += self.driver.collect()
            assert time.monotonic() < until, f"{len(done)} of {count} requests completed"
            time.sleep(0.0002)
        return done

    def wait_for_status(self, bit: int) -> None:
        """Until the device has set ``bit`` in its status."""
        until = time.monotonic() + DEADLINE
        while not self.get(registers.STATUS) & bit:
            assert time.monotonic() < until, f"status stays {self.get(registers.STATUS):#x}"
            time.sleep(0.0002)

    def wait_for_empty_ring(self) -> None:
        """Until the device has taken everything."""
        until = time.monotonic() + DEADLINE
        while self.blk.queues[0].native.next_avail != self.driver.available_idx:
            assert time.monotonic() < until, "a request is not taken"
            time.sleep(0.0002)

    def offer(self, readable: bytes, room: int, cuts: tuple[int, ...] = (), at: int = DATA) -> int:
        """Make a request available with its bytes at ``at``, cut into descriptors at the given places; its head."""
        total = len(readable) + room
        self.memory.write(at, readable + b"\xee" * room)
        edges = sorted({0, len(readable), total, *(cut for cut in cuts if 0 < cut < total)})
        pieces = [
            Buffer(at + a, b - a, a >= len(readable)) for a, b in itertools.pairwise(edges) if b > a
        ]  # fmt: skip
        return self.driver.offer(pieces)

    def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0,
                cuts: tuple[int, ...] = ()) -> tuple[int, bytes]:  # fmt: skip
        """Make one request of ``room`` bytes to be filled and wait: (status, what was filled in)."""
        readable = header(kind, sector) + data
        head = self.offer(readable, room + 1, cuts)
        self.ring()
        assert self.wait() == [(head, room + 1)]
        answer = self.memory.read(DATA + len(readable), room + 1)
        return answer[-1], answer[:-1]

    def close(self) -> None:
        self.blk.close()
        os.close(self.bell)


@contextmanager
def block_bench(image: Image, serial: str = "", start: bool = True) -> Iterator[BlkBench]:
    """A started device over ``image``."""
    with ram(RING_REGION, (DATA, DATA_SIZE)) as memory:
        bench = BlkBench(memory, image, serial)
        try:
            if start:
                bench.start()
            yield bench
        finally:
            bench.close()


def disk(folder: Path, size: int = 1 << 20, content: bytes | None = None, **options: Any) -> Image:
    """A raw image in ``folder``, random unless said otherwise."""
    path = folder / "disk.img"
    path.write_bytes(os.urandom(size) if content is None else content)
    return open_image(str(path), read_only=options.get("read_only", False))
