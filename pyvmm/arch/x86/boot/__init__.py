"""Loaders: each puts an image into guest memory and says how the boot vCPU enters it.

::

    file --classify--> bzImage ----- payload unpacked on the host ---> ELF segments, 64-bit entry
                   |           `---- guest_decompress --------------> its own 64-bit entry
                   +-> Multiboot 1 (ELF, or with load addresses) ---> 32-bit entry, EAX/EBX
                   +-> ELF with a PVH note, not Linux ---------------> 32-bit entry, EBX = start info
                   +-> ELF otherwise (vmlinux, bare 64/32 bit) ------> 64/32-bit entry, RSI = boot_params
                   `-> flat -----------------------------------------> real mode
"""

from __future__ import annotations

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.entry import BootOptions, EntryMode, LoadedImage
from pyvmm.arch.x86.boot.image import ImageFile, ImageKind, classify
from pyvmm.errors import ConfigError, ImageError
from pyvmm.memory.guest_memory import GuestMemory
from pyvmm.trace import trace_group

T = trace_group("arch/x86/boot")

PROTOCOLS = ("auto", "linux", "pvh", "multiboot", "flat")

__all__ = ["PROTOCOLS", "BootOptions", "EntryMode", "LoadedImage", "load_image"]


def load_image(memory: GuestMemory, path: str, options: BootOptions) -> LoadedImage:
    """Load the image at ``path`` and everything it is handed: tables, command line, initrd, GDT, page tables.

    ``memory`` needs RAM from 0 through 1 MiB. Returns the state to enter it with: general registers in
    ``regs``, special ones by :func:`pyvmm.arch.x86.entry_state.entry_sregs`.
    Raises ImageError (file, field, problem) or ConfigError (option, problem); memory may then be half written.
    """
    with ImageFile(path) as image:
        loaded = _load(memory, image, options)
        T.boot_image.on and T.boot_image(path, loaded.kind, image.size)
    from pyvmm.arch.x86.boot.mptable import write_mp_table

    write_mp_table(memory, options.cpus)
    if options.acpi:
        from pyvmm.arch.x86.boot.acpi import write_acpi

        write_acpi(memory, options.cpus, options.acpi_devices)
    if loaded.mode is not EntryMode.REAL:
        from pyvmm.arch.x86.boot.gdt import write_gdt

        write_gdt(memory, layout.BOOT_GDT, loaded.mode)
    if loaded.mode is EntryMode.LONG:
        from pyvmm.arch.x86.boot.page_tables import write_boot_page_tables

        write_boot_page_tables(memory)
    T.boot_entry.on and T.boot_entry(loaded.kind, loaded.mode.value, loaded.regs.rip)
    return loaded


def _load(memory: GuestMemory, image: ImageFile, options: BootOptions) -> LoadedImage:
    """Pick the loader by what the file is and what the user asked for; loaders are imported as needed."""
    protocol = options.protocol
    if protocol not in PROTOCOLS:
        raise ConfigError(f"boot protocol {protocol!r} is unknown; it is one of {', '.join(PROTOCOLS)}")
    if options.load_address is not None:
        if protocol not in ("auto", "flat"):
            raise ConfigError(f"a load address is for flat images, not for boot protocol {protocol!r}")
        protocol = "flat"
    kind = ImageKind.FLAT if protocol == "flat" else classify(image)
    if kind is ImageKind.MULTIBOOT and protocol not in ("auto", "multiboot"):
        kind = ImageKind.ELF  # it may be one as well; the ELF loader says so if not
    match kind:
        case ImageKind.FLAT if protocol in ("auto", "flat"):
            from pyvmm.arch.x86.boot.flat import load_flat

            return load_flat(memory, image, options)
        case ImageKind.BZIMAGE if protocol in ("auto", "linux"):
            from pyvmm.arch.x86.boot.linux import load_bzimage

            return load_bzimage(memory, image, options)
        case ImageKind.MULTIBOOT:
            from pyvmm.arch.x86.boot.multiboot import load_multiboot

            return load_multiboot(memory, image, options)
        case ImageKind.ELF if protocol != "multiboot":
            return _load_elf(memory, image, options, protocol)
    raise ImageError(image.path, "boot protocol", f"{protocol!r} does not fit: the file is of kind {kind.value!r}")


def _load_elf(memory: GuestMemory, image: ImageFile, options: BootOptions, protocol: str) -> LoadedImage:
    """An ELF file without Multiboot: Linux by its 64-bit entry even if it has a PVH note, which is the slower way."""
    from pyvmm.arch.x86.boot.elf import parse_elf
    from pyvmm.arch.x86.boot.linux import is_linux, load_elf
    from pyvmm.arch.x86.boot.pvh import load_pvh, pvh_entry

    elf = parse_elf(image.read, image.path)
    linux = is_linux(image, elf)
    if protocol == "pvh" or (protocol == "auto" and not linux):
        entry = pvh_entry(image, elf)
        if entry is not None:
            return load_pvh(memory, image, elf, entry, options, linux=linux)
        if protocol == "pvh":
            raise ImageError(image.path, "XEN_ELFNOTE_PHYS32_ENTRY", "is not there: the image has no PVH entry")
    return load_elf(memory, image, elf, options, "vmlinux" if linux or protocol == "linux" else "elf")
