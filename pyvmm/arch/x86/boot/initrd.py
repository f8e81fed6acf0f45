"""The initial RAM disk (or the one Multiboot/PVH module): as high as RAM and the kernel allow."""

from __future__ import annotations

from dataclasses import dataclass

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.image import ImageFile
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ImageError
from pyvmm.trace import trace_group

T = trace_group("arch/x86/boot")


@dataclass(frozen=True)
class Initrd:
    """``size`` bytes of ``path`` at guest-physical ``gpa``."""

    path: str
    gpa: int
    size: int

    def describe(self) -> str:
        """One note for humans."""
        return f"initrd {self.size / layout.MIB:.1f} MiB at {self.gpa:#x}"


def load_initrd(placement: Placement, path: str | None, address_max: int = 0xFFFFFFFF) -> Initrd | None:
    """Place and copy the initrd; ``None`` if there is none.

    ``address_max`` is the highest address its last byte may have (boot.rst: initrd_addr_max). It goes to
    the end of RAM below 4 GiB, page-aligned, since kernels grow upwards from where they were loaded.
    ImageError if it does not fit beside what the image has claimed.
    """
    if path is None:
        return None
    with ImageFile(path, "initrd") as file:
        gpa = placement.highest_free(file.size, address_max + 1)
        if gpa is None:
            raise ImageError(
                path,
                "initrd",
                f"{file.size} bytes do not fit beside the kernel in {placement.memory.size >> 20} MiB of RAM"
                f" below {min(address_max + 1, layout.HOLE_START):#x}; use a larger --memory",
            )
        placement.claim(gpa, file.size, "the initrd", "initrd")
        file.copy_to(placement.memory, gpa, 0, file.size, "initrd")
        T.boot_initrd.on and T.boot_initrd(gpa, file.size)
        return Initrd(path, gpa, file.size)
