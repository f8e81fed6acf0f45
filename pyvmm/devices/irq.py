"""The device's end of an interrupt line: remembers the level, so that only edges cost anything."""

from __future__ import annotations

from pyvmm.devices.device import IrqLine


class UnconnectedLine:
    """An interrupt line that leads nowhere (a polled device, a machine without an interrupt controller)."""

    def set_level(self, level: bool) -> None:
        """Nobody listens."""


class IrqOutput:
    """A device's interrupt pin. :meth:`drive` passes on changes only, as a wire does.

    The level is *derived* from the device's registers, so it is not in the saved state: after a load the
    device calls :meth:`redrive`, because the interrupt controller behind the line is a different one then.
    """

    __slots__ = ("_line", "level")

    def __init__(self, line: IrqLine | None) -> None:
        self._line: IrqLine = UnconnectedLine() if line is None else line
        self.level = False

    def drive(self, level: bool) -> None:
        """Set the level; the line hears of it only if it changes."""
        if level != self.level:
            self.level = level
            self._line.set_level(level)

    def redrive(self, level: bool) -> None:
        """Set the level and tell the line in any case."""
        self.level = level
        self._line.set_level(level)
