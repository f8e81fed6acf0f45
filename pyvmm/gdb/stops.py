"""Why the guest stands still, in the words of stop-reply packets (GDB's manual, appendix E.3)."""

from __future__ import annotations

from dataclasses import dataclass

SIGINT, SIGTRAP, SIGABRT = 2, 5, 6


@dataclass(frozen=True)
class Stop:
    """vCPU ``cpu`` stopped. ``why`` is what goes with it: ``swbreak:;``, ``watch:ADDRESS;``, or nothing."""

    cpu: int
    signal: int = SIGTRAP
    why: str = ""
    lasting: bool = False
    """It does not happen again by itself when the vCPU goes on: to be told later, if another one is told now."""

    def packet(self) -> bytes:
        """The reply; threads are numbered from 1."""
        return f"T{self.signal:02x}thread:{self.cpu + 1:x};{self.why}".encode()


@dataclass(frozen=True)
class Exited:
    """The guest is over."""

    status: int

    def packet(self) -> bytes:
        """The reply."""
        return f"W{self.status & 0xFF:02x}".encode()
