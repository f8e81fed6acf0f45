"""A software interrupt (INT n, INT3, INTO) delivered through the guest's IDT, in software.

Why not by KVM_SET_VCPU_EVENTS: it refuses exception numbers above 31, an injected interrupt marked "soft"
needs an instruction length only the host's KVM knows, one not marked soft needs RFLAGS.IF, and none of them
checks the gate's DPL. Delivering here is the same on every host, and the saved RIP is the next instruction's.
Faults on the way (a gate that is absent, a stack that is not mapped) are the instruction's own faults.

Source: Intel SDM volume 3, sections 6.12 (32-bit), 6.14 (64-bit), 20.1.4 (real mode); volume 2, "INT n".
Not carried out: task gates and virtual-8086 mode.
"""

from __future__ import annotations

import msgspec

from pyvmm.arch.x86.control_registers import (
    FLAG_AC,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    is_canonical,
    long_mode,
)
from pyvmm.arch.x86.descriptor import cached_segment
from pyvmm.arch.x86.fallback.context import Privilege
from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.operands import SIZE_MASK
from pyvmm.arch.x86.faults import CpuFault, Vector, general_protection
from pyvmm.kvm.state import Segment

GATE_INTERRUPT_16, GATE_TRAP_16, GATE_INTERRUPT_32, GATE_TRAP_32 = 0x6, 0x7, 0xE, 0xF
GATE_TASK = 0x5
_IDT_ENTRY = 2  # error-code bit: the selector field is an IDT index
_TABLE = 4  # selector bit: local descriptor table


def software_interrupt(x: Execution, vector: int) -> None:
    """Make ``x`` enter the handler of ``vector``."""
    if not x.protected:
        _real_mode(x, vector)
    else:
        _Delivery(x, vector).run()


def _real_mode(x: Execution, vector: int) -> None:
    """FLAGS, CS and IP on the stack; CS:IP from the interrupt vector table."""
    if 4 * vector + 3 > x.sregs.idt.limit:
        raise general_protection()
    entry = _system(x, x.sregs.idt.base + 4 * vector, 4)
    _push(x, x.sregs.ss, 2, (x.regs.rflags, x.sregs.cs.selector, x.regs.rip), Privilege.SUPERVISOR)
    x.regs.rflags &= ~(FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF)
    selector = entry >> 16
    x.replace_sregs(cs=msgspec.structs.replace(x.sregs.cs, selector=selector, base=selector << 4))
    x.regs.rip = entry & 0xFFFF


def _system(x: Execution, address: int, size: int) -> int:
    """An integer from a descriptor table or the TSS."""
    if not long_mode(x.sregs):
        address &= SIZE_MASK[4]
    return int.from_bytes(x.context.read(address, size, Privilege.SYSTEM), "little")


def _push(x: Execution, stack: Segment, size: int, values: tuple[int, ...], privilege: Privilege) -> None:
    """Push ``values``, first one first, on ``stack`` from the current (E)SP; 16- and 32-bit stacks only."""
    kept = x.sregs
    x.replace_sregs(ss=stack)
    pointer_size = 4 if stack.db else 2
    pointer = x.gpr(4, pointer_size)
    for value in values:
        pointer = (pointer - size) & SIZE_MASK[pointer_size]
        address = x.linear_in_segment("ss", pointer, size, write=True)
        x.queue_write(address, (value & SIZE_MASK[size]).to_bytes(size, "little"), privilege)
    x.sregs = kept
    x.set_gpr(4, pointer_size, pointer)


class _Delivery:
    """One delivery in protected or long mode."""

    def __init__(self, x: Execution, vector: int) -> None:
        self.x = x
        self.vector = vector
        self.long = long_mode(x.sregs)
        self.error = vector * 8 + _IDT_ENTRY

    def run(self) -> None:
        """Gate, then code segment, then stack, in the order in which the CPU faults."""
        x = self.x
        size = 16 if self.long else 8
        if size * self.vector + size - 1 > x.sregs.idt.limit:
            raise general_protection(self.error)
        gate = _system(x, x.sregs.idt.base + size * self.vector, size)
        kind, dpl = gate >> 40 & 0x1F, gate >> 45 & 3
        allowed = {GATE_INTERRUPT_32, GATE_TRAP_32}
        if not self.long:
            allowed |= {GATE_INTERRUPT_16, GATE_TRAP_16, GATE_TASK}
        if kind not in allowed or dpl < x.cpl:
            raise general_protection(self.error)
        if not gate >> 47 & 1:
            raise CpuFault(Vector.NP, self.error)
        if kind == GATE_TASK:
            raise x.unknown("task gate")
        selector = gate >> 16 & 0xFFFF
        code = self._code_segment(selector)
        inner = not code.type & 4 and code.dpl < x.cpl  # a conforming segment runs at the caller's level
        level = code.dpl if inner else x.cpl
        offset = gate & 0xFFFF | gate >> 32 & 0xFFFF0000
        if self.long:
            offset |= (gate >> 64 & SIZE_MASK[4]) << 32
            self._long_stack(gate >> 32 & 7, inner, level)
            if not is_canonical(x.sregs, offset):
                raise general_protection()
        else:
            wide = kind in (GATE_INTERRUPT_32, GATE_TRAP_32)
            offset &= SIZE_MASK[4 if wide else 2]
            self._legacy_stack(4 if wide else 2, inner, level)
            if offset > code.limit:
                raise general_protection()
        x.replace_sregs(cs=msgspec.structs.replace(code, selector=selector & ~3 | level))
        x.regs.rip = offset
        x.regs.rflags &= ~(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)
        if kind in (GATE_INTERRUPT_32, GATE_INTERRUPT_16):
            x.regs.rflags &= ~FLAG_IF

    # -- segments -------------------------------------------------------------------------------

    def _descriptor(self, selector: int, vector: Vector) -> tuple[Segment, int]:
        """(what loading ``selector`` caches, where its descriptor is); ``vector(selector)`` beyond the table."""
        x = self.x
        table = x.sregs.ldt if selector & _TABLE else x.sregs.gdt
        if (selector | 7) > table.limit or (selector & _TABLE and x.sregs.ldt.unusable):
            raise CpuFault(vector, selector & ~3)
        at = table.base + (selector & ~7)
        return cached_segment(_system(x, at, 8), selector), at

    def _code_segment(self, selector: int) -> Segment:
        x = self.x
        if not selector & ~3:
            raise general_protection()
        code, at = self._descriptor(selector, Vector.GP)
        if not code.s or not code.type & 8 or code.dpl > x.cpl or (self.long and (not code.l or code.db)):
            raise general_protection(selector & ~3)
        if not code.present:
            raise CpuFault(Vector.NP, selector & ~3)
        if not code.type & 1:  # the CPU marks it as accessed, in the table and in what it caches
            x.queue_write(at + 5, bytes([_system(x, at + 5, 1) | 1]), Privilege.SYSTEM)
            code = msgspec.structs.replace(code, type=code.type | 1)
        return code

    # -- stacks ---------------------------------------------------------------------------------

    def _task_field(self, offset: int, size: int) -> int:
        tr = self.x.sregs.tr
        if offset + size - 1 > tr.limit:
            raise CpuFault(Vector.TS, tr.selector & ~3)
        return _system(self.x, tr.base + offset, size)

    def _long_stack(self, stack_table: int, inner: bool, level: int) -> None:
        """SS, RSP, RFLAGS, CS, RIP in eight bytes each on a 16-byte aligned stack (SDM 6.14.2-6.14.5)."""
        x = self.x
        if stack_table:
            pointer = self._task_field(0x24 + 8 * (stack_table - 1), 8)
        elif inner:
            pointer = self._task_field(4 + 8 * level, 8)
        else:
            pointer = x.gpr(4)
        pointer &= ~15
        frame = (x.regs.rip, x.sregs.cs.selector, x.regs.rflags, x.gpr(4), x.sregs.ss.selector)
        pointer = (pointer - 8 * len(frame)) & SIZE_MASK[8]
        if not is_canonical(x.sregs, pointer) or not is_canonical(x.sregs, pointer + 8 * len(frame) - 1):
            raise CpuFault(Vector.SS, 0)
        data = b"".join(value.to_bytes(8, "little") for value in frame)
        x.queue_write(pointer, data, Privilege.USER if level == 3 else Privilege.SUPERVISOR)
        x.set_gpr(4, 8, pointer)
        if inner:  # SS becomes a null selector with the new level as RPL
            ss = Segment(selector=level, dpl=level, limit=SIZE_MASK[4], type=3, s=1, present=1, db=1, g=1, unusable=1)
            x.replace_sregs(ss=ss)

    def _legacy_stack(self, size: int, inner: bool, level: int) -> None:
        """(SS, ESP,) EFLAGS, CS, EIP; SS:ESP of an inner level come from the TSS."""
        x = self.x
        values: tuple[int, ...] = (x.regs.rflags, x.sregs.cs.selector, x.regs.rip)
        stack = x.sregs.ss
        if inner:
            values = (x.sregs.ss.selector, x.gpr(4), *values)
            wide_task = x.sregs.tr.type & 8  # 32-bit TSS types are 9 and 11
            if wide_task:
                pointer, selector = self._task_field(4 + 8 * level, 4), self._task_field(8 + 8 * level, 2)
            else:
                pointer, selector = self._task_field(2 + 4 * level, 2), self._task_field(4 + 4 * level, 2)
            stack = self._stack_segment(selector, level)
            x.set_gpr(4, 4, pointer)
        _push(x, stack, size, values, Privilege.USER if level == 3 else Privilege.SUPERVISOR)
        x.replace_sregs(ss=stack)

    def _stack_segment(self, selector: int, level: int) -> Segment:
        if not selector & ~3:
            raise CpuFault(Vector.TS, selector & ~3)
        stack, _ = self._descriptor(selector, Vector.TS)
        writable_data = stack.s and not stack.type & 8 and stack.type & 2
        if selector & 3 != level or stack.dpl != level or not writable_data:
            raise CpuFault(Vector.TS, selector & ~3)
        if not stack.present:
            raise CpuFault(Vector.SS, selector & ~3)
        return stack
