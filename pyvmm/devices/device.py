"""What a device is: registers at offsets, an interrupt line, state that can be saved. No addresses, no KVM."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from pyvmm.registers import Register, RegisterTable


class IrqLine(Protocol):
    """One interrupt input, as a device sees it."""

    def set_level(self, level: bool) -> None:
        """Drive the line high (``True``) or low."""


class Device:
    """Base of every device model.

    ``read``/``write`` get an offset from the start of the device's range and an access size in bytes that
    the bus has already cut down to ``max_access``. Registers are hostile territory: any offset, any value,
    any order must leave the device in a legal state and must not raise.

    ``lock`` protects the device's state. The bus holds it around ``read`` and ``write``; what the host side
    calls (input, buttons, ``reset``, ``save``, ``load``) takes it itself. It is re-entrant, so a callback may
    call back into the same device; a callback runs with it held, so it only notes and wakes, never waits for
    a vCPU and never takes a lock under which somebody else calls this device.
    """

    section_id = ""
    """Name of the device's section in saved state; unique in a machine."""
    version = 1
    """Version of that section's fields."""
    max_access = 1
    """Widest access in bytes; the bus splits wider ones into consecutive offsets, as an 8-bit ISA bus does."""
    registers: RegisterTable | None = None
    """What is at its offsets, for people."""
    whole_access_only = False
    """``True``: an access that lies only partly in the device's range does not reach it at all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def read(self, offset: int, size: int) -> int:
        """Value of ``size`` bytes at ``offset``."""
        raise NotImplementedError(f"read is not implemented for {type(self).__name__}")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes of ``value`` at ``offset``."""
        raise NotImplementedError(f"write is not implemented for {type(self).__name__}")

    def register_at(self, offset: int, *, write: bool) -> Register | None:
        """The register that an access at ``offset`` would reach now; ``None``: none that it has a name for."""
        return self.registers.find(offset, write=write) if self.registers is not None else None

    def reset(self) -> None:
        """Back to the power-on state."""
        raise NotImplementedError(f"reset is not implemented for {type(self).__name__}")

    def pause(self) -> None:
        """The machine stands still: touch guest memory no more, finish what is under way. Most devices only answer."""

    def resume(self) -> None:
        """The machine goes on; follows a :meth:`pause`."""

    def waits_for(self) -> str | None:
        """What on the host it waits for just now, as a line for the user. From any thread; takes no lock."""
        return None

    def end_io(self, deadline: float) -> None:
        """End the threads it has by monotonic time ``deadline``; no vCPU runs any more.

        DeadlineError if one goes on: nothing that it uses may be given back.
        """

    def statistics(self) -> dict[str, int]:
        """Counters for reports, by name; most devices count nothing."""
        return {}

    def release(self) -> None:
        """Let go of what only one process may use (a disk), durably; the machine is paused. OSError if that fails."""

    def claim(self) -> None:
        """Take that, or take it back. HostError if somebody else has it."""

    def arriving(self) -> None:
        """The guest stands still where it was and will soon run here: what comes for it may be kept for it."""

    def left(self) -> None:
        """The guest runs elsewhere now: have nothing more to do with its surroundings, until :meth:`claim`."""

    def moved(self) -> None:
        """The guest runs here now, not where it was: tell whoever must know (a network)."""

    def save(self) -> dict[str, Any]:
        """Everything :meth:`load` needs to go on exactly here."""
        raise NotImplementedError(f"save is not implemented for {type(self).__name__}")

    def prepare_load(self, state: dict[str, Any]) -> Callable[[], None]:
        """Check ``state`` (hostile) and return what takes it over, which cannot fail.

        SectionError, and nothing changed, if it is not exactly what :meth:`save` makes. In two steps, so that a whole
        machine's state is known to be good before any of it is applied.
        """
        raise NotImplementedError(f"prepare_load is not implemented for {type(self).__name__}")

    def load(self, state: dict[str, Any]) -> None:
        """Both steps of :meth:`prepare_load`."""
        self.prepare_load(state)()


class PortHint(Protocol):
    """How a device tells the native run loop that a port needs no Python for now.

    The loop then serves the port itself: a *sink* collects written bytes for :meth:`Device.write`'s
    equivalent ``sink`` callback, a *latch* answers one-byte reads with a constant. The device keeps the
    hints true: it withdraws them before its registers stop behaving that way.
    """

    def set_sink(self, offset: int, on: bool) -> None:
        """One-byte writes at ``offset`` are pure output (delivered later, in order) while ``on``."""

    def set_latch(self, offset: int, value: int | None) -> None:
        """One-byte reads at ``offset`` return ``value`` without side effects; ``None``: ask the device."""


class NoPortHint:
    """The :class:`PortHint` of a device whose every access is served in Python."""

    def set_sink(self, offset: int, on: bool) -> None:
        """Nothing to tell."""

    def set_latch(self, offset: int, value: int | None) -> None:
        """Nothing to tell."""


Output = Callable[[bytes], None]
"""Where a device's output goes. It must not raise: a full disk is not the guest's fault."""
