"""Linux's setup header and boot_params ("zero page").

Sources: Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "Details of Header Fields"),
Documentation/arch/x86/zero-page.rst; offsets are those of struct boot_params, in which the setup header
lies where it lies in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pyvmm.arch.x86.boot.e820 import MapEntry
from pyvmm.errors import ImageError

SIZE = 4096

# struct boot_params, outside the setup header.
ACPI_RSDP_ADDR = 0x070  # u64, protocol 2.14
E820_ENTRIES = 0x1E8  # u8
E820_TABLE = 0x2D0  # struct boot_e820_entry: u64 address, u64 size, u32 type
E820_ENTRIES_MAX = 128

# The setup header: offset, struct format.
SETUP_SECTS = (0x1F1, "<B")
BOOT_FLAG = (0x1FE, "<H")
HEADER_LENGTH = 0x201  # u8, second byte of the jump: the header ends at 0x202 + this
MAGIC = (0x202, "<I")
VERSION = (0x206, "<H")
TYPE_OF_LOADER = (0x210, "<B")
LOADFLAGS = (0x211, "<B")
CODE32_START = (0x214, "<I")
RAMDISK_IMAGE = (0x218, "<I")
RAMDISK_SIZE = (0x21C, "<I")
CMD_LINE_PTR = (0x228, "<I")
INITRD_ADDR_MAX = (0x22C, "<I")
RELOCATABLE_KERNEL = (0x234, "<B")
XLOADFLAGS = (0x236, "<H")
CMDLINE_SIZE = (0x238, "<I")
PAYLOAD_OFFSET = (0x248, "<I")
PAYLOAD_LENGTH = (0x24C, "<I")
SETUP_DATA = (0x250, "<Q")  # protocol 2.09
PREF_ADDRESS = (0x258, "<Q")
INIT_SIZE = (0x260, "<I")

HEADER_START = 0x1F1
HEADER_END_MAX = 0x290  # boot_params has no room for more
HDRS = 0x53726448  # "HdrS"
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
SETUP_RNG_SEED = 9  # type of a struct setup_data; Linux 6.2
LOADER_UNDEFINED = 0xFF  # boot.rst: a loader without an assigned number

PROTOCOL_MIN = 0x0206
"""First with cmdline_size: without it the command line's limit is unknown."""

Field = tuple[int, str]


class BootParams:
    """The zero page under construction."""

    def __init__(self, setup_header: bytes = b"") -> None:
        """``setup_header`` is the image's own, from offset 0x1f1 on; without one (a vmlinux) 2.15 is spoken."""
        self._page = bytearray(SIZE)
        if setup_header:
            self._page[HEADER_START : HEADER_START + len(setup_header)] = setup_header
        else:
            self[BOOT_FLAG] = 0xAA55
            self[MAGIC] = HDRS
            self[VERSION] = 0x020F
            self[LOADFLAGS] = LOADED_HIGH
            self[XLOADFLAGS] = XLF_KERNEL_64
        self[TYPE_OF_LOADER] = LOADER_UNDEFINED

    def __getitem__(self, field: Field) -> int:
        offset, form = field
        value: int = struct.unpack_from(form, self._page, offset)[0]
        return value

    def __setitem__(self, field: Field, value: int) -> None:
        offset, form = field
        struct.pack_into(form, self._page, offset, value)

    def set_memory_map(self, entries: Sequence[MapEntry]) -> None:
        """Fill the e820 table (at most 128 entries fit; the machine has a handful)."""
        if len(entries) > E820_ENTRIES_MAX:
            raise ValueError(f"{len(entries)} e820 entries")
        for index, entry in enumerate(entries):
            struct.pack_into("<QQI", self._page, E820_TABLE + 20 * index, entry.start, entry.size, entry.type)
        self._page[E820_ENTRIES] = len(entries)

    def set_acpi_rsdp(self, gpa: int) -> None:
        """Where the RSDP is, which spares the kernel the search."""
        struct.pack_into("<Q", self._page, ACPI_RSDP_ADDR, gpa)

    def to_bytes(self) -> bytes:
        """The page as it goes into guest memory."""
        return bytes(self._page)


def rng_seed(seed: bytes) -> bytes:
    """A ``struct setup_data`` (boot.rst, setup_data: u64 next, u32 type, u32 len, data) that carries ``seed``."""
    return struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed


def read_setup_header(head: bytes, path: str) -> bytes:
    """The setup header in the first bytes of a bzImage, from 0x1f1 to its own end, checked.

    ImageError names the field. The caller has seen "HdrS" at 0x202.
    """
    end = 0x202 + head[HEADER_LENGTH]
    header = head[HEADER_START : min(end, HEADER_END_MAX)]
    if len(head) < 0x264 or end < CMDLINE_SIZE[0] + 4:
        raise ImageError(path, "setup header", f"is cut off at {min(end, len(head)):#x} (truncated?)")
    params = BootParams(header)
    if params[BOOT_FLAG] != 0xAA55:
        raise ImageError(path, "boot_flag", f"is {params[BOOT_FLAG]:#06x}, must be 0xaa55")
    version = params[VERSION]
    if version < PROTOCOL_MIN:
        raise ImageError(
            path, "version", f"boot protocol {version >> 8}.{version & 0xFF:02d} is too old; 2.06 is the first known"
        )
    if not params[LOADFLAGS] & LOADED_HIGH:
        raise ImageError(path, "loadflags", "LOADED_HIGH is clear: a zImage, which is not supported")
    return header
