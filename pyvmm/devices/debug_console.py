"""Debug console (port 0xe9, the Bochs and QEMU convention): every byte written is output; reading gives 0xe9."""

from __future__ import annotations

from pyvmm.devices.device import Output, PortHint
from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.registers import Register, RegisterTable

READBACK = 0xE9


class DebugConsoleState(DeviceState):
    """There is none."""


class DebugConsole(StatefulDevice[DebugConsoleState]):
    """Always a sink: the native loop may collect its writes and answer its reads."""

    section_id = "debug-console"
    registers = RegisterTable("debug console", (Register(0, "CONSOLE", "the byte goes out"),))

    def __init__(self, output: Output, hint: PortHint | None = None) -> None:
        super().__init__(DebugConsoleState)
        self._output = output
        if hint is not None:
            hint.set_sink(0, True)
            hint.set_latch(0, READBACK)

    def read(self, offset: int, size: int) -> int:
        """How a guest finds out that the console is there."""
        return READBACK

    def write(self, offset: int, size: int, value: int) -> None:
        """Output one byte."""
        self._output((value & 0xFF).to_bytes(1, "little"))

    def output_from_sink(self, data: bytes) -> None:
        """Bytes that the native loop collected."""
        if data:
            with self.lock:
                self._output(data)
