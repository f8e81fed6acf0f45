"""What mode a CPU is in, and how it changed from one look to the next."""

from __future__ import annotations

from dataclasses import dataclass

from pyvmm.arch.x86.control_registers import (
    CONTROL_BITS,
    CR0_PE,
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    FLAG_VM,
    long_mode,
    privilege_level,
)
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.registers import Bit


@dataclass(frozen=True)
class Mode:
    """``name``: real, protected, 64-bit...; ``paging``: how addresses are translated."""

    name: str
    paging: str
    cpl: int
    cr0: int
    cr4: int
    efer: int

    def __str__(self) -> str:
        return f"{self.name} mode, {self.paging}, CPL {self.cpl}"


def mode_of(regs: Regs, sregs: Sregs) -> Mode:
    """The mode (Intel SDM volume 3, 2.2)."""
    if long_mode(sregs):
        name = "64-bit" if sregs.cs.l else "compatibility"
    elif not sregs.cr0 & CR0_PE:
        name = "real"
    elif regs.rflags & FLAG_VM:
        name = "virtual-8086"
    else:
        name = "32-bit protected" if sregs.cs.db else "16-bit protected"
    if not sregs.cr0 & CR0_PG:
        paging = "no paging"
    elif long_mode(sregs):
        paging = f"{5 if sregs.cr4 & CR4_LA57 else 4}-level paging"
    else:
        paging = "PAE paging" if sregs.cr4 & CR4_PAE else "32-bit paging"
    return Mode(name, paging, privilege_level(sregs, regs.rflags), sregs.cr0, sregs.cr4, sregs.efer)


def changes(before: Mode, after: Mode) -> list[str]:
    """What is different, a sentence each."""
    said = []
    if before.name != after.name:
        said.append(f"{before.name} mode -> {after.name} mode")
    if before.paging != after.paging:
        said.append(f"{before.paging} -> {after.paging}")
    for register in ("cr0", "cr4", "efer"):
        said += _bit_changes(register, getattr(before, register), getattr(after, register))
    if before.cpl != after.cpl:
        said.append(f"CPL {before.cpl} -> CPL {after.cpl}" + (": a program" if after.cpl == 3 else ""))
    return said


def _bit_changes(register: str, before: int, after: int) -> list[str]:
    said = []
    for bit in CONTROL_BITS[register]:
        if (before ^ after) & bit.mask:
            said.append(f"{register.upper()}.{bit.name} {'set' if after & bit.mask else 'cleared'}{_meaning(bit)}")
    return said


def _meaning(bit: Bit) -> str:
    return f" ({bit.text})" if bit.text else ""
