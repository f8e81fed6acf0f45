"""How the boot vCPU enters a loaded image: what every loader returns."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pyvmm.kvm.state import Regs


class EntryMode(enum.Enum):
    """CPU mode at the image's first instruction."""

    REAL = "real"
    """16-bit real mode; CS base = ``cs << 4``, ``regs.rip`` is the offset."""
    PROTECTED = "protected"
    """32-bit protected mode, paging off, flat 4 GiB segments (Multiboot, PVH)."""
    LONG = "long"
    """64-bit long mode, boot page tables identity-map the low 4 GiB (Linux 64-bit boot protocol)."""


@dataclass(frozen=True)
class BootOptions:
    """What the user asked for, as far as loaders care."""

    command_line: str = ""
    initrd: str | None = None
    cpus: int = 1
    load_address: int | None = None
    """Where a flat real-mode image goes (default 0x7c00)."""
    guest_decompress: bool = False
    """Let a bzImage unpack itself in the guest instead of on the host."""
    acpi: bool = True
    acpi_devices: tuple[bytes, ...] = ()
    """AML terms for the DSDT's ``\\_SB`` (see :mod:`pyvmm.arch.x86.boot.aml`)."""
    protocol: str = "auto"
    """``auto``, or the boot protocol to use: ``linux``, ``pvh``, ``multiboot``, ``flat``."""
    linux_additions: str = ""
    """Added to the command line if the image turns out to be Linux (what the host's quirks want)."""

    def linux_command_line(self) -> str:
        """The command line for Linux; the user's own words come last, so that they win."""
        return f"{self.linux_additions} {self.command_line}".strip()


@dataclass(frozen=True)
class LoadedImage:
    """An image in guest memory, ready to be entered."""

    kind: str
    """One of ``vmlinux``, ``pvh``, ``bzimage``, ``multiboot``, ``elf``, ``flat``."""
    mode: EntryMode
    regs: Regs
    cs: int = 0
    """Real-mode code segment (REAL only)."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What the loader decided, for humans (``zstd payload 5.1 MiB unpacked to 21 MiB``)."""
