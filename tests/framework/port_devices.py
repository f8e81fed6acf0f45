"""Devices that tests put on a machine's port bus."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.devices.device import Device

PORT = 0x300


class Echo(Device):
    """Each read gives a new number; each write must bring the last one back. ``problems`` tells what was not so."""

    max_access = 4

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = 0
        self.problems: list[str] = []

    def read(self, offset: int, size: int) -> int:
        if self.reads != self.writes:
            self.problems.append(f"read {self.reads + 1} after {self.writes} writes")
        self.reads += 1
        return self.reads

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1
        if value != self.reads or self.writes != self.reads:
            self.problems.append(f"write {self.writes} of {value} after {self.reads} reads")


class Actor(Device):
    """Writes are recorded and carried out by ``act``; reads ask ``answer``."""

    max_access = 4

    def __init__(
        self, act: Callable[[int], None] = lambda value: None, answer: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__()
        self.written: list[int] = []
        self._act = act
        self._answer = answer

    def read(self, offset: int, size: int) -> int:
        return self._answer()

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append(value)
        self._act(value)
