"""Taking back a #BP or #DB that a KVM which runs 64-bit CPL 3 natively has handed to the guest.

On such hosts INT3 in user code, and the trap after a step there, go through the guest's IDT; in real mode INT3 goes
through its interrupt table. A breakpoint on the handler (native/guest_debug.c) stops the vCPU before the handler's
first instruction; what the CPU pushed is all that changed, so it is put back. Frames: Intel SDM volume 3, 6.14.2
(64-bit) and 20.1.4 (real mode).
"""

from __future__ import annotations

import struct

from pyvmm.arch.x86.control_registers import long_mode
from pyvmm.arch.x86.descriptor import cached_segment
from pyvmm.gdb.linear_memory import read_memory
from pyvmm.kvm.state import Regs, Segment, Sregs
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.memory.guest_memory import GuestMemory

VECTOR_DB, VECTOR_BP = 1, 3
_FLAG_TF = 1 << 8
_DR6_STEP = 1 << 14


class Frame:
    """What the handler would return to. ``pc`` is linear."""

    def __init__(self, rip: int, cs: int, flags: int, pc: int, stack: tuple[int, int] | None) -> None:
        self.rip = rip
        self.cs = cs
        self.flags = flags
        self.pc = pc
        self.stack = stack
        """RSP and SS, in 64-bit mode."""


def read_frame(memory: GuestMemory, regs: Regs, sregs: Sregs) -> Frame | None:
    """The frame at the stack's top; ``None`` if it is not one of CPL 3 (64-bit mode), or unreadable."""
    if long_mode(sregs):
        raw = read_memory(memory, sregs, regs.rsp, 40)
        if len(raw) < 40:
            return None
        rip, cs, flags, rsp, ss = struct.unpack("<5Q", raw)
        return Frame(rip, cs, flags, rip, (rsp, ss)) if cs & 3 == 3 else None
    if sregs.cr0 & 1:
        return None
    raw = read_memory(memory, sregs, sregs.ss.base + (regs.rsp & 0xFFFF), 6)
    if len(raw) < 6:
        return None
    ip, cs, flags = struct.unpack("<3H", raw)
    return Frame(ip, cs, flags, (cs << 4) + ip, None)


def take_back(vcpu: Vcpu, memory: GuestMemory, frame: Frame, back: int) -> None:
    """Put ``vcpu`` where it was, ``back`` bytes before what the frame says. In its thread."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    regs.rip = frame.rip - back
    if frame.stack is None:
        regs.rsp = regs.rsp & ~0xFFFF | (regs.rsp + 6) & 0xFFFF
        regs.rflags = regs.rflags & ~0xFFFF | frame.flags
        sregs.cs.selector, sregs.cs.base = frame.cs, frame.cs << 4
    else:
        regs.rsp, stack_selector = frame.stack
        regs.rflags = frame.flags & ~_FLAG_TF
        sregs.cs = _user_segment(memory, sregs, frame.cs)
        sregs.ss = _user_segment(memory, sregs, stack_selector)
        debug = vcpu.get_debugregs()
        debug.dr6 &= ~_DR6_STEP
        vcpu.set_debugregs(debug)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)


def _user_segment(memory: GuestMemory, sregs: Sregs, selector: int) -> Segment:
    """What the CPU had loaded for ``selector``."""
    table = sregs.ldt.base if selector & 4 else sregs.gdt.base
    raw = read_memory(memory, sregs, table + (selector & 0xFFF8), 8)
    segment = cached_segment(int.from_bytes(raw, "little"), selector & 0xFFFF)
    segment.type |= 1  # accessed, as it was when it was in use
    return segment
