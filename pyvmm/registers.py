"""Registers as declarations: name, place and bits, once, for the code that behaves so and for whoever explains it.

A device (or a CPU's control register) names its constants as ever; its table says what they mean::

    TABLE = RegisterTable("16550A UART", (
        Register(LSR, "LSR", "line status", access="r", bits=(Bit(LSR_DR, "DR", "received data is there"), ...)),
    ))

Device code uses the constants, ``pyvmm explain`` the table, and the monitor (thus GDB's ``monitor info mtree``), too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Bit:
    """One bit, or a field of several (``mask``), and what it means when it is set."""

    mask: int
    name: str
    text: str = ""

    @property
    def shift(self) -> int:
        """Number of the lowest bit."""
        return (self.mask & -self.mask).bit_length() - 1

    @property
    def single(self) -> bool:
        """Whether it is one bit and no field."""
        return self.mask == 1 << self.shift


def named_bits(value: int, bits: Sequence[Bit]) -> str:
    """``DR THRE``: names of the bits that are set, fields as ``NAME=number``; empty if none is."""
    words = []
    for bit in bits:
        if bit.single:
            if value & bit.mask:
                words.append(bit.name)
        elif value & bit.mask:
            words.append(f"{bit.name}={(value & bit.mask) >> bit.shift}")
    return " ".join(words)


@dataclass(frozen=True)
class Register:
    """``size`` bytes at ``offset`` of a device. ``values``: what whole values mean, where they are commands."""

    offset: int
    name: str
    text: str
    size: int = 1
    access: Literal["r", "w", "rw"] = "rw"
    bits: tuple[Bit, ...] = ()
    values: Mapping[int, str] = field(default_factory=dict)

    def describe(self, value: int) -> str:
        """What ``value`` means here; empty if there is nothing to say about it."""
        if (meaning := self.values.get(value)) is not None:
            return meaning
        return named_bits(value, self.bits)


class RegisterTable:
    """A device's registers. The same offset may have one to be read and another one to be written.

    ValueError if two could be meant by one access: a table that is wrong must not be believed.
    """

    def __init__(self, title: str, registers: Sequence[Register]) -> None:
        self.title = title
        self.registers = tuple(registers)
        self._at: dict[tuple[int, str], Register] = {}
        for one in self.registers:
            for way in one.access:
                for offset in range(one.offset, one.offset + one.size):
                    if (offset, way) in self._at:
                        other = self._at[offset, way].name
                        raise ValueError(f"{title}: {one.name} and {other} are both at {offset:#x}")
                    self._at[offset, way] = one

    def find(self, offset: int, *, write: bool) -> Register | None:
        """The register an access at ``offset`` reaches, also in its middle."""
        return self._at.get((offset, "w" if write else "r"))

    def __iter__(self) -> Iterator[Register]:
        return iter(self.registers)
