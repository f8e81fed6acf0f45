"""pc-testdev: what a test image uses to see its own port and memory accesses arrive, and to raise interrupt lines.

Source: QEMU hw/misc/pc-testdev.c (its registers are its only specification). One device with four ranges, which the
builder claims at the offsets below:

=============  ============================================  =====================================
offset         where                                         what
=============  ============================================  =====================================
LATCH          ports 0xe0-0xe3                               32 bits that read back, in any width
FLUSH          port 0xe4, 32 bits                            drop the host's mapping of the page at
                                                             this guest-physical address
BYTE_LATCH     ports 0xe8-0xeb                               the latch again, byte by byte
LINES          ports 0x2000-0x2017, one byte each            interrupt line n: 0 low, else high
MEMORY         64 KiB at 0xff000000                          memory that only the device has
=============  ============================================  =====================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.device import IrqLine
from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.trace import trace_group

T = trace_group("devices")

LATCH, FLUSH, BYTE_LATCH, LINES, MEMORY = 0x0, 0x4, 0x8, 0x100, 0x10000
LINE_COUNT = 24
MEMORY_SIZE = 0x10000


class TestDeviceState(DeviceState):
    """What was written. ``lines`` has a bit for each line that is high."""

    __test__ = False  # for pytest: the name is not a test's

    latch: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] = 0
    lines: Annotated[int, Meta(ge=0, lt=1 << LINE_COUNT)] = 0
    memory: Annotated[bytes, Meta(min_length=MEMORY_SIZE, max_length=MEMORY_SIZE)] = bytes(MEMORY_SIZE)


class TestDevice(StatefulDevice[TestDeviceState]):
    """``lines`` are the inputs of the interrupt controllers; ``on_flush(gpa)`` drops a page's mapping."""

    __test__ = False

    section_id = "testdev"
    max_access = 4

    def __init__(self, lines: Sequence[IrqLine], on_flush: Callable[[int], None]) -> None:
        self._lines = list(lines)
        self._driven = 0
        self._on_flush = on_flush
        super().__init__(TestDeviceState)

    def read(self, offset: int, size: int) -> int:
        """The latch, the memory; all else is write-only and reads as zeros."""
        if offset >= MEMORY:
            at = offset - MEMORY
            return int.from_bytes(self.state.memory[at : at + size], "little")
        if offset < LATCH + 4 or BYTE_LATCH <= offset < BYTE_LATCH + 4:
            return self.state.latch >> 8 * (offset & 3) & ((1 << 8 * size) - 1)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """As the table says; a width that a register does not have is ignored."""
        s = self.state
        mask = (1 << 8 * size) - 1
        value &= mask
        T.testdev_write.on and T.testdev_write(offset, size, value)
        if offset >= MEMORY:
            at = offset - MEMORY
            # Bytes, not a bytearray: what save() returned must not change. Copying 64 KiB costs less than the exit.
            s.memory = s.memory[:at] + value.to_bytes(size, "little") + s.memory[at + size :]
        elif offset >= LINES:
            bit = 1 << (offset - LINES)
            if size == 1:
                s.lines = s.lines | bit if value else s.lines & ~bit
                self._drive(bit)
        elif offset < LATCH + 4 or offset >= BYTE_LATCH:
            shift = 8 * (offset & 3)
            s.latch = (s.latch & ~(mask << shift) | value << shift) & 0xFFFFFFFF
        elif offset == FLUSH and size == 4:
            self._on_flush(value & ~0xFFF)

    def _drive(self, changed: int) -> None:
        for number, line in enumerate(self._lines):
            if changed & 1 << number:
                line.set_level(bool(self.state.lines & 1 << number))
        self._driven = self.state.lines

    def state_replaced(self) -> None:
        """Drive anew what is or was high. Other lines belong to other devices, which may hold them high."""
        self._drive(self._driven | self.state.lines)
