"""RFLAGS of the emulated instructions: how results set them, and which the architecture leaves undefined."""

from __future__ import annotations

from pyvmm.arch.x86.control_registers import FLAG_AF, FLAG_OF, FLAG_PF, FLAG_SF, FLAG_ZF

UNDEFINED_FLAGS: dict[str, int] = {
    # Intel SDM volume 2, "Flags Affected" of each instruction; all others define every flag they touch.
    "lzcnt": FLAG_OF | FLAG_SF | FLAG_PF | FLAG_AF,
    "tzcnt": FLAG_OF | FLAG_SF | FLAG_PF | FLAG_AF,
    "andn": FLAG_AF | FLAG_PF,
    "bextr": FLAG_AF | FLAG_SF | FLAG_PF,
    "blsi": FLAG_AF | FLAG_PF,
    "blsmsk": FLAG_AF | FLAG_PF,
    "blsr": FLAG_AF | FLAG_PF,
    "bzhi": FLAG_AF | FLAG_PF,
}
"""Flags whose value after the instruction means nothing. The fallback leaves them as they were."""


def sign_and_zero(value: int, size: int) -> int:
    """SF and ZF for a result of ``size`` bytes."""
    return (FLAG_SF if value >> (8 * size - 1) & 1 else 0) | (FLAG_ZF if value == 0 else 0)
