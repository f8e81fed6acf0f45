"""Reset control register (port 0xCF9).

Source: Intel ICH9 data sheet, section 13.7.5 "RST_CNT - Reset Control Register".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.registers import Bit, Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

SYS_RST = 0x02  # 1: hard reset, 0: INIT only; both restart this machine
RST_CPU = 0x04  # its rising edge resets
FULL_RST = 0x08
_WRITABLE = SYS_RST | RST_CPU | FULL_RST


class ResetControlState(DeviceState):
    """The register."""

    value: Annotated[int, Meta(ge=0, le=_WRITABLE)] = 0


class ResetControl(StatefulDevice[ResetControlState]):
    """``on_reset`` is called when RST_CPU goes from 0 to 1.

    The port lies inside PCI's CONFIG_ADDRESS (0xCF8, four bytes wide): a four-byte write there, which a kernel
    that looks for a PCI bus does, is not one to this register.
    """

    section_id = "reset-control"
    registers = RegisterTable("reset control", (
        Register(0, "RST_CNT", "resets the machine when RST_CPU rises", bits=(
            Bit(SYS_RST, "SYS_RST"), Bit(RST_CPU, "RST_CPU"), Bit(FULL_RST, "FULL_RST"),
        )),
    ))  # fmt: skip
    whole_access_only = True

    def __init__(self, on_reset: Callable[[], None]) -> None:
        super().__init__(ResetControlState)
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """What was written, without the reserved bits."""
        return self.state.value

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on RST_CPU's rising edge."""
        before = self.state.value
        self.state.value = value & _WRITABLE
        if value & RST_CPU and not before & RST_CPU:
            T.reset_request.on and T.reset_request(self.section_id, value & 0xFF)
            self._on_reset()
