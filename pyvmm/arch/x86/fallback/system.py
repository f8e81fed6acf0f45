"""Software interrupts, SMAP's CLAC/STAC, INVPCID, segment bases, processor ID, random numbers, hints.

Source: Intel SDM volume 2, the page of each instruction.
"""

from __future__ import annotations

import msgspec

from pyvmm.arch.x86.control_registers import (
    CR4_FSGSBASE,
    CR4_PCIDE,
    CR4_TSD,
    FLAG_AC,
    FLAG_CF,
    FLAG_OF,
    STATUS_FLAGS,
    is_canonical,
)
from pyvmm.arch.x86.fallback.delivery import software_interrupt
from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.operands import MemoryOperand
from pyvmm.arch.x86.fallback.registry import handles
from pyvmm.arch.x86.faults import Vector, general_protection, undefined

RAX, RCX, RDX = 0, 1, 2
MSR_TSC = 0x10
MSR_TSC_AUX = 0xC0000103
INVPCID_ADDRESS, INVPCID_CONTEXT, INVPCID_ALL, INVPCID_ALL_BUT_GLOBAL = range(4)


@handles("int3")
def int3(x: Execution) -> None:
    """#BP as a trap: the saved RIP is the next instruction's."""
    software_interrupt(x, Vector.BP)


@handles("int")
def int_n(x: Execution) -> None:
    """INT n."""
    software_interrupt(x, x.load(x.operands[0]))


@handles("into")
def into(x: Execution) -> None:
    """#OF as a trap if OF is set. Not decodable in 64-bit mode."""
    if x.regs.rflags & FLAG_OF:
        software_interrupt(x, Vector.OF)


@handles("clac", "stac")
def access_control(x: Execution) -> None:
    """Clear or set RFLAGS.AC; #UD above CPL 0."""
    if x.cpl:
        raise undefined()
    x.set_flags(FLAG_AC, FLAG_AC if x.decoded.mnemonic == "stac" else 0)


@handles("invpcid")
def invpcid(x: Execution) -> None:
    """Checked as the CPU does, then everything is flushed: more than asked for is always allowed."""
    x.require_kernel()
    kind = x.load(x.operands[0])
    descriptor = x.load_bytes(x.memory(1), 16)
    pcid, address = int.from_bytes(descriptor[:8], "little"), int.from_bytes(descriptor[8:], "little")
    if kind > INVPCID_ALL_BUT_GLOBAL or pcid >> 12:
        raise general_protection()
    if kind <= INVPCID_CONTEXT and pcid and not x.sregs.cr4 & CR4_PCIDE:
        raise general_protection()
    if kind == INVPCID_ADDRESS and x.bits == 64 and not is_canonical(x.sregs, address):
        raise general_protection()
    x.flushes_tlb = True


@handles("rdfsbase", "rdgsbase")
def read_segment_base(x: Execution) -> None:
    """FS or GS base into a register; a 32-bit form takes the low half."""
    _require_fsgsbase(x)
    x.store(x.operands[0], getattr(x.sregs, x.decoded.mnemonic[2:4]).base)


@handles("wrfsbase", "wrgsbase")
def write_segment_base(x: Execution) -> None:
    """Set FS or GS base; #GP(0) if not canonical."""
    _require_fsgsbase(x)
    base = x.load(x.operands[0])
    if not is_canonical(x.sregs, base):
        raise general_protection()
    name = x.decoded.mnemonic[2:4]
    x.replace_sregs(**{name: msgspec.structs.replace(getattr(x.sregs, name), base=base)})


def _require_fsgsbase(x: Execution) -> None:
    if x.bits != 64 or not x.sregs.cr4 & CR4_FSGSBASE:
        raise undefined()


@handles("rdpid")
def rdpid(x: Execution) -> None:
    """IA32_TSC_AUX."""
    x.store(x.operands[0], x.context.get_msr(MSR_TSC_AUX) & 0xFFFFFFFF)


@handles("rdtscp")
def rdtscp(x: Execution) -> None:
    """Time-stamp counter and IA32_TSC_AUX."""
    if x.sregs.cr4 & CR4_TSD and x.cpl:
        raise general_protection()
    tsc = x.context.get_msr(MSR_TSC)
    x.set_gpr(RAX, 4, tsc)
    x.set_gpr(RDX, 4, tsc >> 32)
    x.set_gpr(RCX, 4, x.context.get_msr(MSR_TSC_AUX))


@handles("rdrand", "rdseed")
def random(x: Execution) -> None:
    """The host's random numbers; there always is one, so CF is set."""
    size = x.size(0)
    x.store(x.operands[0], int.from_bytes(x.context.random_bytes(size), "little"))
    x.set_flags(STATUS_FLAGS, FLAG_CF)


@handles("lfence", "mfence", "sfence")
def fence(x: Execution) -> None:
    """Nothing to order: an exit from the guest is a fence already."""


@handles("prefetcht0", "prefetcht1", "prefetcht2", "prefetchnta", "prefetchw", "prefetchwt1", "prefetch")
def prefetch(x: Execution) -> None:
    """A hint, and it never faults."""


@handles("clflush", "clflushopt", "clwb")
def cache_line(x: Execution) -> None:
    """Host caches are coherent, so only the access check of a one-byte load is left."""
    operand = x.operands[0]
    if isinstance(operand, MemoryOperand):
        x.load_memory(operand, 1)


@handles("movnti")
def movnti(x: Execution) -> None:
    """A store from a general register."""
    x.store(x.operands[0], x.load(x.operands[1]))
