"""SSE and AVX moves and bitwise logic, as kernels use them to copy and clear.

Source: Intel SDM volume 2 per instruction; section 2.4 for the exception types. VEX forms clear the register
above what they write (volume 1, section 14.1.3), legacy forms keep it.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.operands import ImmediateOperand, MemoryOperand, Operand
from pyvmm.arch.x86.fallback.registry import handles
from pyvmm.arch.x86.fallback.x87 import enter_mmx, load_mm, require_mmx, store_mm
from pyvmm.arch.x86.fallback.xstate import require_avx, require_sse

ALIGNED_MOVES = ("movaps", "movapd", "movdqa", "movntdq", "movntps", "movntpd", "movntdqa")
UNALIGNED_MOVES = ("movups", "movupd", "movdqu", "lddqu")
_ALIGNED = frozenset(ALIGNED_MOVES) | {f"v{name}" for name in ALIGNED_MOVES}
_LOW_64 = (1 << 64) - 1


def _prepare(x: Execution) -> None:
    """The checks for the kind of registers the instruction names."""
    if any(not isinstance(o, ImmediateOperand | MemoryOperand) and o.bank == "mm" for o in x.operands):
        require_mmx(x)
        enter_mmx(x)
    elif x.decoded.vex:
        require_avx(x)
    else:
        require_sse(x)


def _get(x: Execution, operand: Operand, size: int, align: int = 1) -> int:
    """The low ``size`` bytes of any kind of operand."""
    if isinstance(operand, MemoryOperand):
        return x.load_memory(operand, size, align=align)
    if isinstance(operand, ImmediateOperand):
        return operand.value
    if operand.bank == "mm":
        return load_mm(x, operand.number)
    if operand.bank == "vector":
        return x.fpu.vector(operand.number, size)
    return x.load(operand)


def _put(x: Execution, operand: Operand, size: int, value: int, align: int = 1) -> None:
    """Write an operand; a vector register gets ``value`` in its low 16 or 32 bytes."""
    if isinstance(operand, MemoryOperand):
        x.store_memory(operand, size, value, align=align)
    elif not isinstance(operand, ImmediateOperand) and operand.bank == "mm":
        store_mm(x, operand.number, value)
    elif not isinstance(operand, ImmediateOperand) and operand.bank == "vector":
        x.fpu.set_vector(operand.number, max(size, 16), value, zero_upper=x.decoded.vex)
    else:
        x.store(operand, value)


@handles(*UNALIGNED_MOVES, *ALIGNED_MOVES, *(f"v{name}" for name in UNALIGNED_MOVES + ALIGNED_MOVES), "movntq")
def move_whole(x: Execution) -> None:
    """Whole registers. The aligned kinds want memory at a multiple of the register's size."""
    _prepare(x)
    destination, source = x.operands
    size = x.size(1 if isinstance(destination, MemoryOperand) else 0)
    align = size if x.decoded.mnemonic in _ALIGNED else 1
    _put(x, destination, size, _get(x, source, size, align), align)


@handles("movd", "movq", "vmovd", "vmovq")
def move_low(x: Execution) -> None:
    """32 or 64 bits between any registers and memory; a vector destination is cleared above them."""
    _prepare(x)
    size = 4 if x.decoded.mnemonic.endswith("d") else 8
    mask = (1 << (8 * size)) - 1
    _put(x, x.operands[0], size, _get(x, x.operands[1], size) & mask)


@handles("movss", "movsd", "vmovss", "vmovsd")
def move_scalar(x: Execution) -> None:
    """A scalar: loading clears the rest of the XMM register, between registers the rest is kept."""
    _prepare(x)
    size = 4 if x.decoded.mnemonic.endswith("ss") else 8
    mask = (1 << (8 * size)) - 1
    destination, source = x.operands[0], x.operands[-1]
    value = _get(x, source, size) & mask
    if not isinstance(destination, MemoryOperand) and not isinstance(source, MemoryOperand):
        rest = x.operands[1] if len(x.operands) == 3 else destination
        value |= _get(x, rest, 16) & ~mask
    _put(x, destination, size, value)


@handles("movlps", "movlpd", "vmovlps", "vmovlpd", "movhps", "movhpd", "vmovhps", "vmovhpd")
def move_half(x: Execution) -> None:
    """One half of an XMM register from or to memory; the other half comes from the first source."""
    _prepare(x)
    high = x.decoded.mnemonic.removeprefix("v")[3] == "h"
    destination, source = x.operands[0], x.operands[-1]
    if isinstance(destination, MemoryOperand):
        value = _get(x, source, 16)
        _put(x, destination, 8, value >> 64 if high else value)
        return
    kept = _get(x, x.operands[1] if len(x.operands) == 3 else destination, 16)
    half = _get(x, source, 8)
    _put(x, destination, 16, half << 64 | kept & _LOW_64 if high else kept >> 64 << 64 | half)


@handles("movlhps", "movhlps", "vmovlhps", "vmovhlps")
def move_between_halves(x: Execution) -> None:
    """Low half to the high one, or high half to the low one."""
    _prepare(x)
    kept = _get(x, x.operands[1] if len(x.operands) == 3 else x.operands[0], 16)
    source = _get(x, x.operands[-1], 16)
    if x.decoded.mnemonic.endswith("movlhps"):
        value = (source & _LOW_64) << 64 | kept & _LOW_64
    else:
        value = kept >> 64 << 64 | source >> 64
    _put(x, x.operands[0], 16, value)


_LOGIC: dict[str, Callable[[int, int], int]] = {
    "xorps": lambda a, b: a ^ b,
    "xorpd": lambda a, b: a ^ b,
    "pxor": lambda a, b: a ^ b,
    "andps": lambda a, b: a & b,
    "andpd": lambda a, b: a & b,
    "pand": lambda a, b: a & b,
    "orps": lambda a, b: a | b,
    "orpd": lambda a, b: a | b,
    "por": lambda a, b: a | b,
    "andnps": lambda a, b: ~a & b,
    "andnpd": lambda a, b: ~a & b,
    "pandn": lambda a, b: ~a & b,
}


@handles(*_LOGIC, *(f"v{name}" for name in _LOGIC))
def logic(x: Execution) -> None:
    """Bitwise, so PS, PD and integer forms are the same. Legacy 16-byte memory operands must be aligned."""
    _prepare(x)
    size = x.size(0)
    first = _get(x, x.operands[-2], size)
    second = _get(x, x.operands[-1], size, align=16 if size == 16 and not x.decoded.vex else 1)
    result = _LOGIC[x.decoded.mnemonic.removeprefix("v")](first, second) & ((1 << (8 * size)) - 1)
    _put(x, x.operands[0], size, result)


@handles("vzeroupper", "vzeroall")
def clear_registers(x: Execution) -> None:
    """Clear registers 0-15 (0-7 outside 64-bit mode) above 128 bits, or wholly."""
    require_avx(x)
    for number in range(16 if x.bits == 64 else 8):
        kept = x.fpu.vector(number, 16) if x.decoded.mnemonic == "vzeroupper" else 0
        x.fpu.set_vector(number, 16, kept, zero_upper=True)
