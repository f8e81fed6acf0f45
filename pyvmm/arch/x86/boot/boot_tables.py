"""The area for what a boot protocol's info structure points to: memory maps, module lists, names."""

from __future__ import annotations

from pyvmm.arch.x86 import layout
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory


class BootTables:
    """Hands out an area, ``layout.BOOT_TABLES`` if no other, from the bottom up, 8-byte aligned."""

    def __init__(
        self, memory: GuestMemory, start: int = layout.BOOT_TABLES, end: int = layout.BOOT_TABLES_END
    ) -> None:
        self._memory = memory
        self._next = start
        self._end = end

    def put(self, data: bytes) -> int:
        """Write ``data``; returns its guest-physical address. ConfigError if the area is full."""
        gpa = self._next
        if gpa + len(data) > self._end:
            raise ConfigError(f"boot tables: {len(data)} bytes more do not fit (a shorter initrd path may help)")
        self._memory.write(gpa, data)
        self._next = (gpa + len(data) + 7) & ~7
        return gpa
