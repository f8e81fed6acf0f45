"""The PVH entry: 32-bit protected mode with EBX = hvm_start_info.

Sources: Xen docs/misc/pvh.pandoc ("Boot": machine state), xen/include/public/arch-x86/hvm/start_info.h
(struct hvm_start_info version 1, hvm_modlist_entry, hvm_memmap_table_entry), xen/include/public/elfnote.h
(XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry's physical address).
"""

from __future__ import annotations

import struct

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.boot_tables import BootTables
from pyvmm.arch.x86.boot.command_line import write_command_line
from pyvmm.arch.x86.boot.e820 import memory_map
from pyvmm.arch.x86.boot.elf import Elf, load_segments, notes
from pyvmm.arch.x86.boot.entry import BootOptions, EntryMode, LoadedImage
from pyvmm.arch.x86.boot.image import ImageFile
from pyvmm.arch.x86.boot.initrd import load_initrd
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ImageError
from pyvmm.kvm.state import Regs
from pyvmm.memory.guest_memory import GuestMemory

ELFNOTE_PHYS32_ENTRY = 18
START_MAGIC = 0x336EC578  # "xEn3" with the top bit of 'E' set
START_VERSION = 1

_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMMAP_ENTRY = struct.Struct("<QQII")


def pvh_entry(image: ImageFile, elf: Elf) -> int | None:
    """The entry its Xen note gives, ``None`` without one. ImageError if the note's value is malformed."""
    for name, kind, description in notes(image.read, elf):
        if name == b"Xen" and kind == ELFNOTE_PHYS32_ENTRY:
            if len(description) not in (4, 8):
                raise ImageError(image.path, "XEN_ELFNOTE_PHYS32_ENTRY", f"has {len(description)} bytes, not 4 or 8")
            return int.from_bytes(description, "little")
    return None


def load_pvh(
    memory: GuestMemory, image: ImageFile, elf: Elf, entry: int, options: BootOptions, *, linux: bool = False
) -> LoadedImage:
    """Load the segments, write the start info, enter at ``entry``; ``linux`` adds what its command line gets."""
    placement = Placement(memory, image.path, EntryMode.PROTECTED)
    load_segments(image, elf, placement)
    if not any(p.paddr <= entry < p.paddr + p.memsz for p in elf.program_headers) or entry >= layout.HOLE_END:
        raise ImageError(image.path, "XEN_ELFNOTE_PHYS32_ENTRY", f"{entry:#x} is in none of the loaded segments")
    line = options.linux_command_line() if linux else options.command_line
    command_line = write_command_line(memory, line, layout.COMMAND_LINE_MAX - 1)
    initrd = load_initrd(placement, options.initrd)
    tables = BootTables(memory)
    entries = memory_map(memory)
    memmap = tables.put(b"".join(_MEMMAP_ENTRY.pack(e.start, e.size, e.type, 0) for e in entries))
    modules = tables.put(_MODULE.pack(initrd.gpa, initrd.size, 0, 0)) if initrd else 0
    info = _START_INFO.pack(
        START_MAGIC,
        START_VERSION,
        0,  # flags: neither privileged nor initial domain
        1 if initrd else 0,
        modules,
        command_line,
        layout.ACPI_TABLES if options.acpi else 0,
        memmap,
        len(entries),
        0,
    )
    memory.write(layout.BOOT_INFO, info)
    regs = Regs(rip=entry, rbx=layout.BOOT_INFO, rsp=layout.BOOT_STACK_TOP)
    notes_ = (initrd.describe(),) if initrd else ()
    return LoadedImage(kind="pvh", mode=EntryMode.PROTECTED, regs=regs, notes=notes_)
