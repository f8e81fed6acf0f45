"""POST code port (0x80): firmware's progress codes, and the port that kernels write to for a short delay."""

from __future__ import annotations

from pyvmm.devices.device import PortHint
from pyvmm.devices.state import Byte, DeviceState, StatefulDevice
from pyvmm.registers import Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")


class PostState(DeviceState):
    """The last code."""

    code: Byte = 0


class PostPort(StatefulDevice[PostState]):
    """Keeps the last code and traces each. A sink always: a delay should not cost a trip to Python.

    Under the hint the codes arrive late, so a read of the port is served by the device, after the drain.
    """

    section_id = "post"
    registers = RegisterTable("POST port", (Register(0, "CODE", "a progress code, or a short delay"),))

    def __init__(self, hint: PortHint | None = None) -> None:
        super().__init__(PostState)
        if hint is not None:
            hint.set_sink(0, True)

    def read(self, offset: int, size: int) -> int:
        """The last code."""
        return self.state.code

    def write(self, offset: int, size: int, value: int) -> None:
        """A new code."""
        self.state.code = value & 0xFF
        T.post_code.on and T.post_code(value & 0xFF)

    def output_from_sink(self, data: bytes) -> None:
        """Codes that the native loop collected."""
        with self.lock:
            for code in data if T.post_code.on else data[-1:]:
                self.write(0, 1, code)
