"""Mutated images of every kind: each loads or is refused in one line, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.boot import BootOptions, load_image
from pyvmm.arch.x86.entry_state import entry_sregs
from pyvmm.errors import PyvmmError
from pyvmm.memory.guest_memory import GuestMemory, Region
from tests.unit.arch.x86.test_entry_state import reset_sregs

from . import images
from .images import Seg

MIB = 1 << 20
TOP = 0x200000
VMLINUX = images.elf(
    [Seg(TOP, bytes(range(256)) * 8, 0x3000), Seg(TOP + 0x4000, b"data")], TOP, notes=[images.NOTE_LINUX]
)
CORPUS = {
    "vmlinux": VMLINUX,
    "elf32": images.elf([Seg(TOP, b"\xf4" * 64)], TOP, bits=32),
    "pvh": images.elf([Seg(TOP, b"\xf4" * 64)], TOP, notes=[images.note_pvh(TOP)]),
    "multiboot": images.elf([Seg(TOP, images.multiboot_header() + b"\xf4" * 64)], TOP + 12, bits=32),
    "kludge": images.kludge(),
    "flat": bytes(510) + b"\x55\xaa",
    **{f"bzimage-{c}": images.bzimage(images.compress(VMLINUX, c)) for c in images.COMPRESSIONS},
}
INTERESTING = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1]


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory([Region(0, 8 * MIB)])
    yield ram
    ram.close()


def check(memory: GuestMemory, path: Path, data: bytes, options: BootOptions) -> None:
    """Load ``data``: success that can be entered, or one line; at most 2 s of CPU and 64 MiB either way."""
    path.write_bytes(data)
    tracemalloc.start()
    begin = time.process_time()
    try:
        loaded = load_image(memory, str(path), options)
    except PyvmmError as error:
        assert str(error) and "\n" not in str(error)
    else:
        entry_sregs(loaded, reset_sregs())
        assert 0 <= loaded.regs.rip < 1 << 32
    finally:
        seconds = time.process_time() - begin
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < 2 and peak < 64 * MIB, (seconds, peak)


@st.composite
def mutation(draw: st.DrawFn) -> tuple[str, bytes]:
    """A corpus image with a few fields overwritten, a piece removed, or its end cut off."""
    name = draw(st.sampled_from(sorted(CORPUS)))
    data = bytearray(CORPUS[name])
    header = 0x290 if name.startswith("bzimage") else 320
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, min(header, len(data)) - 1) | st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["byte", "word", "cut", "remove"])):
            case "byte":
                data[where] = draw(st.integers(0, 255))
            case "word":
                form = draw(st.sampled_from(["<H", "<I", "<Q"]))
                where &= ~1
                value = draw(st.sampled_from(INTERESTING)) & (1 << 8 * struct.calcsize(form)) - 1
                if where + struct.calcsize(form) <= len(data):
                    struct.pack_into(form, data, where, value)
            case "cut" if len(data) > 1:
                del data[max(1, where) :]
            case "remove" if len(data) > 8:
                del data[where : where + 4]
    return name, bytes(data)


fuzz = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(mutation(), st.sampled_from(["auto", "linux", "pvh", "multiboot"]), st.booleans())
def test_mutated_images(
    memory: GuestMemory, tmp_path: Path, image: tuple[str, bytes], protocol: str, guest_decompress: bool
) -> None:
    options = BootOptions(protocol=protocol, guest_decompress=guest_decompress)
    check(memory, tmp_path / "image", image[1], options)


@fuzz
@given(st.binary(min_size=1, max_size=2048), st.sampled_from(["", "\x7fELF\2\1\1", "multiboot", "HdrS"]))
def test_random_bytes(memory: GuestMemory, tmp_path: Path, data: bytes, start: str) -> None:
    if start == "HdrS":
        data = data[:0x1F1].ljust(0x202, b"\0") + b"HdrS" + data[0x1F1:]
    elif start == "multiboot":
        data = images.multiboot_header(1 << 16) + data
    else:
        data = start.encode() + data
    check(memory, tmp_path / "image", data, BootOptions())


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_the_corpus_itself_loads(memory: GuestMemory, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(CORPUS[name])
    assert load_image(memory, str(path), BootOptions()).regs.rip


def test_many_segments_of_one_file_range_cannot_multiply_the_work(memory: GuestMemory, tmp_path: Path) -> None:
    """256 headers that all name the same 7 MiB: refused at the second, since they overlap in memory."""
    count, size = 256, 7 * MIB
    programs = struct.pack("<IIQQQQQQ", 1, 7, 0x10000, 0, TOP >> 1, size, size, 1) * count
    fields = (2, 62, 1, TOP, 64, 0, 0, 64, 56, count, 0, 0, 0)
    header = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", *fields)
    path = tmp_path / "image"
    path.write_bytes(header + programs)
    os.truncate(path, 0x10000 + size)
    with pytest.raises(PyvmmError, match=r"segment 1 .* overlaps segment 0"):
        load_image(memory, str(path), BootOptions())


def test_a_sparse_file_of_a_tebibyte_is_refused_at_once(memory: GuestMemory, tmp_path: Path) -> None:
    for name in ("flat", "vmlinux", "kludge"):
        path = tmp_path / f"{name}.bin"
        data = bytearray(CORPUS[name])
        if name == "kludge":
            struct.pack_into("<I", data, 20, 0)  # load_end_addr 0: the whole file
        path.write_bytes(data)
        os.truncate(path, 1 << 40)
        tracemalloc.start()
        try:
            options = BootOptions(initrd=str(path)) if name == "vmlinux" else BootOptions()
            with pytest.raises(PyvmmError):
                load_image(memory, str(path), options)
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()
