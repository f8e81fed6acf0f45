"""The other side of a virtqueue, in Python: guest memory, a driver's ring in it, and a line that counts its pulses.

Written from virtio 1.2, 2.7, for its own sake: it shares no code with the device's side.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory, Region
from pyvmm.native import lib

NEXT, WRITE, INDIRECT = 1, 2, 4


class FakeSignal:
    """What a transport signals to pulse its line."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self.fd)

    def pulses(self) -> int:
        """How many there were since the last call."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0


@dataclass
class Ram:
    """Guest memory and the native table of it."""

    memory: GuestMemory
    table: Any

    def snapshot(self) -> dict[int, bytes]:
        """All of it, by region."""
        return {r.gpa: self.memory.read(r.gpa, r.size) for r in self.memory.regions}

    def clean(self) -> None:
        """Forget which pages are marked."""
        for region in self.memory.regions:
            region.dirty.harvest()

    def changes(self, before: dict[int, bytes]) -> set[int]:
        """GPAs of bytes that differ from ``before``; fails if the page of one is not marked dirty."""
        changed = set()
        for region in self.memory.regions:
            now, then = self.memory.read(region.gpa, region.size), before[region.gpa]
            for page in range(0, region.size, PAGE_SIZE):
                if now[page : page + PAGE_SIZE] != then[page : page + PAGE_SIZE]:
                    assert region.dirty.test(page // PAGE_SIZE), f"page {region.gpa + page:#x} changed unmarked"
                    changed |= {region.gpa + at for at in range(page, page + PAGE_SIZE) if now[at] != then[at]}
        return changed


@contextmanager
def ram(*regions: tuple[int, int]) -> Iterator[Ram]:
    """Memory of (GPA, size) regions, given back at the end."""
    made = [Region(gpa, size, f"test-{gpa:x}") for gpa, size in regions]
    table = lib.pv_vm_new()
    try:
        for region in made:
            assert lib.pv_vm_add_region(table, region.gpa, region.size, region.hva, region.dirty.native) == 0
        yield Ram(GuestMemory(made), table)
    finally:
        lib.pv_vm_free(table)
        for region in made:
            region.close()


@dataclass(frozen=True)
class Buffer:
    """One element of a chain."""

    gpa: int
    length: int
    writable: bool


@dataclass
class FakeDriver:
    """A driver's half of a split virtqueue of ``size`` entries; indices may start anywhere in 16 bits."""

    memory: GuestMemory
    size: int
    descriptors: int
    available: int
    used: int
    event_idx: bool = False
    available_idx: int = 0
    used_idx: int = 0
    free: list[int] = field(default_factory=list)
    chains: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.size))
        self.memory.write_uint(self.available + 2, 2, self.available_idx)
        self.memory.write_uint(self.used + 2, 2, self.used_idx)

    def put(self, table: int, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        """Write one descriptor."""
        self.memory.write(table + 16 * index, struct.pack("<QIHH", gpa, length, flags, following))

    def offer(self, buffers: list[Buffer], indirect_table: int | None = None) -> int:
        """Make a chain available (2.7.13); its head. The caller has looked that there is room."""
        direct = 1 if indirect_table is not None else len(buffers)
        taken = [self.free.pop() for _ in range(direct)]
        if indirect_table is not None:
            self.put(self.descriptors, taken[0], indirect_table, 16 * len(buffers), INDIRECT)
            table, indices = indirect_table, list(range(len(buffers)))
        else:
            table, indices = self.descriptors, taken
        for at, (buffer, index) in enumerate(zip(buffers, indices, strict=True)):
            last = at + 1 == len(buffers)
            flags = (WRITE if buffer.writable else 0) | (0 if last else NEXT)
            self.put(table, index, buffer.gpa, buffer.length, flags, 0 if last else indices[at + 1])
        self.chains[taken[0]] = taken
        self.make_available(taken[0])
        return taken[0]

    def make_available(self, head: int) -> None:
        """Put ``head`` on the available ring, whatever it is."""
        self.memory.write_uint(self.available + 4 + 2 * (self.available_idx % self.size), 2, head)
        self.available_idx = self.available_idx + 1 & 0xFFFF
        self.memory.write_uint(self.available + 2, 2, self.available_idx)

    def collect(self) -> list[tuple[int, int]]:
        """(head, written) of what was used since the last call (2.7.14)."""
        found = []
        while self.used_idx != self.memory.read_uint(self.used + 2, 2):
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            self.free += self.chains.pop(head)
            found.append((head, written))
            self.used_idx = self.used_idx + 1 & 0xFFFF
        return found

    def want_interrupts(self, on: bool) -> None:
        """2.7.7: by flag, or by used_event: at the next one, or never."""
        event = self.used_idx if on else self.used_idx - 1 & 0xFFFF
        self.memory.write_uint(self.available, 2, 0 if on or self.event_idx else 1)
        self.memory.write_uint(self.available + 4 + 2 * self.size, 2, event)

    def must_kick(self, before: int) -> bool:
        """2.7.10: whether the device wants to hear that available_idx went from ``before`` to where it is."""
        if not self.event_idx:
            return not self.memory.read_uint(self.used, 2) & 1
        event = self.memory.read_uint(self.used + 4 + 8 * self.size, 2)
        return any(before + step & 0xFFFF == event for step in range((self.available_idx - before) & 0xFFFF))

    @property
    def used_bytes(self) -> set[int]:
        """GPAs the device may write of the ring itself."""
        return set(range(self.used, self.used + 6 + 8 * self.size))


RING = 0x10000
RING_REGION = (RING, 0x8000)
DATA_REGION = (0x40000, 0x8000)
NEIGHBOUR_REGION = (0x48000, 0x4000)  # adjacent to DATA_REGION for the guest
REGIONS = (RING_REGION, DATA_REGION, NEIGHBOUR_REGION)


def driver_on(memory: GuestMemory, size: int, *, event_idx: bool = False, start: int = 0) -> FakeDriver:
    """A driver whose ring lies in RING_REGION."""
    return FakeDriver(
        memory, size, RING, RING + 0x2000, RING + 0x3000, event_idx, available_idx=start, used_idx=start
    )
