"""A guest's memory and registers as an ELF core file, which gdb and crash open.

::

    ELF header | PT_NOTE, one PT_LOAD a region | notes | memory of each region, holes stay holes

Notes, for each vCPU: NT_PRSTATUS (the kernel's struct elf_prstatus, pr_pid is the vCPU's number plus 1), NT_FPREGSET
(FXSAVE's 512 bytes), and ``QEMU`` (struct QEMUCPUState, by which crash finds a kernel that was moved: control
registers, descriptor tables, segments). Sources: include/uapi/linux/elfcore.h, System V ABI chapter 5, QEMU's
target/i386/arch_dump.c for the layout of its note. A PT_LOAD's virtual address is its physical one: guest page tables
are the reader's to walk. No memory begins at a page of the file, and no alignment is said: by that alone crash tells
a dump of kdump's kind from one of an older kind (netdump), which it takes to be of another host.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from pyvmm.kvm.state import Regs, Segment, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.memory.guest_memory import PAGE_SIZE, Region

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")
ET_CORE, EM_X86_64, PT_LOAD, PT_NOTE = 4, 62, 1, 4
NT_PRSTATUS, NT_FPREGSET, NT_QEMU = 1, 2, 0
_OFF_PAGE = 8
_KERNEL_GS_BASE = 0xC0000102


class Extent(NamedTuple):
    """``size`` bytes from ``gpa``, ``offset`` into ``region``."""

    region: Region
    gpa: int
    offset: int
    size: int


def extents(regions: list[Region], begin: int = 0, length: int | None = None) -> list[Extent]:
    """What of ``regions`` lies in ``[begin, begin + length)``."""
    end = 1 << 64 if length is None else begin + length
    found = []
    for region in regions:
        low, high = max(region.gpa, begin), min(region.end, end)
        if low < high:
            found.append(Extent(region, low, low - region.gpa, high - low))
    return found


def write_core(out: int, vcpus: list[Vcpu], wanted: list[Extent]) -> int:
    """Write the core file to descriptor ``out`` (a regular file, empty); its size. OSError as writing raises it."""
    notes = b"".join(_notes(vcpu) for vcpu in vcpus)
    note_at = _EHDR.size + _PHDR.size * (len(wanted) + 1)
    headers = [_PHDR.pack(PT_NOTE, 0, note_at, 0, 0, len(notes), len(notes), 4)]
    at = note_at + len(notes)
    places = []
    for extent in wanted:
        at = -(-at // PAGE_SIZE) * PAGE_SIZE + _OFF_PAGE
        places.append(at)
        headers.append(_PHDR.pack(PT_LOAD, 7, at, extent.gpa, extent.gpa, extent.size, extent.size, 0))
        at += extent.size
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    ehdr = _EHDR.pack(
        identity, ET_CORE, EM_X86_64, 1, 0, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, len(headers), 0, 0, 0
    )
    os.ftruncate(out, at)
    write_all(out, ehdr + b"".join(headers) + notes)
    for extent, place in zip(wanted, places, strict=True):
        _write_extent(out, extent, place)
    return at


def write_all(out: int, data: bytes | memoryview) -> None:
    """All of ``data`` at the file's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def _write_extent(out: int, extent: Extent, place: int) -> None:
    region = extent.region
    if region.private:  # what the guest wrote is in the mapping, not in the memfd
        os.lseek(out, place, os.SEEK_SET)
        for at in range(extent.offset, extent.offset + extent.size, 1 << 20):
            write_all(out, region._map[at : min(at + (1 << 20), extent.offset + extent.size)])
        return
    for start, end in _data_of(region.fd, extent.offset, extent.offset + extent.size):
        os.lseek(out, place + start - extent.offset, os.SEEK_SET)
        at = start
        while at < end:
            at += os.sendfile(out, region.fd, at, min(end - at, 1 << 24))


def _data_of(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of ``[at, end)`` that are no holes."""
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if at >= end:
            return
        stop = min(end, os.lseek(fd, at, os.SEEK_HOLE))
        yield at, stop
        at = stop


def _notes(vcpu: Vcpu) -> bytes:
    regs, sregs, xsave = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_xsave()
    gs_base = vcpu.get_msrs([_KERNEL_GS_BASE])[_KERNEL_GS_BASE]
    return (
        _note(b"CORE\0", NT_PRSTATUS, prstatus(vcpu.index, regs, sregs))
        + _note(b"CORE\0", NT_FPREGSET, xsave[:512])
        + _note(b"QEMU\0", NT_QEMU, _qemu_state(regs, sregs, gs_base))
    )


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    def padded(piece: bytes) -> bytes:
        return piece + bytes(-len(piece) % 4)

    return _NHDR.pack(len(name), len(data), kind) + padded(name) + padded(data)


def prstatus(index: int, regs: Regs, sregs: Sregs) -> bytes:
    """struct elf_prstatus: 336 bytes."""
    r = regs
    registers = (
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi, r.rdi,
        0xFFFFFFFFFFFFFFFF, r.rip, sregs.cs.selector, r.rflags, r.rsp, sregs.ss.selector,
        sregs.fs.base, sregs.gs.base, sregs.ds.selector, sregs.es.selector, sregs.fs.selector, sregs.gs.selector,
    )  # fmt: skip
    # siginfo, signals; pid, ppid, pgrp, sid; four struct timeval; registers; pr_fpvalid
    return struct.pack("<16xQQiiii64x27Qi4x", 0, 0, index + 1, 0, 0, 0, *registers, 1)


def _qemu_state(regs: Regs, sregs: Sregs, kernel_gs_base: int) -> bytes:
    """struct QEMUCPUState, version 1."""
    r = regs
    general = (r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp,
               r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rip, r.rflags)  # fmt: skip
    body = struct.pack("<18Q", *general)
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.ldt, sregs.tr):
        body += struct.pack("<IIIIQ", segment.selector, segment.limit, segment_flags(segment), 0, segment.base)
    for table in (sregs.gdt, sregs.idt):
        body += struct.pack("<IIIIQ", 0, table.limit, 0, 0, table.base)
    body += struct.pack("<6Q", sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4, kernel_gs_base)
    return struct.pack("<II", 1, 8 + len(body)) + body


def segment_flags(segment: Segment) -> int:
    """The attributes where a descriptor's second half has them."""
    return (
        segment.type << 8 | segment.s << 12 | segment.dpl << 13 | segment.present << 15
        | segment.avl << 20 | segment.l << 21 | segment.db << 22 | segment.g << 23
    )  # fmt: skip
