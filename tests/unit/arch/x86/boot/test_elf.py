"""ELF headers, segments and notes, against pyelftools and against hostile values."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot.elf import PT_LOAD, SegmentStream, load_segments, notes, parse_elf
from pyvmm.arch.x86.boot.entry import EntryMode
from pyvmm.arch.x86.boot.image import ImageFile
from pyvmm.arch.x86.boot.placement import Placement
from pyvmm.errors import ImageError
from pyvmm.memory.guest_memory import GuestMemory

from . import images
from .images import Seg

Save = Callable[..., str]
TOP = 0x100000


def load(memory: GuestMemory, path: str, mode: EntryMode = EntryMode.LONG) -> None:
    with ImageFile(path) as image:
        load_segments(image, parse_elf(image.read, path), Placement(memory, path, mode))


def reader(data: bytes) -> Callable[[int, int, str], bytes]:
    def read(offset: int, size: int, field: str) -> bytes:
        if offset + size > len(data):
            raise ImageError("image", field, "beyond the end")
        return data[offset : offset + size]

    return read


segments = st.lists(
    st.tuples(st.integers(0, 40), st.binary(max_size=300), st.integers(0, 500)), min_size=1, max_size=6
).map(lambda parts: [Seg(TOP + i * 0x1000 + gap, data, memsz) for i, (gap, data, memsz) in enumerate(parts)])


@settings(max_examples=40, deadline=None)
@given(segments=segments, bits=st.sampled_from([32, 64]))
def test_headers_agree_with_pyelftools(segments: list[Seg], bits: int) -> None:
    from elftools.elf.elffile import ELFFile

    data = images.elf(segments, TOP, bits=bits, notes=[images.NOTE_LINUX, images.note_pvh(TOP)])
    ours = parse_elf(reader(data), "image")
    theirs = ELFFile(io.BytesIO(data))
    assert (ours.bits, ours.entry) == (theirs.elfclass, theirs["e_entry"])
    loads = [(p.offset, p.vaddr, p.paddr, p.filesz, p.memsz) for p in ours.program_headers if p.type == PT_LOAD]
    assert loads == [
        tuple(s[f] for f in ("p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz"))
        for s in theirs.iter_segments("PT_LOAD")
    ]
    found = [(name, kind) for name, kind, _ in notes(reader(data), ours)]
    assert found == [(b"Linux", 0x100), (b"Xen", 18)]


@settings(max_examples=40, deadline=None)
@given(segments=segments, cut=st.integers(1, 200))
def test_streaming_and_file_loading_give_the_same_memory(segments: list[Seg], cut: int) -> None:
    from pyvmm.memory.guest_memory import Region

    data = images.elf(segments, TOP)
    memory = GuestMemory([Region(0, 2 << 20)])
    try:
        memory.write(TOP, b"\xee" * 0x8000)
        placement = Placement(memory, "image", EntryMode.LONG)
        elf = parse_elf(reader(data), "image")
        if not any(max(s.memsz, len(s.data)) for s in segments):
            with pytest.raises(ImageError, match="no PT_LOAD"):
                SegmentStream(elf, placement)
            return
        stream = SegmentStream(elf, placement)
        for at in range(0, len(data), cut):
            stream.feed(data[at : at + cut])
        stream.finish()
        expected = bytearray(b"\xee" * 0x8000)
        for seg in segments:
            size = max(seg.memsz, len(seg.data))
            expected[seg.gpa - TOP : seg.gpa - TOP + size] = seg.data.ljust(size, b"\0")
        assert memory.read(TOP, 0x8000) == expected
    finally:
        memory.close()


def test_bss_is_cleared_and_the_file_part_copied(memory: GuestMemory, save: Save) -> None:
    memory.write(TOP, b"\xee" * 0x3000)
    load(memory, save(images.elf([Seg(TOP, b"code", 0x2001)], TOP)))
    assert memory.read(TOP, 0x2003) == b"code" + bytes(0x2001 - 4) + b"\xee\xee"


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (4, "B", 3, "e_ident"),  # class
        (5, "B", 2, "e_ident"),  # big-endian
        (16, "<H", 3, "e_type"),
        (18, "<H", 40, "e_machine"),
        (54, "<H", 32, "e_phentsize"),
        (56, "<H", 0, "e_phnum"),
        (56, "<H", 0xFFFF, "e_phnum"),
        (56, "<H", 200, "program headers (e_phoff)"),
        (32, "<Q", (1 << 64) - 1, "program headers (e_phoff)"),
        (64, "<I", 3, "PT_INTERP"),
        (64, "<I", 0, "program headers"),
        (64 + 8, "<Q", 1 << 63, "segment 0 (p_offset, p_filesz)"),
        (64 + 24, "<Q", 1 << 40, "p_paddr of segment 0"),
        (64 + 24, "<Q", (1 << 64) - 2, "p_paddr of segment 0"),
        (64 + 32, "<Q", 1 << 62, "p_filesz of segment 0"),
        (64 + 40, "<Q", (1 << 64) - 1, "p_paddr of segment 0"),
    ],
)
def test_each_absurd_field_is_named(
    memory: GuestMemory, save: Save, offset: int, form: str, value: int, field: str
) -> None:
    data = bytearray(images.elf([Seg(TOP, b"\xf4" * 64)], TOP))
    struct.pack_into(form, data, offset, value)
    with pytest.raises(ImageError) as caught:
        load(memory, save(bytes(data)))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("gpa", "name"),
    [
        (0, "interrupt table"),
        (layout.BOOT_GDT + 8, "boot GDT"),
        (layout.BOOT_INFO, "boot parameters"),
        (layout.BOOT_TABLES_END - 1, "boot tables"),
        (layout.BOOT_PAGE_TABLES, "boot page tables"),
        (layout.COMMAND_LINE, "command line"),
        (layout.BOOT_STACK_TOP - 1, "boot stack"),
        (layout.EBDA, "EBDA"),
        (0xB8000, "VGA"),
        (layout.ACPI_TABLES, "ACPI tables"),
        (0x80000, ""),
    ],
)
def test_what_a_segment_overlaps_is_named(memory: GuestMemory, save: Save, gpa: int, name: str) -> None:
    path = save(images.elf([Seg(gpa, b"\xf4" * 64)], gpa))
    if not name:
        load(memory, path)
        return
    with pytest.raises(ImageError, match=name):
        load(memory, path)


def test_segments_must_not_overlap(memory: GuestMemory, save: Save) -> None:
    with pytest.raises(ImageError, match=r"segment 1 at 0x100020\.\.0x100060 overlaps segment 0"):
        load(memory, save(images.elf([Seg(TOP, bytes(64)), Seg(TOP + 32, bytes(64))], TOP)))


def test_too_little_memory_says_so(memory: GuestMemory, save: Save) -> None:
    with pytest.raises(ImageError, match=r"outside the guest's RAM \(16 MiB\); use a larger --memory"):
        load(memory, save(images.elf([Seg(TOP, b"x", 16 << 20)], TOP)))


def test_entry_physical_virtual_or_nowhere() -> None:
    seg = Seg(TOP, bytes(64), 0x1000, 0xFFFFFFFF80000000)
    for entry, expected in ((TOP + 5, TOP + 5), (0xFFFFFFFF80000010, TOP + 16)):
        assert parse_elf(reader(images.elf([seg], entry)), "image").entry_address() == expected
    with pytest.raises(ImageError, match="e_entry: 0x42 is in none"):
        parse_elf(reader(images.elf([seg], 0x42)), "image").entry_address()


def test_a_malformed_note_ends_the_notes() -> None:
    data = bytearray(images.elf([Seg(TOP, b"x")], TOP, notes=[images.NOTE_LINUX, images.note_pvh(TOP)]))
    at = data.index(b"Linux") - 12
    struct.pack_into("<I", data, at + 4, 0xFFFFFFF0)  # descsz
    elf = parse_elf(reader(bytes(data)), "image")
    assert list(notes(reader(bytes(data)), elf)) == []
