"""vmlinux and bzImage: what is in memory and in the zero page when the kernel starts."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot import BootOptions, EntryMode, load_image
from pyvmm.errors import ConfigError, ImageError
from pyvmm.memory.guest_memory import GuestMemory, Region

from . import images
from .images import Seg

Save = Callable[..., str]
TOP = 0x200000
CODE = bytes(range(256)) * 40
ELF = images.elf([Seg(TOP, CODE, 0x8000), Seg(TOP + 0x10000, b"data")], TOP + 0x40, notes=[images.NOTE_LINUX])


def zero_page(memory: GuestMemory) -> dict[str, int]:
    """The fields this test looks at, by boot.rst's offsets, written out again on purpose."""
    page = memory.read(layout.BOOT_INFO, 4096)
    fields = {
        "rsdp": (0x70, "Q"),
        "e820_entries": (0x1E8, "B"),
        "sentinel": (0x1EF, "B"),
        "boot_flag": (0x1FE, "H"),
        "header": (0x202, "I"),
        "version": (0x206, "H"),
        "type_of_loader": (0x210, "B"),
        "loadflags": (0x211, "B"),
        "code32_start": (0x214, "I"),
        "ramdisk_image": (0x218, "I"),
        "ramdisk_size": (0x21C, "I"),
        "cmd_line_ptr": (0x228, "I"),
    }
    return {name: struct.unpack_from("<" + form, page, offset)[0] for name, (offset, form) in fields.items()}


def text_at(memory: GuestMemory, gpa: int) -> bytes:
    return memory.read(gpa, 4096).partition(b"\0")[0]


def check_kernel(memory: GuestMemory) -> None:
    assert memory.read(TOP, 0x8000) == CODE.ljust(0x8000, b"\0")
    assert memory.read(TOP + 0x10000, 4) == b"data"


def test_vmlinux(memory: GuestMemory, save: Save) -> None:
    loaded = load_image(memory, save(ELF), BootOptions(command_line="console=ttyS0 panic=-1"))
    assert (loaded.kind, loaded.mode) == ("vmlinux", EntryMode.LONG)
    assert loaded.regs.rip == TOP + 0x40
    assert loaded.regs.rsi == layout.BOOT_INFO
    check_kernel(memory)
    page = zero_page(memory)
    assert page["sentinel"] == 0
    assert page["boot_flag"] == 0xAA55 and page["header"] == int.from_bytes(b"HdrS", "little")
    assert page["version"] >= 0x020C and page["type_of_loader"] == 0xFF and page["loadflags"] & 1
    assert page["rsdp"] == layout.ACPI_TABLES
    assert text_at(memory, page["cmd_line_ptr"]) == b"console=ttyS0 panic=-1"
    assert page["ramdisk_image"] == page["ramdisk_size"] == 0


def rng_seed(memory: GuestMemory) -> bytes:
    """The seed in the zero page's list of setup_data (boot.rst: u64 next, u32 type, u32 len), which has no other."""
    (at,) = struct.unpack("<Q", memory.read(layout.BOOT_INFO + 0x250, 8))
    following, kind, length = struct.unpack("<QII", memory.read(at, 16))
    assert (following, kind) == (0, 9)
    return memory.read(at + 16, length)


def test_linux_gets_a_fresh_random_seed_at_every_start(memory: GuestMemory, save: Save) -> None:
    path = save(ELF)
    seeds = []
    for _ in range(2):
        load_image(memory, path, BootOptions())
        seeds.append(rng_seed(memory))
    assert [len(s) for s in seeds] == [32, 32] and seeds[0] != seeds[1]


def test_images_without_linux_note_get_no_seed(memory: GuestMemory, save: Save) -> None:
    load_image(memory, save(images.elf([Seg(TOP, CODE)], TOP)), BootOptions())
    assert memory.read(layout.BOOT_INFO + 0x250, 8) == bytes(8)
    assert memory.read(layout.BOOT_TABLES, 64) == bytes(64)


def test_memory_map_in_the_zero_page(save: Save) -> None:
    memory = GuestMemory([Region(0, 64 << 20), Region(1 << 32, 32 << 20)])
    try:
        for acpi in (True, False):
            load_image(memory, save(ELF), BootOptions(acpi=acpi))
            page = memory.read(layout.BOOT_INFO, 4096)
            entries = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * i) for i in range(page[0x1E8])]
            tables = [(0x9FC00, 0x400, 2), (0xE0000, 0x20000, 2)] if acpi else []
            assert entries == [(0, 0x9FC00, 1), *tables, (0x100000, 63 << 20, 1), (1 << 32, 32 << 20, 1)]
    finally:
        memory.close()


@pytest.mark.parametrize("compression", images.COMPRESSIONS)
def test_bzimage_is_unpacked_on_the_host(memory: GuestMemory, save: Save, compression: str) -> None:
    memory.write(TOP, b"\xee" * 0x8000)
    image = images.bzimage(images.compress(ELF + os.urandom(100_000), compression))
    loaded = load_image(memory, save(image), BootOptions(command_line="quiet"))
    assert (loaded.kind, loaded.mode, loaded.regs.rip) == ("bzimage", EntryMode.LONG, TOP + 0x40)
    assert loaded.notes[0].startswith(f"{compression} payload ")
    check_kernel(memory)
    page = zero_page(memory)
    assert page["version"] == 0x020F and page["type_of_loader"] == 0xFF
    assert text_at(memory, page["cmd_line_ptr"]) == b"quiet"


def test_the_images_own_header_reaches_the_zero_page(memory: GuestMemory, save: Save) -> None:
    image = images.bzimage(images.compress(ELF, "gzip"), init_size=0x123000)
    load_image(memory, save(image), BootOptions())
    page = memory.read(layout.BOOT_INFO, 4096)
    assert page[0x1F1:0x210] == image[0x1F1:0x210]
    assert struct.unpack_from("<I", page, 0x260)[0] == 0x123000
    assert page[0x26C:0x2D0] == bytes(0x2D0 - 0x26C), "nothing behind the header's end"


def test_guest_decompress_enters_the_images_own_64_bit_entry(memory: GuestMemory, save: Save) -> None:
    image = images.bzimage(images.compress(ELF, "xz"), setup_sects=3)
    loaded = load_image(memory, save(image), BootOptions(guest_decompress=True))
    assert (loaded.mode, loaded.regs.rip) == (EntryMode.LONG, 0x200000 + 0x200)
    kernel = image[4 * 512 :]
    assert memory.read(0x200000, len(kernel)) == kernel
    assert zero_page(memory)["code32_start"] == 0x200000


def test_guest_decompress_without_64_bit_entry_uses_the_32_bit_one(memory: GuestMemory, save: Save) -> None:
    image = images.bzimage(images.compress(ELF, "xz"), xloadflags=0, relocatable=0)
    loaded = load_image(memory, save(image), BootOptions(guest_decompress=True))
    assert (loaded.mode, loaded.regs.rip) == (EntryMode.PROTECTED, 0x100000)
    assert (loaded.regs.rsi, loaded.regs.rbx, loaded.regs.rdi, loaded.regs.rbp) == (layout.BOOT_INFO, 0, 0, 0)


def test_a_32_bit_vmlinux_is_entered_in_protected_mode(memory: GuestMemory, save: Save) -> None:
    elf = images.elf([Seg(TOP, CODE)], TOP, bits=32, notes=[images.NOTE_LINUX])
    loaded = load_image(memory, save(images.bzimage(images.compress(elf, "gzip"))), BootOptions())
    assert (loaded.mode, loaded.regs.rip, loaded.regs.rsi) == (EntryMode.PROTECTED, TOP, layout.BOOT_INFO)


def test_initrd_is_at_the_end_of_memory(memory: GuestMemory, save: Save) -> None:
    initrd = os.urandom(5000)
    options = BootOptions(initrd=save(initrd, "initrd"))
    load_image(memory, save(ELF), options)
    page = zero_page(memory)
    assert (page["ramdisk_image"], page["ramdisk_size"]) == ((16 << 20) - 8192, 5000)
    assert memory.read(page["ramdisk_image"], 5000) == initrd


def test_initrd_respects_initrd_addr_max(memory: GuestMemory, save: Save) -> None:
    image = images.bzimage(images.compress(ELF, "gzip"), initrd_addr_max=0x7FFFFF)
    load_image(memory, save(image), BootOptions(initrd=save(bytes(4096), "initrd")))
    assert zero_page(memory)["ramdisk_image"] == 0x7FF000


def test_initrd_is_not_put_over_a_kernel_at_the_end(memory: GuestMemory, save: Save) -> None:
    elf = images.elf([Seg((16 << 20) - 0x2800, bytes(0x2800))], (16 << 20) - 0x2800)
    load_image(memory, save(elf), BootOptions(initrd=save(bytes(4097), "initrd")))
    assert zero_page(memory)["ramdisk_image"] == (16 << 20) - 0x5000


@pytest.mark.parametrize(("size", "where"), [(15 << 20, "initrd"), (17 << 20, "initrd")])
def test_initrd_that_does_not_fit(memory: GuestMemory, save: Save, size: int, where: str) -> None:
    path = save(b"", "initrd")
    os.truncate(path, size)
    with pytest.raises(ImageError, match=r"do not fit beside the kernel in 16 MiB.*--memory") as caught:
        load_image(memory, save(ELF), BootOptions(initrd=path))
    assert caught.value.path == path and caught.value.field == where


@pytest.mark.parametrize(("initrd", "problem"), [("missing", "no such file"), (".", "is a directory")])
def test_initrd_that_is_not_a_file(memory: GuestMemory, save: Save, initrd: str, problem: str) -> None:
    with pytest.raises(ImageError, match=f"initrd: {problem}"):
        load_image(memory, save(ELF), BootOptions(initrd=initrd))


def test_command_line_limits(memory: GuestMemory, save: Save) -> None:
    image = save(images.bzimage(images.compress(ELF, "gzip"), cmdline_size=255))
    load_image(memory, image, BootOptions(command_line="x" * 255))
    assert text_at(memory, layout.COMMAND_LINE) == b"x" * 255
    with pytest.raises(ConfigError, match="has 256 bytes, this image takes at most 255"):
        load_image(memory, image, BootOptions(command_line="x" * 256))
    with pytest.raises(ConfigError, match="has 256 bytes"):
        load_image(memory, image, BootOptions(command_line="é" * 128))
    with pytest.raises(ConfigError, match="byte 2 is NUL"):
        load_image(memory, image, BootOptions(command_line="a\0b"))
    with pytest.raises(ConfigError, match="character 1 has no UTF-8 form"):
        load_image(memory, image, BootOptions(command_line="\ud800"))
    vmlinux = save(ELF, "vmlinux")
    load_image(memory, vmlinux, BootOptions(command_line="y" * 2047))
    with pytest.raises(ConfigError, match="at most 2047"):
        load_image(memory, vmlinux, BootOptions(command_line="y" * 2048))


def test_bytes_that_are_not_utf8_pass_through(memory: GuestMemory, save: Save) -> None:
    text = os.fsdecode(b"name=\xff\xfe \xc3\xa9")
    load_image(memory, save(ELF), BootOptions(command_line=text))
    assert text_at(memory, layout.COMMAND_LINE) == b"name=\xff\xfe \xc3\xa9"


def test_additions_go_to_linux_only_and_before_the_users_words(memory: GuestMemory, save: Save) -> None:
    options = BootOptions(command_line="mine", linux_additions="noxsave")
    load_image(memory, save(ELF), options)
    assert text_at(memory, layout.COMMAND_LINE) == b"noxsave mine"
    load_image(memory, save(images.elf([Seg(TOP, b"\xf4")], TOP), "bare"), options)
    assert text_at(memory, layout.COMMAND_LINE) == b"mine"


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (0x1FE, "<H", 0, "boot_flag"),
        (0x201, "<B", 0x10, "setup header"),
        (0x206, "<H", 0x0205, "version"),
        (0x206, "<H", 0x0207, "payload_length"),
        (0x211, "<B", 0, "loadflags"),
        (0x1F1, "<B", 255, "payload_offset"),
        (0x248, "<I", 0xFFFFFFF0, "payload_offset"),
        (0x24C, "<I", 0, "payload_length"),
        (0x24C, "<I", 0xFFFFFFFF, "payload_length"),
        (0x248, "<I", 0, "payload"),
    ],
)
def test_each_header_field_is_checked(
    memory: GuestMemory, save: Save, offset: int, form: str, value: int, field: str
) -> None:
    image = bytearray(images.bzimage(images.compress(ELF, "gzip")))
    struct.pack_into(form, image, offset, value)
    with pytest.raises(ImageError) as caught:
        load_image(memory, save(bytes(image)), BootOptions())
    assert caught.value.field == field


@pytest.mark.parametrize("changes", [{"init_size": 0xFFFFFFFF}, {"pref_address": 1 << 40}, {"pref_address": 0x1000}])
def test_guest_decompress_needs_its_room(memory: GuestMemory, save: Save, changes: dict[str, Any]) -> None:
    image = images.bzimage(images.compress(ELF, "gzip"), **changes)
    with pytest.raises(ImageError, match="pref_address"):
        load_image(memory, save(image), BootOptions(guest_decompress=True))


def test_a_payload_larger_than_the_guest_is_refused_before_unpacking(memory: GuestMemory, save: Save) -> None:
    payload = images.compress(ELF, "xz")[:-4] + struct.pack("<I", 17 << 20)
    with pytest.raises(ImageError, match="payload: unpacks to 17825792 bytes, the guest has 16777216"):
        load_image(memory, save(images.bzimage(payload)), BootOptions())


def test_a_payload_that_unpacks_past_its_size_is_refused(memory: GuestMemory, save: Save) -> None:
    payload = images.compress(ELF + bytes(1 << 20), "xz")[:-4] + struct.pack("<I", len(ELF))
    with pytest.raises(ImageError, match="unpacks to more than"):
        load_image(memory, save(images.bzimage(payload)), BootOptions())


@pytest.mark.parametrize("content", [b"not an ELF file at all, but long enough", ELF[:100]])
def test_a_payload_that_is_no_kernel(memory: GuestMemory, save: Save, content: bytes) -> None:
    with pytest.raises(ImageError):
        load_image(memory, save(images.bzimage(images.compress(content, "zstd"))), BootOptions())


def test_truncated_at_every_length(memory: GuestMemory, save: Save) -> None:
    image = images.bzimage(images.compress(ELF, "gzip"))[:-64]
    for length in [*range(1, 0x300, 37), *range(0x300, len(image), 97), len(image) - 1]:
        with pytest.raises(ImageError):
            load_image(memory, save(image[:length]), BootOptions())


def test_memory_without_the_first_mebibyte(save: Save) -> None:
    memory = GuestMemory([Region(0, 64 << 10)])
    try:
        with pytest.raises(ConfigError, match="at least --memory 2M"):
            load_image(memory, save(ELF), BootOptions())
    finally:
        memory.close()
