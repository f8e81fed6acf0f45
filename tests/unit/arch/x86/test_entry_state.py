"""Special registers at entry, and that they match the GDT and page tables in memory."""

from __future__ import annotations

import msgspec
import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.entry import EntryMode, LoadedImage
from pyvmm.arch.x86.boot.gdt import write_gdt
from pyvmm.arch.x86.boot.page_tables import write_boot_page_tables
from pyvmm.arch.x86.entry_state import entry_sregs
from pyvmm.kvm.state import Dtable, Regs, Segment, Sregs
from pyvmm.memory.guest_memory import GuestMemory, Region


def reset_sregs() -> Sregs:
    """What KVM reports for a new vCPU (SDM volume 3, table 10-1)."""
    data = Segment(limit=0xFFFF, type=3, s=1, present=1)
    return Sregs(
        cs=Segment(base=0xFFFF0000, limit=0xFFFF, selector=0xF000, type=0xB, s=1, present=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(limit=0xFFFF, type=0xB, present=1),
        ldt=Segment(limit=0xFFFF, type=2, present=1),
        gdt=Dtable(),
        idt=Dtable(),
        cr0=0x60000010,
        cr2=1,
        cr3=2,
        cr4=4,
        cr8=3,
        efer=0x800,
        apic_base=0xFEE00900,
        interrupt_bitmap=(1, 2, 3, 4),
    )


def enter(mode: EntryMode, cs: int = 0) -> Sregs:
    before = reset_sregs()
    kept = msgspec.json.encode(before)
    sregs = entry_sregs(LoadedImage(kind="x", mode=mode, regs=Regs(), cs=cs), before)
    assert msgspec.json.encode(before) == kept, "the argument is not changed"
    assert sregs.apic_base == 0xFEE00900 and sregs.interrupt_bitmap == (1, 2, 3, 4)
    assert (sregs.cr2, sregs.cr8) == (0, 0)
    return sregs


def test_long_mode_is_exact() -> None:
    sregs = enter(EntryMode.LONG)
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x80000011, 0x20, 0x500)
    assert sregs.cr3 == layout.BOOT_PAGE_TABLES
    assert sregs.cs == Segment(base=0, limit=0xFFFFFFFF, selector=0x10, type=0xB, present=1, s=1, l=1, g=1)
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        assert segment == Segment(base=0, limit=0xFFFFFFFF, selector=0x18, type=3, present=1, s=1, db=1, g=1)


def test_protected_mode_is_exact() -> None:
    sregs = enter(EntryMode.PROTECTED)
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x11, 0, 0, 0)
    assert sregs.cs == Segment(base=0, limit=0xFFFFFFFF, selector=0x10, type=0xB, present=1, s=1, db=1, g=1)
    assert sregs.ss == Segment(base=0, limit=0xFFFFFFFF, selector=0x18, type=3, present=1, s=1, db=1, g=1)
    assert (sregs.tr.type, sregs.tr.base, sregs.tr.limit, sregs.tr.s) == (0xB, 0, 0x67, 0), "PVH: 32-bit TSS"
    assert sregs.ldt.unusable == 1


@pytest.mark.parametrize("cs", [0, 0x1234])
def test_real_mode(cs: int) -> None:
    sregs = enter(EntryMode.REAL, cs)
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x10, 0, 0, 0)
    assert (sregs.cs.base, sregs.cs.selector, sregs.cs.limit, sregs.cs.type) == (cs << 4, cs, 0xFFFF, 0xB)
    assert (sregs.ds.base, sregs.ds.selector, sregs.ds.type) == (cs << 4, cs, 3)
    assert (sregs.ss.base, sregs.ss.selector) == (0, 0)
    assert sregs.idt == Dtable(base=0, limit=0x3FF)


@pytest.mark.parametrize("mode", [EntryMode.PROTECTED, EntryMode.LONG])
def test_hidden_parts_are_what_the_gdt_in_memory_holds(mode: EntryMode) -> None:
    memory = GuestMemory([Region(0, 1 << 20)])
    try:
        write_gdt(memory, layout.BOOT_GDT, mode)
        sregs = enter(mode)
        assert sregs.gdt.base == layout.BOOT_GDT
        for segment in (sregs.cs, sregs.ds, sregs.tr):
            assert segment.selector + 7 <= sregs.gdt.limit
            low, high = (memory.read_uint(sregs.gdt.base + segment.selector + i, 4) for i in (0, 4))
            limit = low & 0xFFFF | high & 0xF0000
            if high >> 23 & 1:
                limit = limit << 12 | 0xFFF
            base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
            assert (segment.base, segment.limit) == (base, limit)
            assert (segment.type, segment.s, segment.dpl, segment.present) == (
                high >> 8 & 0xF,
                high >> 12 & 1,
                high >> 13 & 3,
                high >> 15 & 1,
            )
            assert (segment.avl, segment.l, segment.db, segment.g) == tuple(high >> bit & 1 for bit in (20, 21, 22, 23))
    finally:
        memory.close()


def translate(memory: GuestMemory, cr3: int, virtual: int) -> int | None:
    """A walk of 4-level tables with 2 MiB pages, as SDM volume 3, figure 4-9 draws it."""
    table = cr3
    for shift in (39, 30, 21):
        entry = memory.read_uint(table + (virtual >> shift & 511) * 8, 8)
        if entry & 3 != 3:
            return None
        table = entry & 0x000FFFFFFFFFF000
        if shift == 21:
            assert entry & 1 << 7 and table % (2 << 20) == 0
    return table + virtual % (2 << 20)


def test_boot_page_tables_map_the_low_4_gib_to_themselves() -> None:
    memory = GuestMemory([Region(0, 1 << 20)])
    try:
        memory.write(layout.BOOT_PAGE_TABLES, b"\xff" * (layout.BOOT_PAGE_TABLES_END - layout.BOOT_PAGE_TABLES))
        write_boot_page_tables(memory)
        for address in (0, 0x7000, 0x1FFFFF, 0x200000, 0x12345678, 0xC0000000, 0xFEE00123, 0xFFFFFFFF):
            assert translate(memory, layout.BOOT_PAGE_TABLES, address) == address
        for address in (1 << 32, 1 << 39, 1 << 47):
            assert translate(memory, layout.BOOT_PAGE_TABLES, address) is None
    finally:
        memory.close()
