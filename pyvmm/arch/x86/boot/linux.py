"""Linux/x86: vmlinux and bzImage, entered by the 64-bit (or 32-bit) boot protocol.

Source: Documentation/arch/x86/boot.rst. A bzImage's payload (an ELF vmlinux, compressed) is unpacked on the
host into place: the guest then starts in the real kernel and never runs its own unpacker, which takes
minutes where CPL 0 is emulated. ``guest_decompress`` enters the bzImage as a boot loader does instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot import boot_params as bp
from pyvmm.arch.x86.boot.boot_params import BootParams, read_setup_header
from pyvmm.arch.x86.boot.boot_tables import BootTables
from pyvmm.arch.x86.boot.command_line import LINUX_DEFAULT_LIMIT, write_command_line
from pyvmm.arch.x86.boot.e820 import memory_map
from pyvmm.arch.x86.boot.elf import Elf, SegmentStream, load_segments, notes, parse_elf
from pyvmm.arch.x86.boot.entry import BootOptions, EntryMode, LoadedImage
from pyvmm.arch.x86.boot.image import ImageFile
from pyvmm.arch.x86.boot.initrd import load_initrd
from pyvmm.arch.x86.boot.payload import SIZE_TRAILER, TRAILER_INSIDE, Source, compression_of, unpack
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ImageError
from pyvmm.kvm.state import Regs
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory
from pyvmm.trace import trace_group

T = trace_group("arch/x86/boot")

_VMLINUX_INITRD_MAX = 0x7FFFFFFF  # what every x86-64 bzImage's initrd_addr_max says
_ENTRY_64 = 0x200  # offset of the 64-bit entry from the start of the protected-mode code
_ELF_HEAD_MAX = 1 << 16
RNG_SEED_SIZE = 32  # as many bytes as Linux's generator has state


def is_linux(image: ImageFile, elf: Elf) -> bool:
    """Whether an ELF file is a vmlinux: its notes have the name "Linux" (the build salt, since 4.19)."""
    return any(name == b"Linux" for name, _, _ in notes(image.read, elf))


def load_elf(memory: GuestMemory, image: ImageFile, elf: Elf, options: BootOptions, kind: str) -> LoadedImage:
    """A vmlinux, or any ELF executable without another protocol: 64-bit files are entered in long mode,
    32-bit files in protected mode, both with RSI = boot_params."""
    mode = EntryMode.LONG if elf.bits == 64 else EntryMode.PROTECTED
    placement = Placement(memory, image.path, mode)
    load_segments(image, elf, placement)
    params = BootParams()
    params[bp.CMDLINE_SIZE] = LINUX_DEFAULT_LIMIT
    params[bp.INITRD_ADDR_MAX] = _VMLINUX_INITRD_MAX
    return _finish(placement, params, options, kind, mode, elf.entry_address(), [])


def load_bzimage(memory: GuestMemory, image: ImageFile, options: BootOptions) -> LoadedImage:
    """A bzImage, unpacked here or (``options.guest_decompress``) by itself."""
    params = BootParams(read_setup_header(image.head(0x300), image.path))
    # boot.rst: "If the field contains 0, the real value is 4"; one more sector is the boot sector itself.
    kernel_at = ((params[bp.SETUP_SECTS] or 4) + 1) * 512
    if options.guest_decompress:
        return _enter_unpacker(memory, image, params, kernel_at, options)
    return _unpack_on_host(memory, image, params, kernel_at, options)


def _enter_unpacker(
    memory: GuestMemory, image: ImageFile, params: BootParams, kernel_at: int, options: BootOptions
) -> LoadedImage:
    """Load the protected-mode code as it is and enter it: 64-bit if it has that entry, else 32-bit."""
    long = params[bp.VERSION] >= 0x020C and bool(params[bp.XLOADFLAGS] & bp.XLF_KERNEL_64)
    mode = EntryMode.LONG if long else EntryMode.PROTECTED
    placement = Placement(memory, image.path, mode)
    size = image.size - kernel_at
    if size <= _ENTRY_64:
        raise ImageError(image.path, "setup_sects", f"the kernel proper would start at {kernel_at:#x} (truncated?)")
    start = needed = 0
    if params[bp.VERSION] >= 0x020A:
        start, needed = params[bp.PREF_ADDRESS], params[bp.INIT_SIZE]
    if not params[bp.RELOCATABLE_KERNEL] or not start:
        start = layout.HIGH_RAM
    if start + max(size, needed) > layout.HOLE_END:
        raise ImageError(image.path, "pref_address", f"{start:#x} leaves no room for the kernel below 4 GiB")
    placement.claim(start, max(size, needed), "the kernel (init_size)", "pref_address")
    image.copy_to(memory, start, kernel_at, size, "kernel")
    params[bp.CODE32_START] = start
    note = f"left packed: unpacks itself in the guest at {start:#x}"
    return _finish(placement, params, options, "bzimage", mode, start + (_ENTRY_64 if long else 0), [note])


def _unpack_on_host(
    memory: GuestMemory, image: ImageFile, params: BootParams, kernel_at: int, options: BootOptions
) -> LoadedImage:
    """Stream payload -> decompressor -> ELF segments in guest memory, in one pass."""
    path = image.path
    length = params[bp.PAYLOAD_LENGTH]
    if params[bp.VERSION] < 0x0208 or length <= 2 * SIZE_TRAILER:
        raise ImageError(
            path, "payload_length", f"{length}: the kernel does not say where its payload is; let the guest unpack it"
        )
    at = kernel_at + params[bp.PAYLOAD_OFFSET]
    head = image.read(at, 8, "payload_offset")
    trailer = image.read(at + length - SIZE_TRAILER, SIZE_TRAILER, "payload_length")
    compression = compression_of(head)
    if compression is None:
        raise ImageError(path, "payload", f"unknown compression (starts with {head.hex(' ')}); let the guest unpack it")
    unpacked = int.from_bytes(trailer, "little")
    ram = Placement(memory, path, EntryMode.REAL).ram_size
    if unpacked > ram:
        raise ImageError(
            path,
            "payload",
            f"unpacks to {unpacked} bytes, the guest has {ram} bytes of RAM below 4 GiB; use a larger --memory",
        )
    packed = length - (0 if compression in TRAILER_INSIDE else SIZE_TRAILER)
    source = Source(image.chunks(at, packed, "payload"))
    mode, placement, entry = _stream_elf(memory, path, unpack(path, compression, source, unpacked))
    T.boot_payload.on and T.boot_payload(compression, length, unpacked)
    note = f"{compression} payload {length / layout.MIB:.1f} MiB unpacked to {unpacked / layout.MIB:.1f} MiB"
    return _finish(placement, params, options, "bzimage", mode, entry, [note])


def _stream_elf(memory: GuestMemory, path: str, pieces: Iterator[bytes]) -> tuple[EntryMode, Placement, int]:
    """Put an ELF file that arrives in pieces into memory; only its first 64 KiB are ever gathered."""
    head = bytearray()
    for piece in pieces:
        head += piece
        if len(head) >= _ELF_HEAD_MAX:
            break

    def read(offset: int, size: int, field: str) -> bytes:
        if offset + size > len(head):
            raise ImageError(path, f"payload: {field}", f"ends at {offset + size:#x}, not within the first 64 KiB")
        return bytes(head[offset : offset + size])

    elf = parse_elf(read, path)
    mode = EntryMode.LONG if elf.bits == 64 else EntryMode.PROTECTED
    placement = Placement(memory, path, mode)
    stream = SegmentStream(elf, placement)
    stream.feed(head)
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return mode, placement, elf.entry_address()


def _finish(
    placement: Placement,
    params: BootParams,
    options: BootOptions,
    kind: str,
    mode: EntryMode,
    entry: int,
    notes_: list[str],
) -> LoadedImage:
    """Command line, initrd, memory map and the zero page; the registers the protocol wants."""
    memory, path = placement.memory, placement.path
    if entry >= layout.HOLE_END:
        raise ImageError(path, "e_entry", f"{entry:#x} is not below 4 GiB, where the boot page tables end")
    line = options.command_line if kind == "elf" else options.linux_command_line()
    params[bp.CMD_LINE_PTR] = write_command_line(memory, line, params[bp.CMDLINE_SIZE])
    initrd = load_initrd(placement, options.initrd, params[bp.INITRD_ADDR_MAX])
    if initrd is not None:
        params[bp.RAMDISK_IMAGE], params[bp.RAMDISK_SIZE] = initrd.gpa, initrd.size
        notes_.append(initrd.describe())
    params.set_memory_map(memory_map(memory, acpi=options.acpi))
    if options.acpi:
        params.set_acpi_rsdp(layout.ACPI_TABLES)
    if kind != "elf" and params[bp.VERSION] >= 0x0209:
        # Without a seed each use of random numbers hashes the entropy pool anew until the kernel has gathered its own,
        # and getrandom() blocks until then: on a guest without rdrand, minutes. It wipes the seed once taken.
        # Where it lies in RAM it makes three entries out of one of the memory map (see there).
        tables = BootTables(memory) if options.acpi else BootTables(memory, layout.ACPI_TABLES, layout.ACPI_TABLES_END)
        params[bp.SETUP_DATA] = tables.put(bp.rng_seed(os.urandom(RNG_SEED_SIZE)))
    memory.write(layout.BOOT_INFO, params.to_bytes())
    # boot.rst, 32-bit protocol: EBP, EDI and EBX must be zero; 64-bit: only RSI counts. RSP is for bare images.
    regs = Regs(rip=entry, rsi=layout.BOOT_INFO, rsp=layout.BOOT_STACK_TOP)
    return LoadedImage(kind=kind, mode=mode, regs=regs, notes=tuple(notes_))


assert bp.SIZE == PAGE_SIZE == layout.BOOT_TABLES - layout.BOOT_INFO
