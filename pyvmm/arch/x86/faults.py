"""Exceptions of the emulated CPU as Python exceptions.

Source: Intel SDM volume 3, section 6.3 (vectors) and section 4.7 (page-fault error code).
"""

from __future__ import annotations

import enum


class Vector(enum.IntEnum):
    """Exception vectors."""

    DE = 0
    DB = 1
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    XM = 19


PF_PRESENT = 1 << 0
PF_WRITE = 1 << 1
PF_USER = 1 << 2
PF_RESERVED = 1 << 3
PF_FETCH = 1 << 4


class CpuFault(Exception):
    """The emulated instruction faults: nothing of it happened, RIP stays on it.

    ``error_code`` is ``None`` for vectors that push none. ``address`` is what CR2 gets (page faults only).
    """

    def __init__(self, vector: Vector, error_code: int | None = None, address: int | None = None) -> None:
        self.vector = vector
        self.error_code = error_code
        self.address = address
        code = "" if error_code is None else f"({error_code:#x})"
        where = "" if address is None else f" at {address:#x}"
        super().__init__(f"#{vector.name}{code}{where}")


class PageFault(CpuFault):
    """#PF; carries the linear address and the error code the CPU would push."""

    def __init__(self, address: int, error_code: int) -> None:
        super().__init__(Vector.PF, error_code, address)


def general_protection(selector: int = 0) -> CpuFault:
    """#GP with a selector (0: none) as its error code."""
    return CpuFault(Vector.GP, selector)


def undefined() -> CpuFault:
    """#UD."""
    return CpuFault(Vector.UD)
