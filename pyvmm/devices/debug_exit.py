"""isa-debug-exit: a write ends the machine (QEMU's hw/misc/debugexit.c; its rules, and those of kvm-unit-tests)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.errors import ConfigError
from pyvmm.registers import Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")


def debug_exit_status(value: int) -> int:
    """The process's exit status for a written ``value``: never 0, so never mistaken for a clean end."""
    return (value << 1 | 1) & 0xFF


class DebugExitState(DeviceState):
    """The last value written, as wide as it was written."""

    value: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] | None = None


class DebugExit(StatefulDevice[DebugExitState]):
    """``size`` ports (1, 2 or 4); any write calls ``on_exit(value)``. Reads give 0, as in QEMU."""

    section_id = "debug-exit"
    registers = RegisterTable("isa-debug-exit", (Register(0, "EXIT", "ends the machine", size=4),))

    def __init__(self, on_exit: Callable[[int], None], size: int = 1) -> None:
        if size not in (1, 2, 4):
            raise ConfigError(f"debug-exit: size {size}: it must be 1, 2 or 4 ports")
        super().__init__(DebugExitState)
        self.max_access = size
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the machine."""
        value &= 0xFFFFFFFF
        self.state.value = value
        T.debug_exit.on and T.debug_exit(value, debug_exit_status(value))
        self._on_exit(value)
