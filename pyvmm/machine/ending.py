"""How a guest ended, for exit statuses and reports."""

from __future__ import annotations

from typing import Any

import msgspec

from pyvmm.errors import EXIT_GUEST_CRASHED, EXIT_REFUSED, EXIT_TIMEOUT


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a run. ``kind`` tells a guest's own status from pyvmm's."""

    kind: str
    """``halt``, ``poweroff``, ``reset`` (with --no-reboot), ``debug-exit``, ``timeout``, ``quit``,
    ``triple-fault``, ``unknown-instruction``, ``vcpu-error``."""
    status: int = 0
    """Process exit status that goes with it."""
    reason: str = ""
    """One line for people."""
    asked_by: str | None = None
    """Who quit it: ``signal``, ``console``, ``qmp``, ``gdb``."""
    value: int | None = None
    """What the guest wrote to debug-exit."""
    crash: dict[str, Any] | None = None
    """Registers, code and disassembly of a guest that crashed."""
    problem: str | None = None
    """What of the host's kept the machine from coming to rest: what the guest gave to a disk may be lost."""


def timed_out(seconds: float) -> Ending:
    """The guest did not end within its time."""
    return Ending(kind="timeout", status=EXIT_TIMEOUT, reason=f"the guest did not end within {seconds:g} s")


def crashed(kind: str, reason: str, crash: dict[str, Any] | None) -> Ending:
    """The guest, or pyvmm with it, cannot go on."""
    return Ending(kind=kind, status=EXIT_GUEST_CRASHED, reason=reason, crash=crash)


def unclean(ending: Ending, problem: str) -> Ending:
    """The same end, but something on the host did not finish: nobody must take it for a good one."""
    return msgspec.structs.replace(ending, status=EXIT_REFUSED, reason=problem, problem=problem)
