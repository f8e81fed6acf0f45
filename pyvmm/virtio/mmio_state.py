"""What a virtio-mmio transport has to remember."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import Byte, DeviceState
from pyvmm.virtio.mmio_registers import STATUS_ORDER

Unsigned32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]


class MmioState(DeviceState):
    """The registers that are not a queue's. ``driver_features``: what the driver wrote, accepted or not yet.

    ``interrupt_status`` is the native core's; here it is filled in to be saved.
    """

    status: Byte = 0
    device_features_sel: Unsigned32 = 0
    driver_features_sel: Unsigned32 = 0
    driver_features: Annotated[int, Meta(ge=0)] = 0
    queue_sel: Unsigned32 = 0
    interrupt_status: Annotated[int, Meta(ge=0, le=3)] = 0
    config_generation: Unsigned32 = 0

    def problem(self) -> tuple[str, str] | None:
        """Status bits come in order, and features have 64 bits."""
        if self.driver_features >> 64:
            return "driver_features", "more than 64 bits"
        reached = [bool(self.status & bit) for bit in STATUS_ORDER]
        if reached != sorted(reached, reverse=True):
            return "status", f"{self.status:#x} is not reached by any driver"
        return None
