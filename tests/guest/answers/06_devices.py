"""Both registers in the state."""

from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import Byte, DeviceState, StatefulDevice


class CountingDoublerState(DeviceState):
    value: Byte = 0
    reads: Annotated[int, Meta(ge=0)] = 0


class CountingDoubler(StatefulDevice[CountingDoublerState]):
    section_id = "counting-doubler"

    def __init__(self) -> None:
        super().__init__(CountingDoublerState)

    def read(self, offset: int, size: int) -> int:
        if offset == 1:
            return self.state.reads & 0xFF
        self.state.reads += 1
        return self.state.value * 2 & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.state.value = value & 0xFF


class _LooseState(DeviceState):
    value: int = 0
    reads: int = 0


class _Loose(CountingDoubler):
    def __init__(self) -> None:
        StatefulDevice.__init__(self, _LooseState)  # type: ignore[arg-type]


WRONG = {"takes any number": _Loose}
