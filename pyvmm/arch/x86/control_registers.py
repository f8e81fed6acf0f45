"""Bits of CR0, CR4, EFER and RFLAGS, and what they say about the CPU's mode.

Source: Intel SDM volume 3, section 2.5 (control registers), 2.2.1 (EFER); volume 1, section 3.4.3 (RFLAGS).
"""

from __future__ import annotations

from pyvmm.kvm.state import Sregs
from pyvmm.registers import Bit

CR0_PE = 1 << 0
CR0_MP = 1 << 1
CR0_EM = 1 << 2
CR0_TS = 1 << 3
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_WP = 1 << 16
CR0_AM = 1 << 18
CR0_PG = 1 << 31

CR4_TSD = 1 << 2
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_PGE = 1 << 7
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10
CR4_LA57 = 1 << 12
CR4_FSGSBASE = 1 << 16
CR4_PCIDE = 1 << 17
CR4_OSXSAVE = 1 << 18
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21

EFER_SCE = 1 << 0
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
EFER_FFXSR = 1 << 14

FLAG_CF = 1 << 0
FLAG_PF = 1 << 2
FLAG_AF = 1 << 4
FLAG_ZF = 1 << 6
FLAG_SF = 1 << 7
FLAG_TF = 1 << 8
FLAG_IF = 1 << 9
FLAG_DF = 1 << 10
FLAG_OF = 1 << 11
FLAG_NT = 1 << 14
FLAG_RF = 1 << 16
FLAG_VM = 1 << 17
FLAG_AC = 1 << 18
STATUS_FLAGS = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF

CONTROL_BITS: dict[str, tuple[Bit, ...]] = {
    "cr0": (
        Bit(CR0_PE, "PE", "protected mode"), Bit(CR0_MP, "MP", "WAIT heeds TS"), Bit(CR0_EM, "EM", "no x87"),
        Bit(CR0_TS, "TS", "the x87's state is another task's"), Bit(CR0_ET, "ET"),
        Bit(CR0_NE, "NE", "x87 errors are #MF"),
        Bit(CR0_WP, "WP", "read-only pages are so for the kernel, too"), Bit(CR0_AM, "AM", "alignment checks possible"),
        Bit(1 << 29, "NW"), Bit(1 << 30, "CD", "caches off"), Bit(CR0_PG, "PG", "paging"),
    ),
    "cr4": (
        Bit(1 << 0, "VME"), Bit(1 << 1, "PVI"), Bit(CR4_TSD, "TSD", "RDTSC is the kernel's"), Bit(1 << 3, "DE"),
        Bit(CR4_PSE, "PSE", "4 MiB pages"), Bit(CR4_PAE, "PAE", "page-table entries of 64 bits"), Bit(1 << 6, "MCE"),
        Bit(CR4_PGE, "PGE", "global pages"), Bit(1 << 8, "PCE"), Bit(CR4_OSFXSR, "OSFXSR", "SSE"),
        Bit(CR4_OSXMMEXCPT, "OSXMMEXCPT", "SSE errors are #XM"), Bit(1 << 11, "UMIP"),
        Bit(CR4_LA57, "LA57", "five levels of page tables"), Bit(1 << 13, "VMXE"), Bit(1 << 14, "SMXE"),
        Bit(CR4_FSGSBASE, "FSGSBASE"), Bit(CR4_PCIDE, "PCIDE"), Bit(CR4_OSXSAVE, "OSXSAVE"),
        Bit(CR4_SMEP, "SMEP", "the kernel runs no user page"), Bit(CR4_SMAP, "SMAP", "nor reads one"),
        Bit(1 << 22, "PKE"),
    ),
    "efer": (
        Bit(EFER_SCE, "SCE", "SYSCALL"), Bit(EFER_LME, "LME", "long mode enabled"),
        Bit(EFER_LMA, "LMA", "long mode active"),
        Bit(EFER_NXE, "NXE", "no-execute pages"), Bit(EFER_FFXSR, "FFXSR"),
    ),
    "eflags": (
        Bit(FLAG_CF, "CF"), Bit(1 << 1, ""), Bit(FLAG_PF, "PF"), Bit(1 << 4, "AF"), Bit(FLAG_ZF, "ZF"),
        Bit(FLAG_SF, "SF"), Bit(FLAG_TF, "TF"), Bit(FLAG_IF, "IF", "interrupts on"), Bit(FLAG_DF, "DF"),
        Bit(FLAG_OF, "OF"), Bit(FLAG_NT, "NT"), Bit(FLAG_RF, "RF"), Bit(FLAG_VM, "VM", "virtual-8086 mode"),
        Bit(FLAG_AC, "AC"), Bit(1 << 19, "VIF"), Bit(1 << 20, "VIP"), Bit(1 << 21, "ID"),
    ),
}  # fmt: skip


def long_mode(sregs: Sregs) -> bool:
    """Whether IA-32e mode is active (64-bit or compatibility)."""
    return bool(sregs.efer & EFER_LMA)


def code_bits(sregs: Sregs) -> int:
    """16, 32 or 64: the default code size at RIP."""
    if long_mode(sregs) and sregs.cs.l:
        return 64
    return 32 if sregs.cs.db else 16


def privilege_level(sregs: Sregs, rflags: int) -> int:
    """CPL. In protected mode it is SS.DPL (which is what the CPU caches it as, and KVM too)."""
    if not sregs.cr0 & CR0_PE:
        return 0
    return 3 if rflags & FLAG_VM else sregs.ss.dpl


def is_canonical(sregs: Sregs, address: int) -> bool:
    """Whether the bits above the linear-address width all equal its top bit (48 bits, 57 with CR4.LA57)."""
    width = 57 if sregs.cr4 & CR4_LA57 else 48
    top = address >> (width - 1)
    return top == 0 or top == (1 << (65 - width)) - 1
