"""Boot page tables: the low 4 GiB identity-mapped with 2 MiB pages (Intel SDM volume 3, section 4.5)."""

from __future__ import annotations

import struct

from pyvmm.arch.x86 import layout
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory

_PRESENT = 1 << 0
_WRITABLE = 1 << 1
_ACCESSED = 1 << 5
_DIRTY = 1 << 6  # set now, so that no CPU (or emulator) has to write it on first use
_LARGE = 1 << 7
_DIRECTORIES = 4
_LARGE_PAGE = 2 << 20


def write_boot_page_tables(memory: GuestMemory) -> None:
    """PML4, one PDPT and four page directories from ``layout.BOOT_PAGE_TABLES`` (24 KiB)."""
    pml4 = layout.BOOT_PAGE_TABLES
    pdpt = pml4 + PAGE_SIZE
    directory = pdpt + PAGE_SIZE
    table = _PRESENT | _WRITABLE | _ACCESSED
    memory.write(pml4, struct.pack("<Q", pdpt | table).ljust(PAGE_SIZE, b"\0"))
    pointers = [directory + i * PAGE_SIZE | table for i in range(_DIRECTORIES)]
    memory.write(pdpt, struct.pack(f"<{_DIRECTORIES}Q", *pointers).ljust(PAGE_SIZE, b"\0"))
    page = table | _DIRTY | _LARGE
    entries = [i * _LARGE_PAGE | page for i in range(512 * _DIRECTORIES)]
    memory.write(directory, struct.pack(f"<{len(entries)}Q", *entries))
