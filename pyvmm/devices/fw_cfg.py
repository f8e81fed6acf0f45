"""fw_cfg: the little table through which QEMU tells firmware, and bare-metal test suites, what the machine has.

Source: QEMU docs/specs/fw_cfg.rst. Offset 0 (two bytes, write-only) selects an item and rewinds it; each one-byte
read gives its next byte, zeros behind its end. Unknown items are empty, so read as zeros. There is no DMA interface:
bit 1 of the ID item is clear. Items cannot be written, as in QEMU since 2.4.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import DeviceState, StatefulDevice, Word
from pyvmm.registers import Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

SIGNATURE, ID, UUID, RAM_SIZE, NO_GRAPHICS, CPUS, MAX_CPUS, FILE_DIRECTORY = 0, 1, 2, 3, 4, 5, 0x0F, 0x19
ID_TRADITIONAL = 1
_OFFSET_MAX = 0xFFFFFFFF


class FwCfgState(DeviceState):
    """The selected item and how far it has been read."""

    selector: Word = SIGNATURE
    offset: Annotated[int, Meta(ge=0, le=_OFFSET_MAX)] = 0


class FwCfg(StatefulDevice[FwCfgState]):
    """Two ports. ``ram`` in bytes."""

    section_id = "fw-cfg"
    registers = RegisterTable("fw_cfg", (
        Register(0, "SELECTOR", "selects an item", access="w", size=2, values={
            SIGNATURE: "signature", ID: "interfaces", UUID: "UUID", RAM_SIZE: "memory size", NO_GRAPHICS: "no graphics",
            CPUS: "number of CPUs", MAX_CPUS: "most CPUs", FILE_DIRECTORY: "files",
        }),
        Register(0, "DATA", "the item's next byte", access="r", size=2),
    ))  # fmt: skip
    max_access = 2

    def __init__(self, *, ram: int, cpus: int) -> None:
        super().__init__(FwCfgState)
        self._items = {
            SIGNATURE: b"QEMU",
            ID: ID_TRADITIONAL.to_bytes(4, "little"),
            UUID: bytes(16),
            RAM_SIZE: ram.to_bytes(8, "little"),
            NO_GRAPHICS: (1).to_bytes(2, "little"),
            CPUS: cpus.to_bytes(2, "little"),
            MAX_CPUS: cpus.to_bytes(2, "little"),
            FILE_DIRECTORY: (0).to_bytes(4, "big"),  # the number of files
        }

    def read(self, offset: int, size: int) -> int:
        """The next byte, at either port, as in QEMU; a wider read is none of the interface's."""
        if size != 1:
            return 0xFFFF
        s = self.state
        item = self._items.get(s.selector, b"")
        value = item[s.offset] if s.offset < len(item) else 0
        s.offset = min(s.offset + 1, _OFFSET_MAX)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item. One byte would be data for the item, which nobody may write."""
        if offset == 0 and size == 2:
            self.state.selector, self.state.offset = value & 0xFFFF, 0
            T.fw_cfg_select.on and T.fw_cfg_select(value & 0xFFFF)
