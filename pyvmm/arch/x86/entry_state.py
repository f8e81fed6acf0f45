"""Special registers of the boot vCPU at an image's first instruction.

Sources: Linux Documentation/arch/x86/boot.rst ("64-bit Boot Protocol": long mode, identity-mapped page
tables, __BOOT_CS 0x10 execute/read, __BOOT_DS 0x18 read/write, interrupts off); Multiboot 0.6.96, section
3.2 "Machine state"; Xen docs/misc/pvh.pandoc "Boot" (CR0.PE only, CR4 zero, flat segments, TR a 32-bit
TSS with limit 0x67); Intel SDM volume 3, section 10.1.1 for what a reset leaves.
"""

from __future__ import annotations

import msgspec

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.entry import EntryMode, LoadedImage
from pyvmm.arch.x86.boot.gdt import BOOT_CS, BOOT_DS, BOOT_TR, gdt_limit, segment
from pyvmm.kvm.state import Dtable, Segment, Sregs

CR0_PE = 1 << 0
CR0_ET = 1 << 4  # hardwired to 1 since the 486: "cleared" in the protocols cannot mean it
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10


def entry_sregs(image: LoadedImage, sregs: Sregs) -> Sregs:
    """``sregs`` (as KVM reports them after vCPU creation) changed to what ``image`` is entered with.

    APIC base and pending interrupts are kept, since they are the vCPU's own. ``sregs`` is not modified.
    """
    if image.mode is EntryMode.REAL:
        return _real(image, sregs)
    mode = image.mode
    data = segment(mode, BOOT_DS)
    long = mode is EntryMode.LONG
    return msgspec.structs.replace(
        sregs,
        cs=segment(mode, BOOT_CS),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=segment(mode, BOOT_TR),
        ldt=Segment(limit=0, type=2, unusable=1),
        gdt=Dtable(base=layout.BOOT_GDT, limit=gdt_limit(mode)),
        # No protocol promises an IDT: with limit 0 an early exception is a triple fault, not a jump into zeros.
        idt=Dtable(base=layout.BOOT_IDT, limit=0),
        cr0=CR0_PE | CR0_ET | (CR0_PG if long else 0),
        cr2=0,
        cr3=layout.BOOT_PAGE_TABLES if long else 0,
        cr4=CR4_PAE if long else 0,
        cr8=0,
        efer=EFER_LME | EFER_LMA if long else 0,
    )


def _real(image: LoadedImage, sregs: Sregs) -> Sregs:
    """Real mode: CS = DS = ES = FS = GS = ``image.cs``, SS 0, the interrupt table at 0."""

    def at(selector: int, kind: int) -> Segment:
        return Segment(base=selector << 4, limit=0xFFFF, selector=selector, type=kind, s=1, present=1)

    data = at(image.cs, 0x3)  # read/write, accessed
    return msgspec.structs.replace(
        sregs,
        cs=at(image.cs, 0xB),  # execute/read, accessed
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=at(0, 0x3),
        gdt=Dtable(base=0, limit=0xFFFF),
        idt=Dtable(base=0, limit=0x3FF),
        cr0=CR0_ET,
        cr2=0,
        cr3=0,
        cr4=0,
        cr8=0,
        efer=0,
    )
