"""Where things lie in a micro guest's 2 MiB, and the tables and registers each CPU mode needs.

::

    0x0000_0000  real-mode interrupt table
    0x0000_1000  GDT                      0x0000_1800  64-bit TSS
    0x0000_2000  IDT (32- or 64-bit gates, whichever the mode needs)
    0x0000_3000  one stub per vector: ``hlt`` at 0x3000 + 16 * vector; SYSCALL_STUB behind them
    0x0000_4000  PML4, PDPT, page directory, page table (4 KiB pages; 0x9000-0x4_0000 is open to CPL 3)
    0x0000_8000  CPL 0 code               0x0000_9000  CPL 3 code
    0x0000_a000  operands                 0x0000_b000  a second page of them
    0x0001_0000  CPL 0 stack (grows down) 0x0002_0000  CPL 3 stack (grows down)

Sources: Intel SDM volume 3, chapters 3 (descriptors), 4.5 (4-level paging), 6.10-6.14 (IDT), 8.7 (64-bit TSS);
AMD APM volume 2, section 6.1.1 (SYSCALL).
"""

from __future__ import annotations

import enum
import struct

import msgspec

from pyvmm.kvm.state import Dtable, Segment, Sregs
from pyvmm.memory.guest_memory import GuestMemory

MEMORY_SIZE = 2 << 20
GDT, TSS, IDT, STUBS, PAGE_TABLES = 0x1000, 0x1800, 0x2000, 0x3000, 0x4000
SYSCALL_STUB = STUBS + 0xE00
CODE_CPL0, CODE_CPL3 = 0x8000, 0x9000
DATA, DATA_2 = 0xA000, 0xB000
STACK_CPL0, STACK_CPL3 = 0x10000, 0x20000
OPEN_TO_CPL3 = range(0x9000, 0x40000)
VECTORS = 0x81
USER_VECTOR = 0x80
OPEN_GATES = (3, 4, USER_VECTOR)
"""Those that CPL 3 may call: INT3, INTO, and one by INT n."""
HLT = b"\xf4"

KERNEL_CS64, KERNEL_DS, KERNEL_CS32 = 0x08, 0x10, 0x18
USER_CS32, USER_DS, USER_CS64, TASK = 0x23, 0x2B, 0x33, 0x38
DESCRIPTORS = (
    0,
    0x00AF9B000000FFFF,  # 0x08 CPL 0, 64-bit code
    0x00CF93000000FFFF,  # 0x10 CPL 0, data
    0x00CF9B000000FFFF,  # 0x18 CPL 0, 32-bit code
    0x00CFFB000000FFFF,  # 0x20 CPL 3, 32-bit code     SYSRET wants these three in this order
    0x00CFF3000000FFFF,  # 0x28 CPL 3, data
    0x00AFFB000000FFFF,  # 0x30 CPL 3, 64-bit code
    0x67 | TSS << 16 | 0x8B << 40,  # 0x38 busy 64-bit TSS; its upper half is zero
    0,
)

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_FSGSBASE, CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 16, 1 << 18
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
MSR_STAR, MSR_LSTAR, MSR_FMASK = 0xC0000081, 0xC0000082, 0xC0000084
RFLAGS_ONE = 1 << 1
FMASK = 0x47700
"""As Linux sets it: TF, IF, DF, IOPL, NT and AC are cleared by SYSCALL."""


class Mode(enum.Enum):
    """CPU mode and privilege a micro guest runs in."""

    REAL16 = "real16"
    PROT32 = "prot32"
    LONG64 = "long64"
    USER32 = "user32"
    """CPL 3, compatibility mode of a 64-bit kernel."""
    USER64 = "user64"

    @property
    def cpl(self) -> int:
        """Privilege level: 0 or 3."""
        return 3 if self in (Mode.USER32, Mode.USER64) else 0


def write_tables(memory: GuestMemory) -> None:
    """Interrupt table, GDT, TSS, stubs and page tables; the IDT depends on the mode (:func:`write_idt`)."""
    memory.write(0, b"".join(struct.pack("<HH", STUBS + 16 * v, 0) for v in range(VECTORS)))
    memory.write(GDT, struct.pack(f"<{len(DESCRIPTORS)}Q", *DESCRIPTORS))
    # RSP0 at offset 4; the I/O map begins behind the TSS's end, so CPL 3 may use no port.
    memory.write(TSS, struct.pack("<IQ", 0, STACK_CPL0).ljust(0x66, b"\0") + b"\x68\0")
    for vector in range(VECTORS):
        memory.write(STUBS + 16 * vector, HLT)
    memory.write(SYSCALL_STUB, HLT)
    present, user = 0x63, 0x04  # present, writable, accessed, dirty
    for level in range(3):
        table = PAGE_TABLES + level * 0x1000
        memory.write_uint(table, 8, table + 0x1000 | present | user)
    pages = [at | present | (user if at in OPEN_TO_CPL3 else 0) for at in range(0, MEMORY_SIZE, 0x1000)]
    memory.write(PAGE_TABLES + 0x3000, struct.pack(f"<{len(pages)}Q", *pages))


def write_idt(memory: GuestMemory, mode: Mode) -> None:
    """Gates to the stubs, of the size that ``mode`` needs."""
    gates = bytearray()
    for vector in range(VECTORS):
        stub = STUBS + 16 * vector
        access = 0xEE00 if vector in OPEN_GATES else 0x8E00
        if mode is Mode.PROT32:
            gates += struct.pack("<HHHH", stub, KERNEL_CS32, access, 0)
        else:
            gates += struct.pack("<HHHHQ", stub, KERNEL_CS64, access, 0, 0)
    memory.write(IDT, gates)


def special_registers(mode: Mode, reset: Sregs, cr4_bits: int) -> Sregs:
    """Special registers for ``mode``; ``reset`` gives those that are the vCPU's own. CR4: ``cr4_bits``, and PAE."""
    sregs = msgspec.structs.replace(reset)
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4 = CR0_ET | CR0_NE | CR0_MP, 0, 0, cr4_bits
    sregs.efer = 0
    sregs.gdt = Dtable(base=GDT, limit=8 * len(DESCRIPTORS) - 1)
    sregs.ldt = Segment(limit=0, type=2, unusable=1)
    if mode is Mode.REAL16:
        sregs.cs = Segment(type=0xB, s=1, present=1)
        data = Segment(type=0x3, s=1, present=1)
        sregs.idt = Dtable(base=0, limit=4 * VECTORS - 1)
        sregs.tr = Segment(limit=0xFFFF, type=0xB, present=1)
    else:
        sregs.cr0 |= CR0_PE
        long = mode is not Mode.PROT32
        sregs.idt = Dtable(base=IDT, limit=(16 if long else 8) * VECTORS - 1)
        sregs.tr = segment(TASK)
        if long:
            sregs.cr0 |= CR0_PG | CR0_WP
            sregs.cr4, sregs.cr3 = cr4_bits | CR4_PAE, PAGE_TABLES
            # NXE as every kernel has it: only then does a page fault's error code tell a fetch from a read.
            sregs.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
        code = {Mode.PROT32: KERNEL_CS32, Mode.LONG64: KERNEL_CS64, Mode.USER32: USER_CS32}.get(mode, USER_CS64)
        sregs.cs = segment(code)
        data = segment(USER_DS if mode.cpl else KERNEL_DS)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    return sregs


def segment(selector: int) -> Segment:
    """The hidden part the CPU would load for ``selector`` of :data:`DESCRIPTORS`."""
    entry = DESCRIPTORS[selector >> 3]
    limit = entry & 0xFFFF | entry >> 32 & 0xF0000
    granular = entry >> 55 & 1
    return Segment(
        base=entry >> 16 & 0xFFFFFF,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=selector,
        type=entry >> 40 & 0xF,
        s=entry >> 44 & 1,
        dpl=entry >> 45 & 3,
        present=1,
        l=entry >> 53 & 1,
        db=entry >> 54 & 1,
        g=granular,
    )
