"""Bit counting, BMI1, BMI2, ADX, MOVBE, CRC32, CMPXCHG8B/16B.

Source: Intel SDM volume 2, the page of each instruction ("Operation" and "Flags Affected").
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.arch.x86.control_registers import FLAG_CF, FLAG_OF, FLAG_SF, FLAG_ZF, STATUS_FLAGS
from pyvmm.arch.x86.fallback.execution import Execution
from pyvmm.arch.x86.fallback.flags import sign_and_zero
from pyvmm.arch.x86.fallback.operands import SIZE_MASK
from pyvmm.arch.x86.fallback.registry import handles
from pyvmm.arch.x86.faults import undefined

RBX, RCX, RDX, RAX = 3, 1, 2, 0
_CRC32C_REFLECTED = 0x82F63B78  # 0x11EDC6F41 bit-reversed, as CRC32's page gives it


def require_vex_mode(x: Execution) -> None:
    """VEX-encoded general-register instructions are #UD outside protected mode (exception type 13)."""
    if not x.protected:
        raise undefined()


@handles("popcnt")
def popcnt(x: Execution) -> None:
    """Number of set bits; ZF from the source, the other status flags cleared."""
    source = x.load(x.operands[1])
    x.store(x.operands[0], source.bit_count())
    x.set_flags(STATUS_FLAGS, FLAG_ZF if source == 0 else 0)


@handles("lzcnt")
def lzcnt(x: Execution) -> None:
    """Leading zeros; the operand size for 0, which also sets CF."""
    _count(x, lambda source, bits: bits - source.bit_length())


@handles("tzcnt")
def tzcnt(x: Execution) -> None:
    """Trailing zeros; the operand size for 0, which also sets CF."""
    _count(x, lambda source, bits: (source & -source).bit_length() - 1 if source else bits)


def _count(x: Execution, zeros: Callable[[int, int], int]) -> None:
    source = x.load(x.operands[1])
    result = zeros(source, 8 * x.size(0))
    x.store(x.operands[0], result)
    x.set_flags(FLAG_CF | FLAG_ZF, (FLAG_CF if source == 0 else 0) | (FLAG_ZF if result == 0 else 0))


@handles("andn")
def andn(x: Execution) -> None:
    """~first & second."""
    require_vex_mode(x)
    size = x.size(0)
    result = ~x.load(x.operands[1]) & x.load(x.operands[2]) & SIZE_MASK[size]
    x.store(x.operands[0], result)
    x.set_flags(FLAG_SF | FLAG_ZF | FLAG_OF | FLAG_CF, sign_and_zero(result, size))


@handles("bextr")
def bextr(x: Execution) -> None:
    """A field: start in bits 7:0 of the last operand, length in 15:8."""
    require_vex_mode(x)
    source, control = x.load(x.operands[1]), x.load(x.operands[2])
    result = source >> (control & 0xFF) & ((1 << (control >> 8 & 0xFF)) - 1)
    x.store(x.operands[0], result)
    x.set_flags(FLAG_ZF | FLAG_CF | FLAG_OF, FLAG_ZF if result == 0 else 0)


@handles("blsi")
def blsi(x: Execution) -> None:
    """Lowest set bit alone; CF if there is one."""
    _lowest_bit(x, lambda source: source & -source, FLAG_SF | FLAG_ZF, carry_if_zero=False)


@handles("blsmsk")
def blsmsk(x: Execution) -> None:
    """Mask up to the lowest set bit; CF if there is none. ZF is always cleared."""
    _lowest_bit(x, lambda source: source ^ (source - 1), FLAG_SF, carry_if_zero=True)


@handles("blsr")
def blsr(x: Execution) -> None:
    """Lowest set bit cleared; CF if there was none."""
    _lowest_bit(x, lambda source: source & (source - 1), FLAG_SF | FLAG_ZF, carry_if_zero=True)


def _lowest_bit(x: Execution, operation: Callable[[int], int], from_result: int, *, carry_if_zero: bool) -> None:
    require_vex_mode(x)
    size = x.size(0)
    source = x.load(x.operands[1])
    result = operation(source) & SIZE_MASK[size]
    x.store(x.operands[0], result)
    carry = FLAG_CF if (source == 0) == carry_if_zero else 0
    x.set_flags(FLAG_SF | FLAG_ZF | FLAG_CF | FLAG_OF, sign_and_zero(result, size) & from_result | carry)


@handles("bzhi")
def bzhi(x: Execution) -> None:
    """Bits from the index (bits 7:0 of the last operand) upwards cleared; CF if it is beyond the operand."""
    require_vex_mode(x)
    size = x.size(0)
    index = x.load(x.operands[2]) & 0xFF
    result = x.load(x.operands[1]) & ((1 << index) - 1)
    x.store(x.operands[0], result)
    beyond = FLAG_CF if index > 8 * size - 1 else 0
    x.set_flags(FLAG_SF | FLAG_ZF | FLAG_CF | FLAG_OF, sign_and_zero(result, size) | beyond)


@handles("mulx")
def mulx(x: Execution) -> None:
    """RDX times the last operand; high half to the first operand, low half to the second, no flags."""
    require_vex_mode(x)
    size = x.size(0)
    product = x.gpr(RDX, size) * x.load(x.operands[2])
    x.store(x.operands[1], product & SIZE_MASK[size])
    x.store(x.operands[0], product >> (8 * size))  # last: it wins when both name one register


@handles("pdep")
def pdep(x: Execution) -> None:
    """Deposit the source's low bits where the mask has ones."""
    require_vex_mode(x)
    source, mask = x.load(x.operands[1]), x.load(x.operands[2])
    result = 0
    while mask:
        lowest = mask & -mask
        if source & 1:
            result |= lowest
        source >>= 1
        mask ^= lowest
    x.store(x.operands[0], result)


@handles("pext")
def pext(x: Execution) -> None:
    """Extract the source's bits under the mask, packed."""
    require_vex_mode(x)
    source, mask = x.load(x.operands[1]), x.load(x.operands[2])
    result = position = 0
    while mask:
        lowest = mask & -mask
        if source & lowest:
            result |= 1 << position
        position += 1
        mask ^= lowest
    x.store(x.operands[0], result)


@handles("rorx")
def rorx(x: Execution) -> None:
    """Rotate right by an immediate, no flags."""
    require_vex_mode(x)
    bits = 8 * x.size(0)
    count = x.load(x.operands[2]) & (bits - 1)
    source = x.load(x.operands[1])
    x.store(x.operands[0], source >> count | source << (bits - count))


@handles("sarx", "shlx", "shrx")
def shift_without_flags(x: Execution) -> None:
    """Shifts by a register, modulo the operand size, no flags."""
    require_vex_mode(x)
    bits = 8 * x.size(0)
    count = x.load(x.operands[2]) & (bits - 1)
    source = x.load(x.operands[1])
    if x.decoded.mnemonic == "shlx":
        result = source << count
    else:
        if x.decoded.mnemonic == "sarx" and source >> (bits - 1):
            source -= 1 << bits
        result = source >> count
    x.store(x.operands[0], result)


@handles("adcx", "adox")
def add_with_one_flag(x: Execution) -> None:
    """Add with carry through CF alone (ADCX) or OF alone (ADOX)."""
    flag = FLAG_CF if x.decoded.mnemonic == "adcx" else FLAG_OF
    total = x.load(x.operands[0]) + x.load(x.operands[1]) + (1 if x.regs.rflags & flag else 0)
    x.store(x.operands[0], total)
    x.set_flags(flag, flag if total >> (8 * x.size(0)) else 0)


@handles("movbe")
def movbe(x: Execution) -> None:
    """Load or store with the bytes swapped."""
    size = x.size(0)
    swapped = x.load(x.operands[1]).to_bytes(size, "little")
    x.store(x.operands[0], int.from_bytes(swapped, "big"))


@handles("crc32")
def crc32(x: Execution) -> None:
    """CRC-32C (Castagnoli), reflected, without the final complement; the result is 32 bits, zero-extended."""
    crc = x.load(x.operands[0]) & SIZE_MASK[4]
    for byte in x.load(x.operands[1]).to_bytes(x.size(1), "little"):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C_REFLECTED if crc & 1 else 0)
    x.store(x.operands[0], crc)


@handles("cmpxchg8b", "cmpxchg16b")
def compare_exchange(x: Execution) -> None:
    """Compare (R|E)DX:AX with memory; if equal store CX:BX and set ZF, else load. Only ZF changes."""
    wide = x.decoded.mnemonic == "cmpxchg16b"
    half = 8 if wide else 4
    old = (x.gpr(RAX, half) | x.gpr(RDX, half) << (8 * half)).to_bytes(2 * half, "little")
    new = (x.gpr(RBX, half) | x.gpr(RCX, half) << (8 * half)).to_bytes(2 * half, "little")
    found = x.compare_exchange(x.memory(0), old, new, align=16 if wide else 1)
    if found == old:
        x.set_flags(FLAG_ZF, FLAG_ZF)
        return
    x.set_flags(FLAG_ZF, 0)
    x.set_gpr(RAX, half, int.from_bytes(found[:half], "little"))
    x.set_gpr(RDX, half, int.from_bytes(found[half:], "little"))
