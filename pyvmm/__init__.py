"""pyvmm: a small virtual machine monitor on /dev/kvm, in Python over one small native core.

``pyvmm.Machine`` and the exits it yields are the Python API: see :mod:`pyvmm.api.machine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyvmm.api.exits import (
        EmulationFailure,
        Exit,
        Halt,
        MmioRead,
        MmioWrite,
        PortRead,
        PortWrite,
        Shutdown,
        Step,
    )
    from pyvmm.api.machine import Machine

__all__ = [
    "EmulationFailure", "Exit", "Halt", "Machine", "MmioRead", "MmioWrite", "PortRead", "PortWrite", "Shutdown", "Step",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The API, when it is first asked for: ``import pyvmm`` alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'pyvmm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("pyvmm.api.machine" if name == "Machine" else "pyvmm.api.exits"), name)
