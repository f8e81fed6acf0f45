"""The guest's page tables, walked in software: which guest-physical address is behind a linear one.

Formats: no paging; 32-bit with PSE and PSE-36; PAE; 4-level; 5-level. Source: Intel SDM volume 3, chapter 4
(4.3, 4.4, 4.5 the formats, 4.6 access rights, 4.7 the error code, 4.8 accessed and dirty flags).
Protection keys are not looked at (no vCPU of ours has CR4.PKE set without the guest choosing it, and a
key can only take rights away).
"""

from __future__ import annotations

from dataclasses import dataclass

from pyvmm.arch.x86.control_registers import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_NXE,
    long_mode,
)
from pyvmm.arch.x86.faults import PF_FETCH, PF_PRESENT, PF_RESERVED, PF_USER, PF_WRITE, PageFault
from pyvmm.kvm.state import Sregs
from pyvmm.memory.guest_memory import GuestMemory

PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_USER = 1 << 2
PTE_ACCESSED = 1 << 5
PTE_DIRTY = 1 << 6
PTE_LARGE = 1 << 7
PTE_NX = 1 << 63
PDPTE_PAE_RESERVED = 0x1E6  # bits 2:1 and 8:5 of a PAE-mode PDPTE


@dataclass(frozen=True)
class Access:
    """What is done at the address. ``user``: with CPL 3's rights. ``smap_override``: RFLAGS.AC is set."""

    write: bool = False
    user: bool = False
    fetch: bool = False
    smap_override: bool = False


@dataclass(frozen=True)
class Translation:
    """A linear address that is mapped, and with what rights (the AND over all levels)."""

    gpa: int
    page_size: int
    writable: bool
    user: bool
    executable: bool


READ = Access()


def walk(
    memory: GuestMemory,
    sregs: Sregs,
    address: int,
    access: Access = READ,
    *,
    physical_bits: int = 52,
    update: bool = False,
) -> Translation:
    """Translate linear ``address`` for ``access``.

    ``physical_bits`` is the guest's MAXPHYADDR; with ``update`` the accessed and dirty flags are set as the
    CPU would. In 32-bit modes only the low 32 bits of ``address`` count; canonicality is the segment unit's
    to check, so in 64-bit mode only the translated bits count.

    Raises :class:`PageFault` with the error code the CPU would push, :class:`GuestMemoryError` if a table is
    outside guest memory.
    """
    return _Walk(memory, sregs, address, access, physical_bits).run(update)


class _Walk:
    """One walk: the rights gathered so far and the entries passed."""

    def __init__(self, memory: GuestMemory, sregs: Sregs, address: int, access: Access, physical_bits: int) -> None:
        self.memory = memory
        self.sregs = sregs
        self.address = address
        self.access = access
        self.physical_bits = physical_bits
        self.nxe = bool(sregs.efer & EFER_NXE)
        self.writable = self.user = self.executable = True
        self.passed: list[int] = []  # GPAs of the entries used, for the accessed flags

    def run(self, update: bool) -> Translation:
        sregs = self.sregs
        if not sregs.cr0 & CR0_PG:
            return Translation(self.address & 0xFFFFFFFF, 1 << 12, True, True, True)
        if long_mode(sregs):
            found = self._radix(sregs.cr3 & self._frame(12), 57 if sregs.cr4 & CR4_LA57 else 48)
        elif sregs.cr4 & CR4_PAE:
            found = self._radix(self._pae_directory(), 30)
        else:
            found = self._legacy()
        self._check_rights()
        if update:
            self._set_flags()
        return found

    def _frame(self, shift: int) -> int:
        """Mask of an entry's address bits for a page or table of ``1 << shift`` bytes."""
        return ((1 << self.physical_bits) - 1) & ~((1 << shift) - 1)

    def _fault(self, cause: int) -> PageFault:
        access = self.access
        # The I bit exists only where fetches can fault differently from reads (SDM 4.7).
        fetch = access.fetch and (self._nx_possible() or self.sregs.cr4 & CR4_SMEP)
        address = self.address if long_mode(self.sregs) else self.address & 0xFFFFFFFF
        return PageFault(
            address,
            cause
            | (PF_WRITE if access.write else 0)
            | (PF_USER if access.user else 0)
            | (PF_FETCH if fetch else 0),
        )

    def _nx_possible(self) -> bool:
        return self.nxe and bool(self.sregs.cr4 & CR4_PAE)

    def _pass(self, at: int, entry: int) -> None:
        """Go through a present entry: gather its rights."""
        self.passed.append(at)
        self.writable = self.writable and bool(entry & PTE_WRITE)
        self.user = self.user and bool(entry & PTE_USER)
        if entry & PTE_NX and self.nxe:
            self.executable = False

    def _pae_directory(self) -> int:
        """The page directory that one of PAE's four PDPTEs names; these carry no rights."""
        at = (self.sregs.cr3 & 0xFFFFFFE0) + (self.address >> 30 & 3) * 8
        entry = self.memory.read_uint(at, 8)
        if not entry & PTE_PRESENT:
            raise self._fault(0)
        if entry & (PDPTE_PAE_RESERVED | ~((1 << self.physical_bits) - 1)):
            raise self._fault(PF_PRESENT | PF_RESERVED)
        return entry & self._frame(12)

    def _radix(self, table: int, top: int) -> Translation:
        """8-byte entries, 9 bits a level, from the level that resolves bits ``top``-1 downwards."""
        above_address = ((1 << 52) - 1) & ~((1 << self.physical_bits) - 1)
        if not long_mode(self.sregs):
            above_address |= 0x7FF << 52  # PAE reserves 62:52, long mode ignores them
        if not self.nxe:
            above_address |= PTE_NX
        for shift in range(top - 9, 11, -9):
            at = table + (self.address >> shift & 0x1FF) * 8
            entry = self.memory.read_uint(at, 8)
            if not entry & PTE_PRESENT:
                raise self._fault(0)
            leaf = shift == 12 or bool(entry & PTE_LARGE)
            reserved = above_address
            if leaf and shift > 12:
                # Only 2 MiB and 1 GiB pages exist; between PAT (bit 12) and the frame all bits are zero.
                reserved |= PTE_LARGE if shift > 30 else (1 << shift) - (1 << 13)
            if entry & reserved:
                raise self._fault(PF_PRESENT | PF_RESERVED)
            self._pass(at, entry)
            if leaf:
                offset = self.address & ((1 << shift) - 1)
                return self._found((entry & self._frame(shift)) | offset, 1 << shift)
            table = entry & self._frame(12)
        raise AssertionError("a 4 KiB entry is always a leaf")

    def _legacy(self) -> Translation:
        """Two levels of 4-byte entries; 4 MiB pages with CR4.PSE, above 4 GiB with PSE-36."""
        address = self.address & 0xFFFFFFFF
        at = (self.sregs.cr3 & 0xFFFFF000) + (address >> 22) * 4
        entry = self.memory.read_uint(at, 4)
        if not entry & PTE_PRESENT:
            raise self._fault(0)
        if entry & PTE_LARGE and self.sregs.cr4 & CR4_PSE:
            high_bits = min(max(self.physical_bits - 32, 0), 8)  # PSE-36: bits 20:13 are address bits 39:32
            if entry & ((1 << 22) - (1 << (13 + high_bits))):
                raise self._fault(PF_PRESENT | PF_RESERVED)
            self._pass(at, entry)
            frame = (entry & 0xFFC00000) | (entry >> 13 & 0xFF) << 32
            return self._found(frame | address & 0x3FFFFF, 1 << 22)
        self._pass(at, entry)
        at = (entry & 0xFFFFF000) + (address >> 12 & 0x3FF) * 4
        entry = self.memory.read_uint(at, 4)
        if not entry & PTE_PRESENT:
            raise self._fault(0)
        self._pass(at, entry)
        return self._found((entry & 0xFFFFF000) | address & 0xFFF, 1 << 12)

    def _found(self, gpa: int, page_size: int) -> Translation:
        return Translation(gpa, page_size, self.writable, self.user, self.executable)

    def _check_rights(self) -> None:
        """SDM 4.6.1. A page is a user page only if every level says so."""
        access, sregs = self.access, self.sregs
        if access.user:
            allowed = self.user and (self.writable or not access.write)
        else:
            allowed = self.writable or not access.write or not sregs.cr0 & CR0_WP
            if self.user and access.fetch:
                allowed = allowed and not sregs.cr4 & CR4_SMEP
            elif self.user:
                allowed = allowed and (access.smap_override or not sregs.cr4 & CR4_SMAP)
        if access.fetch:
            allowed = allowed and self.executable
        if not allowed:
            raise self._fault(PF_PRESENT)

    def _set_flags(self) -> None:
        """Set the accessed flag on the way and the dirty flag of the leaf.

        Both lie in an entry's lowest byte, and only that byte is written, only if a flag is missing: another
        vCPU that changes the entry's address at the same moment is not overwritten.
        """
        leaf = self.passed[-1]
        for at in self.passed:
            low = self.memory.read_uint(at, 1)
            wanted = low | PTE_ACCESSED | (PTE_DIRTY if at == leaf and self.access.write else 0)
            if wanted != low:
                self.memory.write_uint(at, 1, wanted)
