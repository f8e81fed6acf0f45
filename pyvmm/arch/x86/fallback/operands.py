"""Decoding with iced-x86 into plain operands, so that nothing else here knows the decoder.

iced_x86 is imported when the first instruction is decoded: most hosts never need this package.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyvmm.kvm.state import Regs

if TYPE_CHECKING:
    from iced_x86 import Instruction
    from iced_x86._iced_x86_py import Register  # the stubs' name of the type

GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
"""struct kvm_regs' names by the number instructions encode."""
MAX_LENGTH = 15
SIZE_MASK = {size: (1 << (8 * size)) - 1 for size in (1, 2, 4, 8, 16, 32)}


@dataclass(frozen=True)
class RegisterOperand:
    """A register. ``bank`` is ``gpr``, ``mm`` or ``vector`` (XMM/YMM: ``size`` says which)."""

    bank: str
    number: int
    size: int
    high: bool = False
    """AH, CH, DH, BH: bits 15:8 of GPR ``number``."""


@dataclass(frozen=True)
class MemoryOperand:
    """``segment:offset``; ``size`` is 0 where the instruction's own definition says it (XSAVE)."""

    segment: str
    offset: int
    size: int


@dataclass(frozen=True)
class ImmediateOperand:
    """An immediate, zero-extended."""

    value: int


Operand = RegisterOperand | MemoryOperand | ImmediateOperand


@dataclass(frozen=True)
class Decoded:
    """One instruction at its address. ``mnemonic`` is iced's, in lower case."""

    mnemonic: str
    text: str
    length: int
    operands: tuple[Operand, ...]
    locked: bool
    vex: bool
    string: bool
    """A string instruction: MOVSD and CMPSD share their names with SSE ones."""


class UndecodableError(Exception):
    """No instruction of this set of encodings. ``truncated``: more bytes might have made one."""

    def __init__(self, truncated: bool) -> None:
        self.truncated = truncated
        super().__init__("truncated" if truncated else "invalid")


def decode(code: bytes, bits: int, regs: Regs) -> Decoded:
    """The instruction that ``code`` starts with, its memory operand computed from ``regs``.

    Encodings newer than VEX (EVEX, XOP, MVEX) are UndecodableError like invalid ones. An instruction with a
    LOCK prefix that it must not have is decoded: the CPU answers it with #UD, and the caller says so.
    """
    import iced_x86 as iced

    decoder = iced.Decoder(bits, code, iced.DecoderOptions.NONE, ip=regs.rip)
    instruction = decoder.decode()
    if decoder.last_error == iced.DecoderError.NO_MORE_BYTES:
        raise UndecodableError(truncated=True)
    if instruction.is_invalid:
        decoder = iced.Decoder(bits, code, iced.DecoderOptions.NO_INVALID_CHECK, ip=regs.rip)
        instruction = decoder.decode()
        if instruction.is_invalid or not instruction.has_lock_prefix:
            raise UndecodableError(truncated=False)
    if instruction.encoding not in (iced.EncodingKind.LEGACY, iced.EncodingKind.VEX):
        raise UndecodableError(truncated=False)
    return Decoded(
        mnemonic=mnemonic_names()[instruction.mnemonic],
        text=str(instruction),
        length=instruction.len,
        operands=tuple(_operand(instruction, i, regs) for i in range(instruction.op_count)),
        locked=instruction.has_lock_prefix,
        vex=instruction.encoding == iced.EncodingKind.VEX,
        string=instruction.is_string_instruction,
    )


@functools.cache
def mnemonic_names() -> dict[int, str]:
    """iced's mnemonics by number, in lower case."""
    import iced_x86 as iced

    return {value: name.lower() for name, value in vars(iced.Mnemonic).items() if isinstance(value, int)}


def _operand(instruction: Instruction, index: int, regs: Regs) -> Operand:
    import iced_x86 as iced

    kind = instruction.op_kind(index)
    if kind == iced.OpKind.REGISTER:
        return _register(instruction.op_register(index))
    if kind == iced.OpKind.MEMORY:
        return MemoryOperand(
            segment=_segment_name(instruction.memory_segment),
            offset=_effective_address(instruction, regs),
            size=iced.MemorySizeExt.size(instruction.memory_size),
        )
    if iced.OpKind.IMMEDIATE8 <= kind <= iced.OpKind.IMMEDIATE32TO64:
        return ImmediateOperand(instruction.immediate(index))
    # Branch targets and string operands: no instruction of ours has them; handlers never look.
    return ImmediateOperand(0)


def _segment_name(register: Register) -> str:
    """``ds``, ``fs``... of a segment register."""
    import iced_x86 as iced

    return {
        iced.Register.ES: "es",
        iced.Register.CS: "cs",
        iced.Register.SS: "ss",
        iced.Register.DS: "ds",
        iced.Register.FS: "fs",
        iced.Register.GS: "gs",
    }[register]


def _register(register: Register) -> RegisterOperand:
    import iced_x86 as iced

    ext = iced.RegisterExt
    size = ext.size(register)
    if ext.is_gpr(register):
        high = iced.Register.AH <= register <= iced.Register.BH
        return RegisterOperand("gpr", register - iced.Register.AH if high else _gpr_number(register), size, high)
    if ext.is_mm(register):
        return RegisterOperand("mm", ext.number(register), size)
    if ext.is_xmm(register) or ext.is_ymm(register):
        return RegisterOperand("vector", ext.number(register), size)
    return RegisterOperand("other", ext.number(register), size)


def _gpr_number(register: Register) -> int:
    import iced_x86 as iced

    return int(iced.RegisterExt.full_register(register)) - iced.Register.RAX


def _effective_address(instruction: Instruction, regs: Regs) -> int:
    """Offset within the segment, truncated to the address size (Intel SDM volume 1, section 3.7.5)."""
    import iced_x86 as iced

    base, index = instruction.memory_base, instruction.memory_index
    displacement = instruction.memory_displacement
    if instruction.is_ip_rel_memory_operand:  # iced has already added the next RIP
        return displacement & SIZE_MASK[iced.RegisterExt.size(base)]
    size = 0
    total = displacement
    for register, scale in ((base, 1), (index, instruction.memory_index_scale)):
        if int(register):  # 0 is NONE
            size = iced.RegisterExt.size(register)
            total += getattr(regs, GPR_NAMES[_gpr_number(register)]) * scale
    # Without registers the displacement itself has the address size.
    return total & SIZE_MASK[size or instruction.memory_displ_size]
