"""System control port A (0x92): fast reset and fast A20.

Source: IBM PS/2 Hardware Interface Technical Reference, "System Control Port A".
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.registers import Bit, Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

FAST_RESET = 0x01
A20 = 0x02


class SystemPortAState(DeviceState):
    """Both bits read back."""

    reset_bit: bool = False
    a20: bool = True


class SystemPortA(StatefulDevice[SystemPortAState]):
    """``on_reset`` is called when bit 0 goes from 0 to 1. A20 is a flag only: addresses never wrap."""

    section_id = "system-port-a"
    registers = RegisterTable("system control port A", (
        Register(0, "PORT_A", "fast reset and A20", bits=(Bit(FAST_RESET, "RESET"), Bit(A20, "A20"))),
    ))  # fmt: skip

    def __init__(self, on_reset: Callable[[], None]) -> None:
        super().__init__(SystemPortAState)
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """Both bits; the others (disk lights, lock latch) read as zero."""
        return (FAST_RESET if self.state.reset_bit else 0) | (A20 if self.state.a20 else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Set both bits."""
        s = self.state
        pulled = bool(value & FAST_RESET) and not s.reset_bit
        s.reset_bit = bool(value & FAST_RESET)
        s.a20 = bool(value & A20)
        if pulled:
            T.reset_request.on and T.reset_request(self.section_id, value & 0xFF)
            self._on_reset()
