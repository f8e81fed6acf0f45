"""Multiboot 1: ELF files and files that give their own load addresses (the "a.out kludge").

Source: Multiboot Specification 0.6.96: 3.1 "OS image format", 3.2 "Machine state", 3.3 "Boot information
format". kvm-unit-tests' images are of this kind: 32-bit ELF (also for tests that run in long mode), linked
at 4 MiB, header flags 0, so loaded by their program headers.
"""

from __future__ import annotations

import os
import struct

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.boot_tables import BootTables
from pyvmm.arch.x86.boot.command_line import write_command_line
from pyvmm.arch.x86.boot.e820 import memory_map
from pyvmm.arch.x86.boot.elf import load_segments, parse_elf
from pyvmm.arch.x86.boot.entry import BootOptions, EntryMode, LoadedImage
from pyvmm.arch.x86.boot.image import MULTIBOOT_SEARCH, ImageFile, find_multiboot_header
from pyvmm.arch.x86.boot.initrd import load_initrd
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ImageError
from pyvmm.kvm.state import Regs
from pyvmm.memory.guest_memory import GuestMemory

LOADER_MAGIC = 0x2BADB002  # EAX at entry

WANTS_PAGE_ALIGN = 1 << 0  # modules on page boundaries: always so here
WANTS_MEMORY = 1 << 1  # memory information: always given
WANTS_VIDEO = 1 << 2
HAS_ADDRESSES = 1 << 16
_REQUIREMENTS = 0xFFFF  # bits 0-15: not fulfilled or not known means not loaded (3.1.2)

INFO_MEMORY = 1 << 0
INFO_COMMAND_LINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MEMORY_MAP = 1 << 6
INFO_LOADER_NAME = 1 << 9

_INFO_SIZE = 116  # up to and including framebuffer fields, which stay zero
_HEADER_ADDRESSES = struct.Struct("<IIIII")
_MAP_ENTRY = struct.Struct("<IQQI")
_MODULE = struct.Struct("<IIII")


def load_multiboot(memory: GuestMemory, image: ImageFile, options: BootOptions) -> LoadedImage:
    """Load the image, write the boot information, enter with EAX = magic, EBX = information."""
    placement = Placement(memory, image.path, EntryMode.PROTECTED)
    head = image.head(MULTIBOOT_SEARCH)
    at = find_multiboot_header(head)
    if at is None:
        raise ImageError(image.path, "Multiboot header", "there is none in the first 8 KiB")
    flags = int.from_bytes(head[at + 4 : at + 8], "little")
    if flags & WANTS_VIDEO:
        raise ImageError(image.path, "Multiboot flags", "bit 2 asks for a video mode, and there is no display")
    if unknown := flags & _REQUIREMENTS & ~(WANTS_PAGE_ALIGN | WANTS_MEMORY):
        raise ImageError(image.path, "Multiboot flags", f"unknown requirement bits {unknown:#x}")
    if flags & HAS_ADDRESSES:
        entry = _load_by_addresses(placement, image, at)
    elif head.startswith(b"\x7fELF"):
        elf = parse_elf(image.read, image.path)
        load_segments(image, elf, placement)
        entry = elf.entry_address()
    else:
        raise ImageError(image.path, "Multiboot flags", "bit 16 (load addresses) is clear and the file is not ELF")
    if entry >= layout.HOLE_END:
        raise ImageError(image.path, "entry", f"{entry:#x} is not a 32-bit address")
    notes = _write_info(placement, options)
    regs = Regs(rip=entry, rax=LOADER_MAGIC, rbx=layout.BOOT_INFO, rsp=layout.BOOT_STACK_TOP)
    return LoadedImage(kind="multiboot", mode=EntryMode.PROTECTED, regs=regs, notes=notes)


def _load_by_addresses(placement: Placement, image: ImageFile, header_at: int) -> int:
    """Load by the header's address fields (3.1.3); returns the entry address."""
    fields = image.read(header_at + 12, _HEADER_ADDRESSES.size, "Multiboot address fields")
    entry: int
    header_addr, load_addr, load_end, bss_end, entry = _HEADER_ADDRESSES.unpack(fields)
    start = header_at - (header_addr - load_addr)  # file offset of what goes to load_addr
    if load_addr > header_addr or start < 0:
        raise ImageError(image.path, "load_addr", f"{load_addr:#x} does not fit header_addr {header_addr:#x}")
    size = load_end - load_addr if load_end else image.size - start
    end = load_addr + size
    if size <= 0 or start + size > image.size:
        raise ImageError(image.path, "load_end_addr", f"{load_end:#x}: {size} bytes at {start:#x} are not in the file")
    if bss_end and bss_end < end:
        raise ImageError(image.path, "bss_end_addr", f"{bss_end:#x} is below the end of the data at {end:#x}")
    if not load_addr <= entry < end:
        raise ImageError(image.path, "entry_addr", f"{entry:#x} is outside {load_addr:#x}..{end:#x}")
    bss_end = bss_end or end
    placement.claim(load_addr, bss_end - load_addr, "the image", "load_addr")
    image.copy_to(placement.memory, load_addr, start, size, "image")
    if bss_end > end:
        placement.memory.zero(end, bss_end - end)
    return entry


def _write_info(placement: Placement, options: BootOptions) -> tuple[str, ...]:
    """The information structure (3.3) and what it points to; returns notes for humans."""
    memory = placement.memory
    # As GRUB and QEMU do, the line begins with the image's name: argv[0] for those who parse it as arguments.
    line = f"{placement.path} {options.command_line}".rstrip(" ")
    command_line = write_command_line(memory, line, layout.COMMAND_LINE_MAX - 1)
    initrd = load_initrd(placement, options.initrd)
    tables = BootTables(memory)
    ranges = memory_map(memory)
    # mem_upper: KiB of RAM from 1 MiB up to the first hole.
    mem_upper = sum(r.size for r in ranges if r.start == layout.HIGH_RAM) // layout.KIB
    # The size field does not count itself.
    entries = [_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, e.start, e.size, e.type) for e in ranges]
    memory_map_at = tables.put(b"".join(entries))
    modules = count = 0
    if initrd:
        name = tables.put(os.fsencode(initrd.path) + b"\0")
        modules, count = tables.put(_MODULE.pack(initrd.gpa, initrd.gpa + initrd.size, name, 0)), 1
    loader_name = tables.put(b"pyvmm\0")
    info = bytearray(_INFO_SIZE)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME
    struct.pack_into("<III", info, 0, flags, layout.EBDA // layout.KIB, mem_upper)
    struct.pack_into("<III", info, 16, command_line, count, modules)
    struct.pack_into("<II", info, 44, len(entries) * _MAP_ENTRY.size, memory_map_at)
    struct.pack_into("<I", info, 64, loader_name)
    memory.write(layout.BOOT_INFO, info)
    return (initrd.describe(),) if initrd else ()
