"""The x87, SSE and AVX registers inside XSAVE's standard format.

Layout: Intel SDM volume 1, section 10.5.1 (legacy region, the FXSAVE image) and 13.4 (header, extended
region). The components beyond SSE lie where CPUID leaf 0xD says.
"""

from __future__ import annotations

from collections.abc import Callable

X87, SSE, AVX = 0, 1, 2
OPMASK, ZMM_HI256, HI16_ZMM = 5, 6, 7

MXCSR_AT = 24
MXCSR_MASK_AT = 28
ST_AT = 32
XMM_AT = 160
XMM_END = 416
XSTATE_BV_AT = 512
XCOMP_BV_AT = 520
EXTENDED_AT = 576

FCW_INIT = 0x37F
MXCSR_INIT = 0x1F80
MXCSR_MASK_DEFAULT = 0xFFBF  # what a zero MXCSR_MASK field means (SDM volume 1, section 11.6.6)

_X87_INIT = FCW_INIT.to_bytes(2, "little") + bytes(22)

Component = Callable[[int], tuple[int, int]]
"""Component number to (offset in the standard format, size), both 0 if there is none (CPUID 0xD)."""


class XsaveImage:
    """Register state to read and change. Components that XSTATE_BV calls initial are filled in on loading."""

    def __init__(self, state: bytes, component: Component) -> None:
        self.data = bytearray(state)
        self.component = component
        present = self.uint(XSTATE_BV_AT, 8)
        for number in range(62):
            if not present >> number & 1:
                self.initialise(number)
        if not present & (1 << SSE | 1 << AVX):
            self.set_uint(MXCSR_AT, 4, MXCSR_INIT)

    def uint(self, at: int, size: int) -> int:
        """Little-endian field of the image."""
        return int.from_bytes(self.data[at : at + size], "little")

    def set_uint(self, at: int, size: int, value: int) -> None:
        """Set such a field."""
        self.data[at : at + size] = value.to_bytes(size, "little")

    def span(self, number: int) -> tuple[int, int]:
        """(offset, size) of an extended component as far as the image holds it."""
        at, size = self.component(number)
        return (at, size) if size and at >= EXTENDED_AT and at + size <= len(self.data) else (0, 0)

    def initialise(self, number: int) -> None:
        """Put a component into its initial configuration; MXCSR is not part of any."""
        if number == X87:
            self.data[:MXCSR_AT] = _X87_INIT
            self.data[ST_AT:XMM_AT] = bytes(XMM_AT - ST_AT)
        elif number == SSE:
            self.data[XMM_AT:XMM_END] = bytes(XMM_END - XMM_AT)
        else:
            at, size = self.span(number)
            self.data[at : at + size] = bytes(size)

    def in_use(self) -> int:
        """XINUSE: the components that are not in their initial configuration (SDM volume 1, section 13.6)."""
        bits = 0
        if self.data[:MXCSR_AT] != _X87_INIT or any(self.data[ST_AT:XMM_AT]):
            bits |= 1 << X87
        if any(self.data[XMM_AT:XMM_END]):
            bits |= 1 << SSE
        for number in range(2, 62):
            at, size = self.span(number)
            if any(self.data[at : at + size]):
                bits |= 1 << number
        return bits

    def finish(self) -> bytes:
        """The image with an XSTATE_BV that fits its content."""
        bits = self.in_use() | 1 << X87 | 1 << SSE
        self.set_uint(XSTATE_BV_AT, 8, bits)
        return bytes(self.data)

    @property
    def mxcsr(self) -> int:
        """MXCSR."""
        return self.uint(MXCSR_AT, 4)

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.set_uint(MXCSR_AT, 4, value)

    @property
    def mxcsr_mask(self) -> int:
        """Bits of MXCSR that may be set."""
        return self.uint(MXCSR_MASK_AT, 4) or MXCSR_MASK_DEFAULT

    def vector(self, number: int, size: int) -> int:
        """The low ``size`` bytes (up to 32) of vector register 0-15."""
        value = self.uint(XMM_AT + 16 * number, 16)
        at, available = self.span(AVX)
        if size > 16 and available:
            value |= self.uint(at + 16 * number, 16) << 128
        return value & ((1 << (8 * size)) - 1)

    def set_vector(self, number: int, size: int, value: int, *, zero_upper: bool) -> None:
        """Set the low 16 or 32 bytes; ``zero_upper`` clears the rest of the register, as VEX forms do."""
        self.set_uint(XMM_AT + 16 * number, 16, value & (1 << 128) - 1)
        at, available = self.span(AVX)
        if available and (size > 16 or zero_upper):
            self.set_uint(at + 16 * number, 16, value >> 128 if size > 16 else 0)
        at, available = self.span(ZMM_HI256)
        if available and zero_upper:
            self.set_uint(at + 32 * number, 32, 0)
