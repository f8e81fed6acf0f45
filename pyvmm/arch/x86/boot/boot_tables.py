"""The area for what a boot protocol's info structure points to: memory maps, module lists, names."""

from __future__ import annotations

from pyvmm.arch.x86 import layout
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory


class BootTables:
    """Hands out ``layout.BOOT_TABLES`` from the bottom up, 8-byte aligned."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._next = layout.BOOT_TABLES

    def put(self, data: bytes) -> int:
        """Write ``data``; returns its guest-physical address. ConfigError if the area is full."""
        gpa = self._next
        if gpa + len(data) > layout.BOOT_TABLES_END:
            raise ConfigError(f"boot tables: {len(data)} bytes more do not fit (a shorter initrd path may help)")
        self._memory.write(gpa, data)
        self._next = (gpa + len(data) + 7) & ~7
        return gpa
