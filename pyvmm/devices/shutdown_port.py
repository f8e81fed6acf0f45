"""The shutdown port of Bochs (and once of QEMU): the letters of "Shutdown", one by one, turn the machine off.

Source: Bochs, iodev/unmapped.cc, port 0x8900. Test images write it after the debug exit, where no such device ended
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.registers import Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

WORD = b"Shutdown"


class ShutdownPortState(DeviceState):
    """How many letters have come."""

    matched: Annotated[int, Meta(ge=0, lt=len(WORD))] = 0


class ShutdownPort(StatefulDevice[ShutdownPortState]):
    """One port; ``on_shutdown`` is called after the last letter."""

    section_id = "shutdown-port"
    registers = RegisterTable("shutdown port", (Register(0, "LETTER", "the next letter of Shutdown"),))

    def __init__(self, on_shutdown: Callable[[], None]) -> None:
        super().__init__(ShutdownPortState)
        self._on_shutdown = on_shutdown

    def read(self, offset: int, size: int) -> int:
        """Nothing to read: as if nobody were there."""
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """The next letter; a wrong one starts over (and may itself be the first)."""
        letter = value & 0xFF
        matched = self.state.matched
        matched = matched + 1 if letter == WORD[matched] else int(letter == WORD[0])
        self.state.matched = matched % len(WORD)
        if matched == len(WORD):
            T.shutdown_port.on and T.shutdown_port()
            self._on_shutdown()
