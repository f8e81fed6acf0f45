"""A device with two registers: twice what was written, and how often that was read. Chapter 6."""

from pyvmm.devices.state import DeviceState, StatefulDevice


class CountingDoublerState(DeviceState):
    """Its registers: ``value``, a byte, and ``reads``, which is never below 0."""


class CountingDoubler(StatefulDevice[CountingDoublerState]):
    """Offset 0: what was written last, times two. Offset 1: how often offset 0 was read."""

    section_id = "counting-doubler"

    def __init__(self) -> None:
        super().__init__(CountingDoublerState)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass
