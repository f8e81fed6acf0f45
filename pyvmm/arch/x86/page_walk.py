"""The walk through a guest's page tables for one address, level by level, as the CPU does it.

Formats: Intel SDM volume 3, 4.3 to 4.5. Whether an access may go there is ``arch/x86/paging.py``'s to
say; this one tells the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.arch.x86.control_registers import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, long_mode
from pyvmm.arch.x86.paging import PTE_ACCESSED, PTE_DIRTY, PTE_LARGE, PTE_NX, PTE_PRESENT, PTE_USER, PTE_WRITE
from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import GuestMemory
from pyvmm.registers import Bit, named_bits

ENTRY_BITS = (
    Bit(PTE_PRESENT, "P"), Bit(PTE_WRITE, "W"), Bit(PTE_USER, "U"), Bit(PTE_ACCESSED, "A"), Bit(PTE_DIRTY, "D"),
    Bit(PTE_LARGE, "PS"), Bit(PTE_NX, "NX"),
)  # fmt: skip
_FRAME = (1 << 52) - (1 << 12)
_WIDE_NAMES = {48: "PML5", 39: "PML4", 30: "PDPT", 21: "directory", 12: "table"}


def levels(memory: GuestMemory, sregs: Sregs, address: int) -> Iterator[str]:
    """A line for each level, the last one says where it ends."""
    if not sregs.cr0 & CR0_PG:
        yield f"paging is off: linear {address:#x} is physical {address & 0xFFFFFFFF:#x}"
        return
    if long_mode(sregs):
        shifts, size = [48, 39, 30, 21, 12] if sregs.cr4 & CR4_LA57 else [39, 30, 21, 12], 8
        table = sregs.cr3 & _FRAME
    elif sregs.cr4 & CR4_PAE:
        shifts, size, table = [30, 21, 12], 8, sregs.cr3 & 0xFFFFFFE0
    else:
        shifts, size, table = [22, 12], 4, sregs.cr3 & 0xFFFFF000
    bits = 9 if size == 8 else 10
    yield f"CR3 = {sregs.cr3:#x}: the first table is at {table:#x}"
    for shift in shifts:
        index = address >> shift & (1 << bits) - 1
        if size == 8 and shift == 30 and not long_mode(sregs):
            index &= 3
        name = _WIDE_NAMES[shift] if size == 8 else {22: "directory", 12: "table"}[shift]
        at = table + index * size
        try:
            entry = memory.read_uint(at, size)
        except GuestMemoryError:
            yield f"{name}[{index}] at {at:#x} is not in memory: a machine check, or all ones"
            return
        flags = named_bits(entry, ENTRY_BITS if size == 8 else ENTRY_BITS[:-1])
        yield f"{name}[{index}] at {at:#x} = {entry:#x} ({flags or 'not present'})"
        if not entry & PTE_PRESENT:
            yield f"not present: an access to {address:#x} is a page fault"
            return
        if shift == 12 or (entry & PTE_LARGE and _may_be_large(shift, size, sregs)):
            frame = entry & _FRAME & -(1 << shift)
            if size == 4 and shift == 22:
                frame |= (entry >> 13 & 0xFF) << 32
            offset = address & (1 << shift) - 1
            unit = f"{1 << shift - 10} KiB" if shift < 20 else f"{1 << shift - 20} MiB"
            yield f"a page of {unit} at {frame:#x}: {address:#x} is physical {frame + offset:#x}"
            return
        table = entry & (_FRAME if size == 8 else 0xFFFFF000)


def _may_be_large(shift: int, size: int, sregs: Sregs) -> bool:
    if size == 4:
        return bool(sregs.cr4 & CR4_PSE)
    return shift == 21 or (shift == 30 and long_mode(sregs))
