"""``info registers`` in the format of QEMU's monitor (target/i386/cpu-dump.c has the layout)."""

from __future__ import annotations

import struct

from pyvmm.arch.x86.control_registers import long_mode
from pyvmm.kvm.state import Segment, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.native import lib
from pyvmm.qmp.core_dump import segment_flags

_CR0_PE = 1
_FLAGS = (("C", 0), ("P", 2), ("A", 4), ("Z", 6), ("S", 7), ("O", 11), ("D", 10))
_GENERAL_64 = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
               "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")  # fmt: skip
_SEGMENTS = (("ES", "es"), ("CS", "cs"), ("SS", "ss"), ("DS", "ds"), ("FS", "fs"), ("GS", "gs"), ("LDT", "ldt"),
             ("TR", "tr"))  # fmt: skip
_SYSTEM_32 = (
    "Reserved", "TSS16-avl", "LDT", "TSS16-busy", "CallGate16", "TaskGate", "IntGate16", "TrapGate16",
    "Reserved", "TSS32-avl", "Reserved", "TSS32-busy", "CallGate32", "Reserved", "IntGate32", "TrapGate32",
)  # fmt: skip
_SYSTEM_64 = (
    "<hiword>", "Reserved", "LDT", "Reserved", "Reserved", "Reserved", "Reserved", "Reserved",
    "Reserved", "TSS64-avl", "Reserved", "TSS64-busy", "CallGate64", "Reserved", "IntGate64", "TrapGate64",
)  # fmt: skip


def register_lines(vcpu: Vcpu) -> list[str]:
    """All registers of a vCPU that stands still."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    wide = bool(long_mode(sregs) and sregs.cs.l)
    lines = ["", f"CPU#{vcpu.index}"]
    if wide:
        cells = [f"{name.upper():<3}={getattr(regs, name):016x}" for name in _GENERAL_64]
        rip, flags_name = f"RIP={regs.rip:016x}", "RFL"
    else:
        cells = [f"E{name[1:].upper()}={getattr(regs, name) & 0xFFFFFFFF:08x}" for name in _GENERAL_64[:8]]
        rip, flags_name = f"EIP={regs.rip & 0xFFFFFFFF:08x}", "EFL"
    lines += [" ".join(cells[at : at + 4]) for at in range(0, len(cells), 4)]
    shown = "".join(mark if regs.rflags >> bit & 1 else "-" for mark, bit in reversed(_FLAGS))
    events = vcpu.get_events()
    cpl = sregs.ss.dpl if sregs.cr0 & _CR0_PE else 0
    halted = int(vcpu.get_mp_state() == lib.KVM_MP_STATE_HALTED)
    lines.append(
        f"{rip} {flags_name}={regs.rflags:08x} [{shown}] CPL={cpl} II={int(events.interrupt_shadow != 0)}"
        f" A20=1 SMM={events.smi_smm} HLT={halted}"
    )
    lines += [_segment_line(name, getattr(sregs, field), sregs, wide) for name, field in _SEGMENTS]
    width = 16 if long_mode(sregs) else 8
    for name, table in (("GDT", sregs.gdt), ("IDT", sregs.idt)):
        lines.append(f"{name}=     {table.base:0{width}x} {table.limit:08x}")
    lines.append(
        f"CR0={sregs.cr0:08x} CR2={sregs.cr2:0{width}x} CR3={sregs.cr3:0{width}x} CR4={sregs.cr4:08x}"
    )
    debug = vcpu.get_debugregs()
    lines.append("".join(f"DR{number}={value:016x} " for number, value in enumerate(debug.db)))
    lines.append(f"DR6={debug.dr6:016x} DR7={debug.dr7:016x}")
    lines.append(f"EFER={sregs.efer:016x}")
    return lines + _floating_point(vcpu.get_xsave(), 16 if wide else 8)


def _segment_line(name: str, segment: Segment, sregs: Sregs, wide: bool) -> str:
    base = f"{segment.base:016x}" if wide else f"{segment.base & 0xFFFFFFFF:08x}"
    flags = segment_flags(segment)
    line = f"{name:<3}={segment.selector:04x} {base} {segment.limit:08x} {flags:08x}"
    if not sregs.cr0 & _CR0_PE or not segment.present:
        return line
    if not segment.s:
        names = _SYSTEM_64 if long_mode(sregs) else _SYSTEM_32
        return f"{line} DPL={segment.dpl} {names[segment.type & 15]}"
    kind = segment.type
    if kind & 8:
        size = "CS64" if segment.l else "CS32" if segment.db else "CS16"
        rights = ("C" if kind & 4 else "-") + ("R" if kind & 2 else "-")
    else:
        size = "DS  " if segment.db or long_mode(sregs) else "DS16"
        rights = ("E" if kind & 4 else "-") + ("W" if kind & 2 else "-")
    return f"{line} DPL={segment.dpl} {size} [{rights}{'A' if kind & 1 else '-'}]"


def _floating_point(xsave: bytes, vectors: int) -> list[str]:
    """From the legacy region of XSAVE (SDM volume 1, table 13-1). x87 registers by their physical number."""
    control, status, tags = struct.unpack_from("<HHB", xsave, 0)
    (mxcsr,) = struct.unpack_from("<I", xsave, 24)
    top = status >> 11 & 7
    lines = [f"FCW={control:04x} FSW={status:04x} [ST={top}] FTW={tags:02x} MXCSR={mxcsr:08x}"]
    cells = []
    for number in range(8):
        mantissa, exponent = struct.unpack_from("<QH", xsave, 32 + 16 * (number - top & 7))
        cells.append(f"FPR{number}={mantissa:016x} {exponent:04x}")
    for number in range(vectors):
        low, high = struct.unpack_from("<QQ", xsave, 160 + 16 * number)
        cells.append(f"XMM{number:02d}={high:016x} {low:016x}")
    return lines + [" ".join(cells[at : at + 2]) for at in range(0, len(cells), 2)]
