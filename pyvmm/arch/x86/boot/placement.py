"""Who occupies which guest-physical memory while an image is loaded.

Every loader claims what it writes, so that an image that asks for an address outside RAM, over the boot
structures or over itself is refused with the name of what it hits.
"""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.entry import EntryMode
from pyvmm.errors import ConfigError, ImageError
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory


class Extent(NamedTuple):
    """``[start, end)`` in guest-physical memory, in use by ``name``."""

    start: int
    end: int
    name: str


_ALWAYS = (
    Extent(0, 0x500, "the real-mode interrupt table and BIOS data area"),
    Extent(layout.EBDA, layout.EBDA_END, "the EBDA with the MP table"),
    Extent(layout.LOW_RAM_END, layout.ACPI_TABLES, "the VGA and option ROM hole"),
    Extent(layout.ACPI_TABLES, layout.ACPI_TABLES_END, "the ACPI tables"),
)
_PROTECTED = (
    Extent(layout.BOOT_GDT, layout.BOOT_GDT + PAGE_SIZE, "the boot GDT"),
    Extent(layout.BOOT_INFO, layout.BOOT_TABLES, "the boot parameters"),
    Extent(layout.BOOT_TABLES, layout.BOOT_TABLES_END, "the boot tables"),
    Extent(layout.COMMAND_LINE, layout.COMMAND_LINE + layout.COMMAND_LINE_MAX, "the command line"),
    Extent(layout.COMMAND_LINE + layout.COMMAND_LINE_MAX, layout.BOOT_STACK_TOP, "the boot stack"),
)
_LONG = (Extent(layout.BOOT_PAGE_TABLES, layout.BOOT_PAGE_TABLES_END, "the boot page tables"),)


class Placement:
    """The extents in use. ``memory`` is only asked what is RAM; nothing is written here."""

    def __init__(self, memory: GuestMemory, path: str, mode: EntryMode) -> None:
        self.memory = memory
        self.path = path
        self.extents: list[Extent] = list(_ALWAYS)
        if mode is not EntryMode.REAL:
            self.extents += _PROTECTED
        if mode is EntryMode.LONG:
            self.extents += _LONG
        low = ((0, layout.LOW_RAM_END), (layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES))
        if not all(memory.contains(start, size) for start, size in low):
            raise ConfigError("--memory: a guest needs RAM from address 0 through 1 MiB; use at least --memory 2M")

    @property
    def ram_size(self) -> int:
        """Bytes of guest RAM below 4 GiB, where images and initrd go."""
        return sum(min(r.end, layout.HOLE_START) - r.gpa for r in self.memory.regions if r.gpa < layout.HOLE_START)

    def claim(self, start: int, size: int, name: str, field: str) -> None:
        """Take ``[start, start+size)`` for ``name``; ImageError about ``field`` if that cannot be."""
        if size <= 0:
            return
        end = start + size
        where = f"{name} at {start:#x}..{end:#x}"
        for extent in self.extents:
            if start < extent.end and extent.start < end:
                raise ImageError(
                    self.path, field, f"{where} overlaps {extent.name} ({extent.start:#x}..{extent.end:#x})"
                )
        if not self.memory.contains(start, size):
            raise ImageError(
                self.path,
                field,
                f"{where} is outside the guest's RAM ({self.memory.size >> 20} MiB); use a larger --memory",
            )
        self.extents.append(Extent(start, end, name))

    def highest_free(self, size: int, limit: int) -> int | None:
        """Highest page-aligned address at or above 1 MiB where ``size`` bytes of RAM below ``limit`` are free.

        Whole pages: a kernel that frees its initrd frees the last page, whatever else would lie in it.
        """
        best: int | None = None
        size = size + PAGE_SIZE - 1 & -PAGE_SIZE
        limit = min(limit, layout.HOLE_START)
        for region in self.memory.regions:
            floor = max(region.gpa, layout.HIGH_RAM)
            top = min(region.end, limit)
            while (start := (top - size) & -PAGE_SIZE) >= floor:
                hits = [e for e in self.extents if start < e.end and e.start < start + size]
                if not hits:
                    best = start if best is None else max(best, start)
                    break
                top = min(e.start for e in hits)
        return best
