"""Flat real-mode images: the file, as it is, at an address; CPU as a BIOS leaves it to a boot sector.

Source: the PC BIOS boot convention (IBM PC Technical Reference, INT 19h): boot sector at 0000:7C00, DL the
boot drive. There is no BIOS behind it: no INT services answer.
"""

from __future__ import annotations

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.entry import BootOptions, EntryMode, LoadedImage
from pyvmm.arch.x86.boot.image import ImageFile
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ConfigError
from pyvmm.kvm.state import Regs
from pyvmm.memory.guest_memory import GuestMemory

DEFAULT_ADDRESS = 0x7C00
LOWEST_ADDRESS = 0x500  # behind the interrupt table and the BIOS data area
_FIRST_HARD_DISK = 0x80


def load_flat(memory: GuestMemory, image: ImageFile, options: BootOptions) -> LoadedImage:
    """Copy the file to the load address and enter it in real mode.

    Below 64 KiB CS is 0 and IP the address (what ``org`` says); above, CS is the address's paragraph and IP
    0, which needs a multiple of 16. DS = ES = CS; SS:SP is 0 and the image's start (0x7c00 above 64 KiB).
    """
    address = DEFAULT_ADDRESS if options.load_address is None else options.load_address
    if options.initrd is not None:
        raise ConfigError("--initrd: a flat real-mode image has no way to be handed one")
    if options.command_line:
        raise ConfigError("--append: a flat real-mode image has no way to be handed a command line")
    if not LOWEST_ADDRESS <= address < layout.EBDA:
        raise ConfigError(
            f"load address {address:#x}: a flat image goes to {LOWEST_ADDRESS:#x}..{layout.EBDA:#x}, low RAM"
        )
    segmented = address >= 0x10000
    if segmented and address % 16:
        raise ConfigError(f"load address {address:#x}: from 64 KiB on it must be a multiple of 16")
    placement = Placement(memory, image.path, EntryMode.REAL)
    placement.claim(address, image.size, "the flat image", "size")
    image.copy_to(memory, address, 0, image.size, "image")
    regs = Regs(
        rip=0 if segmented else address,
        rsp=DEFAULT_ADDRESS if segmented else address & ~1,
        rdx=_FIRST_HARD_DISK,
    )
    return LoadedImage(kind="flat", mode=EntryMode.REAL, regs=regs, cs=address >> 4 if segmented else 0)
