"""One instruction being carried out: its operands, the registers it reads, the changes it will make.

Handlers change copies and queue memory writes; :meth:`Execution.commit` checks what can still fault and then
applies everything. So a fault anywhere leaves the CPU as it was.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from pyvmm.arch.x86.control_registers import (
    CR0_AM,
    CR0_PE,
    FLAG_AC,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    code_bits,
    is_canonical,
    privilege_level,
)
from pyvmm.arch.x86.fallback.context import CpuContext, Privilege
from pyvmm.arch.x86.fallback.operands import GPR_NAMES, SIZE_MASK, Decoded, ImmediateOperand, MemoryOperand, Operand
from pyvmm.arch.x86.fallback.xsave_image import XsaveImage
from pyvmm.arch.x86.faults import CpuFault, Vector, general_protection
from pyvmm.errors import UnknownInstructionError
from pyvmm.kvm.state import Segment


class Execution:
    """What a handler sees. ``regs.rip`` is already that of the next instruction."""

    def __init__(self, context: CpuContext, decoded: Decoded, code: bytes) -> None:
        self.context = context
        self.decoded = decoded
        self.operands = decoded.operands
        self.code = code
        self.regs = msgspec.structs.replace(context.regs)
        self.sregs = context.sregs  # replaced, never changed in place
        self.bits = code_bits(context.sregs)
        self.cpl = privilege_level(context.sregs, context.regs.rflags)
        self.start = context.regs.rip
        self.regs.rip = (self.start + decoded.length) & SIZE_MASK[self.bits // 8]
        self.new_xcr0: int | None = None
        self.flushes_tlb = False
        self._writes: list[tuple[int, bytes, Privilege]] = []
        self._exchange: tuple[int, bytes, bytes, Privilege] | None = None
        self._fpu: XsaveImage | None = None

    # -- mode -----------------------------------------------------------------------------------

    @property
    def protected(self) -> bool:
        """Protected mode, virtual-8086 mode not included."""
        return bool(self.sregs.cr0 & CR0_PE) and not self.regs.rflags & FLAG_VM

    @property
    def privilege(self) -> Privilege:
        """Of the instruction's own memory operands."""
        return Privilege.USER if self.cpl == 3 else Privilege.SUPERVISOR

    def require_kernel(self) -> None:
        """#GP(0) unless CPL is 0."""
        if self.cpl:
            raise general_protection()

    def unknown(self, why: str) -> UnknownInstructionError:
        """For a form of a known instruction that is not carried out; the guest is untouched."""
        return UnknownInstructionError(self.start, self.code, f"{self.decoded.text} ({why})")

    # -- registers ------------------------------------------------------------------------------

    def gpr(self, number: int, size: int = 8) -> int:
        """Low ``size`` bytes of a general register by its encoding."""
        return int(getattr(self.regs, GPR_NAMES[number])) & SIZE_MASK[size]

    def set_gpr(self, number: int, size: int, value: int, *, high: bool = False) -> None:
        """Write a general register: 32-bit writes clear the upper half, smaller ones keep the rest."""
        name = GPR_NAMES[number]
        value &= SIZE_MASK[size]
        if size < 4:
            shift = 8 if high else 0
            kept = int(getattr(self.regs, name)) & ~(SIZE_MASK[size] << shift) & SIZE_MASK[8]
            value = kept | value << shift
        setattr(self.regs, name, value)

    def set_flags(self, affected: int, value: int) -> None:
        """Replace the ``affected`` flags by those in ``value``."""
        self.regs.rflags = (self.regs.rflags & ~affected) | (value & affected)

    def replace_sregs(self, **changes: Any) -> None:
        """Change segment or control registers."""
        self.sregs = msgspec.structs.replace(self.sregs, **changes)

    @property
    def xcr0(self) -> int:
        """XCR0 as it was."""
        return self.context.get_xcr0()

    @property
    def fpu(self) -> XsaveImage:
        """Floating-point and vector state, fetched when first needed."""
        if self._fpu is None:
            self._fpu = XsaveImage(self.context.get_xsave(), self.xsave_component)
        return self._fpu

    @functools.cached_property
    def _components(self) -> dict[int, tuple[int, int, int]]:
        return {}

    def xsave_component_layout(self, number: int) -> tuple[int, int, int]:
        """CPUID leaf 0xD of component ``number``: (offset in the standard format, size, ECX)."""
        if number not in self._components:
            size, offset, ecx, _ = self.context.cpuid(0xD, number)
            self._components[number] = (offset, size, ecx)
        return self._components[number]

    def xsave_component(self, number: int) -> tuple[int, int]:
        """(offset, size) of a component that a standard-format image can hold."""
        return self.xsave_component_layout(number)[:2]

    # -- operands -------------------------------------------------------------------------------

    def load(self, operand: Operand) -> int:
        """Value of a general-register, memory or immediate operand."""
        if isinstance(operand, ImmediateOperand):
            return operand.value
        if isinstance(operand, MemoryOperand):
            return self.load_memory(operand, operand.size)
        if operand.bank != "gpr":
            raise self.unknown(f"{operand.bank} register as an integer")
        if operand.high:
            return self.gpr(operand.number, 2) >> 8
        return self.gpr(operand.number, operand.size)

    def store(self, operand: Operand, value: int) -> None:
        """Write a general-register or memory operand."""
        if isinstance(operand, MemoryOperand):
            self.store_memory(operand, operand.size, value)
        elif isinstance(operand, ImmediateOperand) or operand.bank != "gpr":
            raise self.unknown("not a destination")
        else:
            self.set_gpr(operand.number, operand.size, value, high=operand.high)

    def memory(self, index: int) -> MemoryOperand:
        """Operand ``index``, which this form has in memory."""
        operand = self.operands[index]
        if not isinstance(operand, MemoryOperand):
            raise self.unknown("no memory operand")
        return operand

    def size(self, index: int) -> int:
        """Size in bytes of register or memory operand ``index``."""
        operand = self.operands[index]
        if isinstance(operand, ImmediateOperand):
            raise self.unknown("an immediate has no size")
        return operand.size

    # -- memory ---------------------------------------------------------------------------------

    def linear(self, operand: MemoryOperand, size: int, *, write: bool, align: int = 1) -> int:
        """Linear address of ``size`` bytes at the operand, with the segment unit's checks.

        Raises #GP(0) or #SS(0) for canonicality, limits and segment rights, #GP(0) for ``align``
        (SSE's and XSAVE's own alignment rules), #AC where alignment checking is on.
        """
        address = self.linear_in_segment(operand.segment, operand.offset, size, write=write)
        if address % align:
            raise general_protection()
        checked = self.sregs.cr0 & CR0_AM and self.regs.rflags & FLAG_AC and self.cpl == 3
        if checked and size in (2, 4, 8) and address % size:
            raise CpuFault(Vector.AC, 0)
        return address

    def linear_in_segment(self, name: str, offset: int, size: int, *, write: bool) -> int:
        """Linear address of ``offset`` in segment ``name`` (Intel SDM volume 3, sections 5.3 and 5.5)."""
        segment: Segment = getattr(self.sregs, name)
        refused = CpuFault(Vector.SS if name == "ss" else Vector.GP, 0)
        if self.bits == 64:
            base = segment.base if name in ("fs", "gs") else 0
            address = (base + offset) & SIZE_MASK[8]
            last = (address + size - 1) & SIZE_MASK[8]
            if not is_canonical(self.sregs, address) or not is_canonical(self.sregs, last):
                raise refused
            return address
        if self.protected and not _segment_allows(segment, write):
            raise refused
        last = offset + size - 1
        if self.protected and segment.type & 0xC == 0x4:  # expand-down data: valid above the limit
            inside = offset > segment.limit and last <= (0xFFFFFFFF if segment.db else 0xFFFF)
        else:
            inside = last <= segment.limit
        if not inside:
            raise refused
        return (segment.base + offset) & SIZE_MASK[4]

    def load_memory(self, operand: MemoryOperand, size: int, *, align: int = 1) -> int:
        """Little-endian integer of ``size`` bytes at the operand."""
        return int.from_bytes(self.load_bytes(operand, size, align=align), "little")

    def load_bytes(self, operand: MemoryOperand, size: int, *, align: int = 1) -> bytes:
        """``size`` bytes at the operand."""
        return self.context.read(self.linear(operand, size, write=False, align=align), size, self.privilege)

    def store_memory(self, operand: MemoryOperand, size: int, value: int, *, align: int = 1) -> None:
        """Queue the write of an integer at the operand."""
        address = self.linear(operand, size, write=True, align=align)
        self.queue_write(address, (value & SIZE_MASK[size]).to_bytes(size, "little"), self.privilege)

    def queue_write(self, address: int, data: bytes, privilege: Privilege) -> None:
        """Write at a linear address when the instruction commits; faults at once if it could not."""
        self.context.check_write(address, len(data), privilege)
        self._writes.append((address, data, privilege))

    def compare_exchange(self, operand: MemoryOperand, old: bytes, new: bytes, *, align: int = 1) -> bytes:
        """The one memory access that takes effect at once: nothing may fault after it."""
        address = self.linear(operand, len(old), write=True, align=align)
        return self.context.compare_exchange(address, old, new, self.privilege)

    # -- the end --------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make it happen: memory, then registers. Nothing here faults in the guest's sense."""
        context = self.context
        stepped = bool(context.regs.rflags & FLAG_TF)
        for address, data, privilege in self._writes:
            context.write(address, data, privilege)
        if self._fpu is not None:
            before = XsaveImage(context.get_xsave(), self.xsave_component).finish()
            after = self._fpu.finish()
            if after != before:
                context.set_xsave(after)
        if self.new_xcr0 is not None:
            context.set_xcr0(self.new_xcr0)
        # RF suppresses an instruction breakpoint for one instruction; completing it clears RF (SDM vol. 3, 17.3.1.1).
        self.regs.rflags &= ~FLAG_RF
        context.regs = self.regs
        context.sregs = self.sregs
        if self.flushes_tlb:
            context.flush_tlb()
        context.instruction_done(single_stepped=stepped)


def _segment_allows(segment: Segment, write: bool) -> bool:
    """Type check of a loaded data or code segment in protected mode (SDM volume 3, section 3.4.5.1)."""
    if segment.unusable or not segment.present:
        return False
    code = bool(segment.type & 8)
    second = bool(segment.type & 2)  # writable data, or readable code
    if write:
        return second and not code
    return second or not code
