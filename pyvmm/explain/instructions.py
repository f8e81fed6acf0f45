"""Which instruction it was: the one that led to an exit, and the one that comes next.

Where RIP stands at an exit depends on who carried the instruction out. For a read it is at the instruction, which is
not complete. For a write it is behind it if KVM emulated it, and at it if KVM took the port from the CPU's exit
information (``kvm_fast_pio``). So both places are looked at, for an instruction that does what the exit says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from iced_x86 import (
    Decoder,
    Formatter,
    FormatterSyntax,
    Instruction,
    MemorySizeExt,
    Mnemonic,
    OpKind,
    Register,
)

from pyvmm.arch.x86.control_registers import code_bits
from pyvmm.arch.x86.faults import PageFault
from pyvmm.arch.x86.paging import Access as PageAccess
from pyvmm.arch.x86.paging import walk
from pyvmm.errors import GuestMemoryError
from pyvmm.explain.symbols import Symbols
from pyvmm.gdb.linear_memory import read_memory
from pyvmm.gdb.registers import linear_pc
from pyvmm.kvm.state import Regs, Sregs
from pyvmm.memory.guest_memory import GuestMemory

LENGTH_MAX = 15
_ANY_RIGHTS = PageAccess(smap_override=True)
SWEEP_MAX = 4096
_REPEATS = (0xF2, 0xF3)
_IN = {Mnemonic.IN, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD}
_OUT = {Mnemonic.OUT, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD}
_SIZES = {Register.AL: 1, Register.AX: 2, Register.EAX: 4}
_STRING_SIZES = {Mnemonic.INSB: 1, Mnemonic.OUTSB: 1, Mnemonic.INSW: 2, Mnemonic.OUTSW: 2, Mnemonic.INSD: 4,
                 Mnemonic.OUTSD: 4}  # fmt: skip
_STRING_POINTERS = {
    OpKind.MEMORY_SEG_SI: (Register.SI, False), OpKind.MEMORY_SEG_ESI: (Register.ESI, False),
    OpKind.MEMORY_SEG_RSI: (Register.RSI, False), OpKind.MEMORY_ESDI: (Register.DI, True),
    OpKind.MEMORY_ESEDI: (Register.EDI, True), OpKind.MEMORY_ESRDI: (Register.RDI, True),
}  # fmt: skip
_SEGMENTS: dict[int, str] = {
    Register.CS: "cs", Register.DS: "ds", Register.ES: "es", Register.SS: "ss", Register.FS: "fs", Register.GS: "gs",
}  # fmt: skip


class Access(NamedTuple):
    """What an exit was about. ``address``: port number, or GPA of an access to memory that is none."""

    port: bool
    write: bool
    address: int
    size: int


class Found(NamedTuple):
    """An instruction at linear ``address``."""

    address: int
    text: str
    code: bytes
    instruction: Instruction


class Reader:
    """Decodes at a vCPU's place in its guest's memory."""

    def __init__(self, memory: GuestMemory, symbols: Symbols) -> None:
        self.memory = memory
        self._symbols = symbols
        self._formatter = Formatter(FormatterSyntax.INTEL)
        self._formatter.hex_prefix, self._formatter.hex_suffix = "0x", ""
        self._formatter.space_after_operand_separator = True

    def at(self, regs: Regs, sregs: Sregs, linear: int) -> Found | None:
        """The instruction at ``linear``; ``None``: nothing is mapped there, or it is no instruction."""
        code = read_memory(self.memory, sregs, linear, LENGTH_MAX)
        if not code:
            return None
        ip = regs.rip + linear - linear_pc(regs, sregs)
        instruction = Decoder(code_bits(sregs), code, ip=ip & (1 << 64) - 1).decode()
        if instruction.is_invalid:
            return None
        return Found(linear, self._formatter.format(instruction), code[: instruction.len], instruction)

    def text(self, code: bytes, sregs: Sregs) -> str:
        """The instruction that begins with ``code``."""
        instruction = Decoder(code_bits(sregs), code).decode()
        return code.hex(" ") if instruction.is_invalid else self._formatter.format(instruction)

    def length(self, regs: Regs, sregs: Sregs, offset: int) -> int | None:
        """Of the instruction at ``offset`` in the code segment."""
        found = self.at(regs, sregs, linear_pc(regs, sregs) - regs.rip + offset)
        return len(found.code) if found is not None else None

    def next(self, regs: Regs, sregs: Sregs) -> Found | None:
        """What the vCPU does next."""
        return self.at(regs, sregs, linear_pc(regs, sregs))

    def cause(self, regs: Regs, sregs: Sregs, access: Access, *, emulated: bool) -> Found | None:
        """The instruction behind ``access``; ``emulated``: KVM's emulator carries out code of this privilege."""
        here = linear_pc(regs, sregs)
        fits = _port_test(access, regs) if access.port else self._memory_test(access, regs, sregs)
        at_rip = self.at(regs, sregs, here)
        if at_rip is not None and not fits(at_rip.instruction):
            at_rip = None
        if at_rip is not None and (not access.write or (access.port and not emulated)):
            return at_rip
        return self._before(regs, sregs, here, fits) or at_rip

    def _before(self, regs: Regs, sregs: Sregs, here: int, fits: Callable[[Instruction], bool]) -> Found | None:
        """Code cannot be decoded backwards for certain: from the symbol's beginning, or the shortest that fits."""
        swept = self._sweep(regs, sregs, here)
        if swept is not None and fits(swept.instruction):
            return swept
        best = None
        for length in range(1, min(LENGTH_MAX, here) + 1):
            found = self.at(regs, sregs, here - length)
            if found is None or len(found.code) != length or not fits(found.instruction):
                continue
            if best is None or (found.code[0] in _REPEATS and found.instruction.is_string_instruction):
                best = found
        return best

    def _sweep(self, regs: Regs, sregs: Sregs, here: int) -> Found | None:
        """The instruction that ends at ``here``, decoded from its function's beginning on."""
        start = self._symbols.start(here - 1)
        if start is None or here - start > SWEEP_MAX:
            return None
        code = read_memory(self.memory, sregs, start, here - start)
        last = 0
        for instruction in Decoder(code_bits(sregs), code, ip=start):
            if instruction.next_ip >= here:
                last = instruction.ip if instruction.next_ip == here and not instruction.is_invalid else 0
                break
        return self.at(regs, sregs, last) if last else None

    def _memory_test(self, access: Access, regs: Regs, sregs: Sregs) -> Callable[[Instruction], bool]:
        def fits(instruction: Instruction) -> bool:
            if MemorySizeExt.size(instruction.memory_size) not in (0, access.size):
                return False
            return any(
                translate_any(self.memory, sregs, linear) == access.address
                for operand in range(instruction.op_count)
                for linear in _linear(instruction, operand, regs, sregs, access.size)
            )

        return fits


def _linear(instruction: Instruction, operand: int, regs: Regs, sregs: Sregs, size: int) -> list[int]:
    """Where a memory operand may be. A string instruction may have moved its pointer on already."""
    kind = instruction.op_kind(operand)
    wrap = (1 << 64) - 1 if code_bits(sregs) == 64 else (1 << 32) - 1
    if kind in _STRING_POINTERS:
        pointer, own = _STRING_POINTERS[kind]
        segment = sregs.es if own else getattr(sregs, _SEGMENTS.get(instruction.memory_segment, "ds"))
        at = register_value(pointer, regs)
        return [] if at is None else [(segment.base + at + moved) & wrap for moved in (0, -size, size)]
    if kind != OpKind.MEMORY:
        return []
    base = instruction.memory_displacement  # of RIP-relative operands it is the address itself
    parts: list[tuple[int, int]] = [
        (instruction.memory_base, 1),
        (instruction.memory_index, instruction.memory_index_scale),
    ]
    for register, scale in parts:
        if register not in (Register.NONE, Register.RIP, Register.EIP):
            value = register_value(register, regs)
            if value is None:
                return []
            base += value * scale
    segment = getattr(sregs, _SEGMENTS.get(instruction.memory_segment, "ds"))
    if code_bits(sregs) == 16:
        base &= 0xFFFF
    return [(segment.base + base) & wrap]


def translate_any(memory: GuestMemory, sregs: Sregs, linear: int) -> int | None:
    """GPA behind ``linear``, RAM or not; ``None``: not mapped."""
    try:
        return walk(memory, sregs, linear, _ANY_RIGHTS).gpa
    except (PageFault, GuestMemoryError):
        return None


def _port_test(access: Access, regs: Regs) -> Callable[[Instruction], bool]:
    wanted = _OUT if access.write else _IN

    def fits(instruction: Instruction) -> bool:
        if instruction.mnemonic not in wanted:
            return False
        if (size := _STRING_SIZES.get(instruction.mnemonic)) is not None:
            return size == access.size and regs.rdx & 0xFFFF == access.address
        data, port = (1, 0) if access.write else (0, 1)
        if _SIZES.get(instruction.op_register(data)) != access.size:
            return False
        if instruction.op_kind(port) == OpKind.IMMEDIATE8:
            return bool(instruction.immediate8 == access.address)
        return regs.rdx & 0xFFFF == access.address

    return fits


_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_BY_NUMBER: dict[int, tuple[str, int]] = {
    base + number: (name, mask)
    for base, mask in ((Register.RAX, (1 << 64) - 1), (Register.EAX, (1 << 32) - 1), (Register.AX, (1 << 16) - 1))
    for number, name in enumerate(_NAMES)
}


def register_value(register: int, regs: Regs) -> int | None:
    """A general register's value, as wide as it is named; ``None`` for others."""
    known = _BY_NUMBER.get(register)
    return getattr(regs, known[0]) & known[1] if known is not None else None
