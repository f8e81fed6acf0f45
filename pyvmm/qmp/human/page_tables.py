"""``info mem`` and ``info tlb``: what a vCPU's page tables map, in the format of QEMU's monitor.

Formats of the tables: Intel SDM volume 3, chapter 4. The tables are the guest's, and may lead in circles: a level is
never deeper than the format has them, and after TABLES_MAX tables or LINES_MAX lines it says so and ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from pyvmm.arch.x86.control_registers import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, long_mode
from pyvmm.arch.x86.paging import PTE_LARGE, PTE_PRESENT, PTE_USER, PTE_WRITE
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import GuestMemory

TABLES_MAX = 300
LINES_MAX = 2000
_FRAME = (1 << 52) - (1 << 12)
_FLAGS = (("X", 63), ("G", 8), ("P", 7), ("D", 6), ("A", 5), ("C", 4), ("T", 3), ("U", 2), ("W", 1))


@dataclass(frozen=True)
class Mapping:
    """One leaf. ``rights``: user and write bits of every level together, and the leaf's other bits in ``entry``."""

    address: int
    gpa: int
    size: int
    entry: int
    rights: int


class TooMany(Exception):
    """The tables are larger than anybody wants to read."""


class _Walk:
    def __init__(self, memory: GuestMemory, sregs: Sregs) -> None:
        self._memory = memory
        self._large_pages = bool(sregs.cr4 & CR4_PSE)
        self._tables = 0
        self._sign = 0
        self.wide = bool(sregs.cr4 & CR4_PAE)
        both = PTE_USER | PTE_WRITE
        if long_mode(sregs):
            top = 57 if sregs.cr4 & CR4_LA57 else 48
            self._sign = 1 << top - 1
            self.leaves = self._table(sregs.cr3 & _FRAME, top - 9, 0, both)
        elif self.wide:
            self.leaves = self._directories(sregs.cr3 & 0xFFFFFFE0, both)
        else:
            self.leaves = self._table(sregs.cr3 & 0xFFFFF000, 22, 0, both)

    def _entries(self, table: int, count: int) -> tuple[int, ...]:
        self._tables += 1
        if self._tables > TABLES_MAX:
            raise TooMany
        size = 8 if self.wide else 4
        try:
            return struct.unpack(f"<{count}{'Q' if self.wide else 'I'}", self._memory.read(table, count * size))
        except GuestMemoryError:
            return ()

    def _directories(self, table: int, rights: int) -> Iterator[Mapping]:
        for number, entry in enumerate(self._entries(table, 4)):
            if entry & PTE_PRESENT:
                yield from self._table(entry & _FRAME, 21, number << 30, rights)

    def _table(self, table: int, shift: int, base: int, rights: int) -> Iterator[Mapping]:
        for number, entry in enumerate(self._entries(table, 512 if self.wide else 1024)):
            if not entry & PTE_PRESENT:
                continue
            address = base | number << shift
            if address & self._sign and not base & ~((1 << shift) - 1) & self._sign:
                address |= -(self._sign << 1) & (1 << 64) - 1
            large = entry & PTE_LARGE and shift <= 30 and (self.wide or self._large_pages)
            if shift == 12 or large:
                frame = entry & _FRAME & -(1 << shift)
                if not self.wide and shift == 22:
                    frame = entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32
                yield Mapping(address, frame, 1 << shift, entry, rights & entry)
            else:
                step = 9 if self.wide else 10
                yield from self._table(entry & _FRAME, shift - step, address, rights & entry)


def tlb_lines(memory: GuestMemory, sregs: Sregs) -> list[str]:
    """One line a page: linear address, where it leads, the entry's bits."""
    if not sregs.cr0 & CR0_PG:
        return ["PG disabled"]
    lines: list[str] = []
    try:
        for leaf in _Walk(memory, sregs).leaves:
            if len(lines) == LINES_MAX:
                raise TooMany
            marks = "".join(mark if leaf.entry >> bit & 1 else "-" for mark, bit in _FLAGS)
            if leaf.size == 4096:
                marks = marks[:2] + "-" + marks[3:]  # the bit is PAT there
            lines.append(f"{leaf.address:016x}: {leaf.gpa:016x} {marks}")
    except TooMany:
        lines.append("(there is more; this is enough)")
    return lines


def memory_lines(memory: GuestMemory, sregs: Sregs) -> list[str]:
    """One line for each range of the same rights: first address, end, size, u-r-w."""
    if not sregs.cr0 & CR0_PG:
        return ["PG disabled"]
    lines: list[str] = []
    start = end = rights = 0

    def finish() -> None:
        if end > start:
            if len(lines) == LINES_MAX:
                raise TooMany
            marks = ("u" if rights & PTE_USER else "-") + "r" + ("w" if rights & PTE_WRITE else "-")
            lines.append(f"{start:016x}-{end & (1 << 64) - 1:016x} {end - start:016x} {marks}")

    try:
        for leaf in _Walk(memory, sregs).leaves:
            if leaf.address != end or leaf.rights & (PTE_USER | PTE_WRITE) != rights or start == end:
                finish()
                start, rights = leaf.address, leaf.rights & (PTE_USER | PTE_WRITE)
            end = leaf.address + leaf.size
        finish()
    except TooMany:
        lines.append("(there is more; this is enough)")
    return lines
