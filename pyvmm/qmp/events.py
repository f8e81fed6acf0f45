"""The events clients may get, and what an ending tells. Adding one is a line in ``EVENTS`` and a call of ``emit``.

An event is declared with the struct of its data, or None; query-qmp-schema shows it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pyvmm.machine.ending import Ending
from pyvmm.qmp.arguments import QmpStruct

if TYPE_CHECKING:
    from pyvmm.qmp.monitor import Monitor

ShutdownCause = Literal[
    "none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui",
    "guest-shutdown", "guest-reset", "guest-panic", "subsystem-reset",
]  # fmt: skip
"""QEMU's ShutdownCause."""


class ShutdownData(QmpStruct):
    """Of SHUTDOWN and RESET. ``guest``: the guest's own doing."""

    guest: bool
    reason: ShutdownCause


class GuestPanickedData(QmpStruct):
    """``action``: what becomes of the machine."""

    action: Literal["pause", "poweroff", "run"]


class MigrationData(QmpStruct):
    """Of MIGRATION."""

    status: Literal[
        "none", "setup", "cancelling", "cancelled", "active", "postcopy-active", "postcopy-paused", "postcopy-recover",
        "completed", "failed", "colo", "pre-switchover", "device", "wait-unplug",
    ]  # fmt: skip


class MigrationPassData(QmpStruct):
    """Of MIGRATION_PASS; ``pass`` begins with 1."""

    pass_: int = msgspec.field(name="pass")


class ColoExitData(QmpStruct):
    """Of COLO_EXIT. ``mode``: what this side was."""

    mode: Literal["none", "primary", "secondary"]
    reason: Literal["none", "request", "error", "processing"]


EVENTS: dict[str, type[QmpStruct] | None] = {
    "STOP": None,
    "RESUME": None,
    "POWERDOWN": None,
    "SHUTDOWN": ShutdownData,
    "RESET": ShutdownData,
    "GUEST_PANICKED": GuestPanickedData,
    "MIGRATION": MigrationData,
    "MIGRATION_PASS": MigrationPassData,
    "COLO_EXIT": ColoExitData,
}

_QUIT_REASONS = {"signal": "host-signal", "console": "host-ui", "qmp": "host-qmp-quit"}
_GUEST_REASONS = {
    "halt": "guest-shutdown",
    "poweroff": "guest-shutdown",
    "debug-exit": "guest-shutdown",
    "reset": "guest-reset",
    "triple-fault": "guest-panic",
}


def event_document(name: str, data: dict[str, Any] | None) -> dict[str, Any]:
    """What is sent; ``data`` must be what ``EVENTS`` declares."""
    struct = EVENTS[name]
    if struct is not None:
        msgspec.convert(data, struct)
    elif data is not None:
        raise ValueError(f"event {name} has no data")
    now = time.time_ns() // 1000
    document: dict[str, Any] = {
        "timestamp": {"seconds": now // 1_000_000, "microseconds": now % 1_000_000},
        "event": name,
    }
    return document if data is None else document | {"data": data}


def tell_ending(monitor: Monitor, ending: Ending) -> None:
    """The events of a guest that has ended, or of one that is quit."""
    if ending.kind == "triple-fault":
        held = monitor.machine.config.no_shutdown
        monitor.emit("GUEST_PANICKED", {"action": "pause" if held else "poweroff"})
    reason = _GUEST_REASONS.get(ending.kind)
    told = reason or _QUIT_REASONS.get(ending.asked_by or "", "host-error")
    monitor.emit("SHUTDOWN", {"guest": reason is not None, "reason": told})
