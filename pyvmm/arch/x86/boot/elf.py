"""ELF executables: the header, the program headers, and their segments into guest memory.

Source: System V ABI, "Object Files" (ELF header, program header); loading is by ``p_paddr``, as boot
loaders do. These two fixed records are read with ``struct`` and not with pyelftools, because importing
pyelftools costs 60 ms of the 200 ms that ``pyvmm run`` has to the guest's first instruction and because a
payload is parsed while it is still being unpacked; symbols.py, which needs sections, uses pyelftools.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pyvmm.arch.x86.boot.image import ImageFile
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ImageError
from pyvmm.trace import trace_group

T = trace_group("arch/x86/boot")

PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4

_ET_EXEC = 2
_EM_386 = 3
_EM_X86_64 = 62
_PROGRAM_HEADERS_MAX = 256
_NOTES_MAX = 1 << 16

_HEADER = {32: struct.Struct("<HHIIIIIHHHHHH"), 64: struct.Struct("<HHIQQQIHHHHHH")}
_PROGRAM = {32: struct.Struct("<IIIIIIII"), 64: struct.Struct("<IIQQQQQQ")}

ReadAt = Callable[[int, int, str], bytes]
"""``read(offset, size, field)``: exactly that many bytes of the ELF file, or an ImageError about ``field``."""


class ProgramHeader(NamedTuple):
    """One program header; ``number`` is its place in the table."""

    number: int
    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int


class Elf(NamedTuple):
    """What loading needs of an ELF file. ``bits`` is 32 or 64."""

    path: str
    bits: int
    entry: int
    program_headers: tuple[ProgramHeader, ...]

    def entry_address(self) -> int:
        """The physical address to enter: ``e_entry``, translated if it is a virtual one.

        Linux's e_entry is physical already; other kernels' may be virtual where p_vaddr and p_paddr differ.
        """
        loads = [p for p in self.program_headers if p.type == PT_LOAD]
        if any(p.paddr <= self.entry < p.paddr + p.memsz for p in loads):
            return self.entry
        for p in loads:
            if p.vaddr <= self.entry < p.vaddr + p.memsz:
                return self.entry - p.vaddr + p.paddr
        raise ImageError(self.path, "e_entry", f"{self.entry:#x} is in none of the loaded segments")


def parse_elf(read: ReadAt, path: str) -> Elf:
    """Header and program headers of an x86 executable; ImageError names the field that is wrong."""
    ident = read(0, 16, "e_ident")
    bits = {1: 32, 2: 64}.get(ident[4])
    if ident[:4] != b"\x7fELF" or bits is None or ident[5] != 1 or ident[6] != 1:
        raise ImageError(path, "e_ident", "is not a little-endian 32- or 64-bit ELF file of version 1")
    record = _HEADER[bits]
    kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, *_ = record.unpack(read(16, record.size, "ELF header"))
    if kind != _ET_EXEC:
        raise ImageError(path, "e_type", f"{kind} is not an executable at fixed addresses (ET_EXEC, {_ET_EXEC})")
    if machine not in (_EM_386, _EM_X86_64):
        raise ImageError(path, "e_machine", f"{machine} is not x86 ({_EM_386} or {_EM_X86_64})")
    program = _PROGRAM[bits]
    if phentsize != program.size:
        raise ImageError(path, "e_phentsize", f"is {phentsize}, must be {program.size}")
    if not 0 < phnum <= _PROGRAM_HEADERS_MAX:
        raise ImageError(path, "e_phnum", f"{phnum} program headers; 1 to {_PROGRAM_HEADERS_MAX} are possible")
    table = read(phoff, phnum * program.size, "program headers (e_phoff)")
    headers = []
    for index, fields in enumerate(program.iter_unpack(table)):
        if bits == 64:
            kind, _, offset, vaddr, paddr, filesz, memsz, _ = fields
        else:
            kind, offset, vaddr, paddr, filesz, memsz, _, _ = fields
        if kind == PT_INTERP:
            raise ImageError(path, "PT_INTERP", "is a program for a dynamic loader, not a kernel")
        if kind == PT_LOAD and filesz > memsz:
            raise ImageError(path, f"p_filesz of segment {index}", f"{filesz:#x} is more than p_memsz {memsz:#x}")
        headers.append(ProgramHeader(index, kind, offset, vaddr, paddr, filesz, memsz))
    return Elf(path, bits, entry, tuple(headers))


def claim_segments(elf: Elf, placement: Placement) -> list[ProgramHeader]:
    """The PT_LOAD headers with something in memory, each claimed; in file order, none overlapping."""
    loads = [p for p in elf.program_headers if p.type == PT_LOAD and p.memsz]
    if not loads:
        raise ImageError(elf.path, "program headers", "have no PT_LOAD segment: nothing to run")
    for p in loads:
        placement.claim(p.paddr, p.memsz, f"segment {p.number}", f"p_paddr of segment {p.number}")
    return sorted(loads, key=lambda p: p.offset)


def load_segments(image: ImageFile, elf: Elf, placement: Placement) -> None:
    """Copy every segment from the file and clear what the file does not give (p_filesz to p_memsz)."""
    memory = placement.memory
    for p in claim_segments(elf, placement):
        T.boot_segment.on and T.boot_segment(p.paddr, p.filesz, p.memsz)
        image.copy_to(memory, p.paddr, p.offset, p.filesz, f"segment {p.number} (p_offset, p_filesz)")
        if p.memsz > p.filesz:
            memory.zero(p.paddr + p.filesz, p.memsz - p.filesz)


class SegmentStream:
    """Segments of an ELF file that arrives in order, piece by piece, and is never held as a whole."""

    def __init__(self, elf: Elf, placement: Placement) -> None:
        self._elf = elf
        self._memory = placement.memory
        self._segments = claim_segments(elf, placement)
        self._position = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        start, end = self._position, self._position + len(view)
        for p in self._segments:
            first, last = max(start, p.offset), min(end, p.offset + p.filesz)
            if first < last:
                self._memory.write(p.paddr + first - p.offset, view[first - start : last - start])
        self._position = end

    def finish(self) -> None:
        """The file is over: every segment must have been in it; clears the rest of their memory."""
        for p in self._segments:
            T.boot_segment.on and T.boot_segment(p.paddr, p.filesz, p.memsz)
            if p.offset + p.filesz > self._position:
                raise ImageError(
                    self._elf.path,
                    f"segment {p.number} (p_offset, p_filesz)",
                    f"ends at {p.offset + p.filesz:#x}, the ELF file at {self._position:#x}",
                )
            if p.memsz > p.filesz:
                self._memory.zero(p.paddr + p.filesz, p.memsz - p.filesz)


def notes(read: ReadAt, elf: Elf) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, type, description) of every note in the PT_NOTE segments; stops at the first malformed one.

    Names and descriptions are padded to 4 bytes, in 64-bit files, too (as every toolchain does).
    """
    for p in elf.program_headers:
        if p.type != PT_NOTE or not 0 < p.filesz <= _NOTES_MAX:
            continue
        data = read(p.offset, p.filesz, f"notes in segment {p.number}")
        at = 0
        while at + 12 <= len(data):
            name_size, desc_size, kind = struct.unpack_from("<III", data, at)
            name_at = at + 12
            desc_at = name_at + (name_size + 3 & ~3)
            at = desc_at + (desc_size + 3 & ~3)
            if desc_at + desc_size > len(data):
                break
            yield data[name_at : name_at + name_size].rstrip(b"\0"), kind, data[desc_at : desc_at + desc_size]
