"""The boot GDT: one place says what is written to guest memory and what the vCPU's hidden parts hold.

Selectors are those of Linux's boot protocol (Documentation/arch/x86/boot.rst, "32-bit Boot Protocol" and
"64-bit Boot Protocol"): __BOOT_CS 0x10, __BOOT_DS 0x18, both flat 4 GiB. Multiboot leaves selectors open
and PVH asks for flat segments plus a 32-bit TSS (base 0, limit 0x67), so one table serves all three.
Descriptor layout: Intel SDM volume 3, section 3.4.5 "Segment Descriptors".
"""

from __future__ import annotations

import struct

from pyvmm.arch.x86.boot.entry import EntryMode
from pyvmm.arch.x86.descriptor import cached_segment
from pyvmm.kvm.state import Segment
from pyvmm.memory.guest_memory import GuestMemory

BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TR = 0x20

_CODE_32 = 0x00CF9B000000FFFF
_CODE_64 = 0x00AF9B000000FFFF
_DATA = 0x00CF93000000FFFF
_TSS = 0x00008B0000000067


def descriptors(mode: EntryMode) -> tuple[int, ...]:
    """The table's 8-byte entries; the TSS takes two, as long mode reads it (upper half of the base: 0)."""
    code = _CODE_64 if mode is EntryMode.LONG else _CODE_32
    return (0, 0, code, _DATA, _TSS, 0)


def gdt_limit(mode: EntryMode) -> int:
    """Limit for GDTR."""
    return 8 * len(descriptors(mode)) - 1


def write_gdt(memory: GuestMemory, gpa: int, mode: EntryMode) -> None:
    """Write the table to guest memory."""
    entries = descriptors(mode)
    memory.write(gpa, struct.pack(f"<{len(entries)}Q", *entries))


def segment(mode: EntryMode, selector: int) -> Segment:
    """What the CPU caches after loading ``selector`` from the table."""
    return cached_segment(descriptors(mode)[selector >> 3], selector)
