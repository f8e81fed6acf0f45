"""PVH, Multiboot 1, flat and bare ELF images: what is loaded and what they are handed."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot import BootOptions, EntryMode, load_image
from pyvmm.errors import ConfigError, ImageError
from pyvmm.memory.guest_memory import GuestMemory

from . import images
from .images import Seg

Save = Callable[..., str]
TOP = 0x400000
MAP = [(0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xE0000, 0x20000, 2), (0x100000, 15 << 20, 1)]


def text_at(memory: GuestMemory, gpa: int) -> bytes:
    return memory.read(gpa, 4096).partition(b"\0")[0]


def test_pvh_start_info(memory: GuestMemory, save: Save) -> None:
    elf = images.elf([Seg(TOP, b"\xf4" * 64)], 0xFFFFFFFF, notes=[images.note_pvh(TOP + 4)])
    initrd = save(b"module", "initrd")
    loaded = load_image(memory, save(elf), BootOptions(command_line="a b", initrd=initrd))
    assert (loaded.kind, loaded.mode, loaded.regs.rip) == ("pvh", EntryMode.PROTECTED, TOP + 4)
    info = struct.unpack("<IIIIQQQQII", memory.read(loaded.regs.rbx, 56))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = info
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert rsdp == layout.ACPI_TABLES and text_at(memory, cmdline) == b"a b"
    table = [struct.unpack("<QQII", memory.read(memmap + 24 * i, 24)) for i in range(entries)]
    assert table == [(*entry, 0) for entry in MAP]
    gpa, size, module_cmdline, _ = struct.unpack("<QQQQ", memory.read(modlist, 32))
    assert (size, module_cmdline) == (6, 0) and memory.read(gpa, 6) == b"module"


def test_pvh_without_modules_and_acpi(memory: GuestMemory, save: Save) -> None:
    elf = images.elf([Seg(TOP, b"\xf4" * 64)], TOP, bits=32, notes=[images.note_pvh(TOP, 8)])
    loaded = load_image(memory, save(elf), BootOptions(acpi=False))
    info = struct.unpack("<IIIIQQQQII", memory.read(loaded.regs.rbx, 56))
    assert info[3:5] == (0, 0) and info[6] == 0


def test_linux_with_a_pvh_note_takes_the_64_bit_entry_unless_asked(memory: GuestMemory, save: Save) -> None:
    path = save(images.elf([Seg(TOP, b"\xf4" * 64)], TOP, notes=[images.NOTE_LINUX, images.note_pvh(TOP + 4)]))
    assert load_image(memory, path, BootOptions()).kind == "vmlinux"
    loaded = load_image(memory, path, BootOptions(protocol="pvh", linux_additions="x"))
    assert (loaded.kind, loaded.regs.rip) == ("pvh", TOP + 4)
    assert text_at(memory, layout.COMMAND_LINE) == b"x"


@pytest.mark.parametrize(
    ("note", "problem"), [(images.note_pvh(0x42), "0x42 is in none"), ((b"Xen", 18, b"xy"), "has 2 bytes")]
)
def test_pvh_note_that_is_wrong(
    memory: GuestMemory, save: Save, note: tuple[bytes, int, bytes], problem: str
) -> None:
    with pytest.raises(ImageError, match=f"XEN_ELFNOTE_PHYS32_ENTRY: .*{problem}"):
        load_image(memory, save(images.elf([Seg(TOP, b"\xf4")], TOP, notes=[note])), BootOptions())


@pytest.mark.parametrize(("bits", "mode"), [(64, EntryMode.LONG), (32, EntryMode.PROTECTED)])
def test_bare_elf(memory: GuestMemory, save: Save, bits: int, mode: EntryMode) -> None:
    loaded = load_image(memory, save(images.elf([Seg(TOP, b"\xf4")], TOP, bits=bits)), BootOptions())
    assert (loaded.kind, loaded.mode, loaded.regs.rip) == ("elf", mode, TOP)
    assert (loaded.regs.rsi, loaded.regs.rsp) == (layout.BOOT_INFO, layout.BOOT_STACK_TOP)


def multiboot_info(memory: GuestMemory, gpa: int) -> dict[str, int]:
    """Offsets from the specification's table in 3.3."""
    raw = memory.read(gpa, 116)
    names = {"flags": 0, "lower": 4, "upper": 8, "cmdline": 16, "mods": 20, "mods_addr": 24, "mmap_length": 44}
    names |= {"mmap": 48, "name": 64}
    return {name: int.from_bytes(raw[at : at + 4], "little") for name, at in names.items()}


@pytest.mark.parametrize("bits", [32, 64])
def test_multiboot_elf_as_kvm_unit_tests_has_it(memory: GuestMemory, save: Save, bits: int) -> None:
    # Linked at 4 MiB with header flags 0: loaded by its program headers.
    code = images.multiboot_header(0) + b"\xf4" * 52
    path = save(images.elf([Seg(TOP, code, 0x3000)], TOP + 12, bits=bits), "test.flat")
    initrd = save(b"NR_CPUS=1\n", "env")
    memory.write(TOP, b"\xee" * 0x3000)
    loaded = load_image(memory, path, BootOptions(command_line="arg1 arg2", initrd=initrd))
    assert (loaded.kind, loaded.mode, loaded.regs.rip) == ("multiboot", EntryMode.PROTECTED, TOP + 12)
    assert loaded.regs.rax == 0x2BADB002
    assert memory.read(TOP, 0x3000) == code.ljust(0x3000, b"\0")
    info = multiboot_info(memory, loaded.regs.rbx)
    assert info["flags"] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (info["lower"], info["upper"]) == (639, 15 << 10)
    assert text_at(memory, info["cmdline"]) == f"{path} arg1 arg2".encode()
    assert text_at(memory, info["name"]) == b"pyvmm"
    assert info["mods"] == 1
    start, end, string, _ = struct.unpack("<IIII", memory.read(info["mods_addr"], 16))
    assert start % 4096 == 0 and memory.read(start, end - start) == b"NR_CPUS=1\n"
    assert text_at(memory, string) == initrd.encode()
    entries, at = [], info["mmap"]
    while at < info["mmap"] + info["mmap_length"]:
        size, base, length, kind = struct.unpack("<IQQI", memory.read(at, 24))
        entries.append((base, length, kind))
        at += size + 4
    assert entries == MAP


def test_multiboot_without_module_counts_none(memory: GuestMemory, save: Save) -> None:
    loaded = load_image(memory, save(images.kludge()), BootOptions())
    assert multiboot_info(memory, loaded.regs.rbx)["mods"] == 0


@pytest.mark.parametrize(("bss", "load_end"), [(0, True), (0x1000, True), (0, False)])
def test_multiboot_load_addresses(memory: GuestMemory, save: Save, bss: int, load_end: bool) -> None:
    data = os.urandom(300)
    raw = bytearray(images.kludge(data, load=0x200000, bss=bss))
    if not load_end:
        struct.pack_into("<I", raw, 20, 0)
    memory.write(0x200000, b"\xee" * 0x2000)
    loaded = load_image(memory, save(b"\0\0\0\0" + bytes(raw)), BootOptions())
    assert loaded.regs.rip == 0x200020
    assert memory.read(0x200000, 0x1400) == (bytes(raw) + bytes(bss)).ljust(0x1400, b"\xee")


@pytest.mark.parametrize(
    ("addresses", "field"),
    [
        ((0x100000, 0x200000, 0, 0, 0x200000), "load_addr"),  # load above header
        ((0x200000, 0x100000, 0, 0, 0x200000), "load_addr"),  # would begin before the file
        ((0x100000, 0x100000, 0x100001, 0, 0x200000), "entry_addr"),
        ((0x100000, 0x100000, 0x180000, 0, 0x100000), "load_end_addr"),
        ((0x100000, 0x100000, 0x90000, 0, 0x100000), "load_end_addr"),
        ((0x100000, 0x100000, 0x100040, 0x100010, 0x100000), "bss_end_addr"),
        ((0x100000, 0x100000, 0x100040, 0xFFFFFFFF, 0x100000), "load_addr"),
        ((0x8000, 0x8000, 0x8040, 0, 0x8000), "load_addr"),  # over the boot tables
    ],
)
def test_multiboot_addresses_that_cannot_be(
    memory: GuestMemory, save: Save, addresses: tuple[int, ...], field: str
) -> None:
    raw = images.multiboot_header(1 << 16, addresses) + b"\xf4" * 64
    with pytest.raises(ImageError) as caught:
        load_image(memory, save(raw), BootOptions())
    assert caught.value.field == field


@pytest.mark.parametrize(("flags", "problem"), [(1 << 2, "video"), (1 << 5, "0x20"), (0, "not ELF")])
def test_multiboot_flags_that_cannot_be_met(memory: GuestMemory, save: Save, flags: int, problem: str) -> None:
    with pytest.raises(ImageError, match=f"Multiboot flags: .*{problem}"):
        load_image(memory, save(images.multiboot_header(flags) + bytes(100)), BootOptions())


def test_flat(memory: GuestMemory, save: Save) -> None:
    code = os.urandom(700)
    loaded = load_image(memory, save(code, "boot.bin"), BootOptions())
    assert (loaded.kind, loaded.mode, loaded.cs, loaded.regs.rip) == ("flat", EntryMode.REAL, 0, 0x7C00)
    assert (loaded.regs.rsp, loaded.regs.rdx) == (0x7C00, 0x80)
    assert memory.read(0x7C00, 700) == code
    loaded = load_image(memory, save(code), BootOptions(load_address=0x12340))
    assert (loaded.cs, loaded.regs.rip, loaded.regs.rsp) == (0x1234, 0, 0x7C00)
    assert memory.read(0x12340, 700) == code


def test_a_load_address_makes_any_file_flat(memory: GuestMemory, save: Save) -> None:
    elf = images.elf([Seg(TOP, b"\xf4")], TOP)
    loaded = load_image(memory, save(elf), BootOptions(load_address=0x1000))
    assert loaded.kind == "flat" and memory.read(0x1000, len(elf)) == elf


@pytest.mark.parametrize("address", [-1, 0, 0x4FF, 0x9FC00, 0x100000, 1 << 40, 0x10001])
def test_flat_addresses_that_cannot_be(memory: GuestMemory, save: Save, address: int) -> None:
    with pytest.raises(ConfigError, match="load address"):
        load_image(memory, save(b"\xf4"), BootOptions(load_address=address))


def test_flat_image_that_is_too_long(memory: GuestMemory, save: Save) -> None:
    with pytest.raises(ImageError, match=r"the flat image .* overlaps the EBDA"):
        load_image(memory, save(bytes(0x9FC00 - 0x7C00 + 1), "big.bin"), BootOptions())
    load_image(memory, save(bytes(0x9FC00 - 0x7C00), "fits.bin"), BootOptions())


@pytest.mark.parametrize("options", [BootOptions(command_line="x"), BootOptions(initrd="x")])
def test_flat_takes_no_command_line_or_initrd(memory: GuestMemory, save: Save, options: BootOptions) -> None:
    with pytest.raises(ConfigError, match="no way to be handed"):
        load_image(memory, save(b"\xf4", "x.bin"), options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (BootOptions(protocol="multiboot"), "does not fit"),
        (BootOptions(protocol="pvh"), "has no PVH entry"),
        (BootOptions(protocol="efi"), "is unknown"),
        (BootOptions(protocol="pvh", load_address=0x7C00), "is for flat images"),
    ],
)
def test_protocols_that_do_not_fit(memory: GuestMemory, save: Save, options: BootOptions, error: str) -> None:
    with pytest.raises((ImageError, ConfigError), match=error):
        load_image(memory, save(images.elf([Seg(TOP, b"\xf4")], TOP)), options)
