"""The memory map every boot protocol hands over, in the types of INT 15h, AX=E820h (ACPI 6.5, section 15.1)."""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.arch.x86 import layout
from pyvmm.memory.guest_memory import GuestMemory

RAM = 1
RESERVED = 2


class MapEntry(NamedTuple):
    """``[start, end)`` of one type."""

    start: int
    end: int
    type: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start


_RESERVED_AREAS = (
    MapEntry(layout.EBDA, layout.EBDA_END, RESERVED),
    MapEntry(layout.ACPI_TABLES, layout.ACPI_TABLES_END, RESERVED),
)


def memory_map(memory: GuestMemory, *, acpi: bool = True) -> list[MapEntry]:
    """RAM and, for machines with ACPI tables, reserved ranges; ascending, none overlapping, adjacent RAM merged.

    The VGA hole (0xA0000..0xE0000) and the 3-4 GiB hole are simply not listed, whatever backs them. Without ``acpi``
    the two areas with tables are not either: what is not RAM is nobody's, and Linux walks the whole map ten thousand
    times when it maps memory (half a second for four entries more, where CPL 0 is emulated).
    """
    ram: list[MapEntry] = []
    for region in memory.regions:
        for start, end in ((region.gpa, min(region.end, layout.EBDA)), (max(region.gpa, layout.HIGH_RAM), region.end)):
            if start >= end:
                continue
            if ram and ram[-1].end == start:
                ram[-1] = MapEntry(ram[-1].start, end, RAM)
            else:
                ram.append(MapEntry(start, end, RAM))
    return sorted([*ram, *(_RESERVED_AREAS if acpi else ())])
