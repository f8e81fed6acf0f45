"""The VM generation counter: a GUID in guest memory that changes when a guest goes on from a snapshot.

Source: Microsoft, "Virtual Machine Generation ID" (2012). The firmware tells where the GUID is (ACPI device VGEN,
_CID VM_Gen_Counter, ADDR: low and high half of its GPA), and that it has changed (Notify 0x80, by a general-purpose
event). A guest that finds another GUID knows that it has a past in common with others, and draws new random numbers.
So it changes when a snapshot is loaded, and not when a machine moves: that one has no twin.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.memory.guest_memory import GuestMemory

SIZE = 16


class VmGenIdState(DeviceState):
    """The GUID, as it lies in memory."""

    guid: Annotated[bytes, Meta(min_length=SIZE, max_length=SIZE)] = bytes(SIZE)


class VmGenId(StatefulDevice[VmGenIdState]):
    """The GUID at ``gpa``; ``notify`` has the firmware tell the guest. It has no registers."""

    section_id = "vmgenid"

    def __init__(self, memory: GuestMemory, gpa: int, notify: Callable[[], None]) -> None:
        super().__init__(VmGenIdState)
        self._memory = memory
        self._gpa = gpa
        self._notify = notify
        self.state.guid = os.urandom(SIZE)

    def reset(self) -> None:
        """A reset is no new generation; whoever clears the memory then calls :meth:`place`."""

    def place(self) -> None:
        """Write the GUID into memory, as firmware does at power-on."""
        self._memory.write(self._gpa, self.state.guid)

    def renew(self) -> None:
        """A new generation: the guest is not the only one with this past."""
        with self.lock:
            self.state.guid = os.urandom(SIZE)
            self.place()
        self._notify()
