"""Small valid images of every kind, made by code: the corpus that the boot tests read and mutate."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Sequence
from typing import NamedTuple

COMPRESSIONS = ("gzip", "bzip2", "lzma", "xz", "lz4", "zstd")


class Seg(NamedTuple):
    """A PT_LOAD: its bytes, where they go, how much memory it takes (at least the bytes)."""

    gpa: int
    data: bytes
    memsz: int = 0
    vaddr: int | None = None


def elf(
    segments: Sequence[Seg],
    entry: int,
    *,
    bits: int = 64,
    notes: Sequence[tuple[bytes, int, bytes]] = (),
    front: bytes = b"",
) -> bytes:
    """An executable: header, program headers, ``front`` (a Multiboot header), notes, segment data."""
    header_size, program_size = (64, 56) if bits == 64 else (52, 32)
    count = len(segments) + bool(notes)
    body = bytearray(front)
    base = header_size + count * program_size
    programs = b""

    def program(kind: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int) -> bytes:
        if bits == 64:
            return struct.pack("<IIQQQQQQ", kind, 7, offset, vaddr, paddr, filesz, memsz, 4)
        return struct.pack("<IIIIIIII", kind, offset, vaddr, paddr, filesz, memsz, 7, 4)

    if notes:
        blob = b""
        for label, kind, description in notes:
            name = label + b"\0"
            blob += struct.pack("<III", len(name), len(description), kind)
            blob += name + bytes(-len(name) % 4) + description + bytes(-len(description) % 4)
        programs += program(4, base + len(body), 0, 0, len(blob), len(blob))
        body += blob
    for seg in segments:
        vaddr = seg.gpa if seg.vaddr is None else seg.vaddr
        memsz = max(seg.memsz, len(seg.data))
        programs += program(1, base + len(body), vaddr, seg.gpa, len(seg.data), memsz)
        body += seg.data
    form, machine = ("<HHIQQQIHHHHHH", 62) if bits == 64 else ("<HHIIIIIHHHHHH", 3)
    ident = b"\x7fELF" + bytes((2 if bits == 64 else 1, 1, 1)) + bytes(9)
    fields = (2, machine, 1, entry, header_size, 0, 0, header_size, program_size, count, 0, 0, 0)
    return ident + struct.pack(form, *fields) + programs + bytes(body)


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    """LZ4's legacy frame, as ``lz4 -l`` writes it."""
    import lz4.block

    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), block):
        packed = lz4.block.compress(data[at : at + block], store_size=False)
        out += struct.pack("<I", len(packed)) + packed
    return out


def compress(data: bytes, compression: str) -> bytes:
    """``data`` as the kernel build packs it: compressed, with the size behind it (gzip has it already)."""
    size = struct.pack("<I", len(data))
    if compression == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if compression == "bzip2":
        return bz2.compress(data) + size
    if compression == "lzma":
        return lzma.compress(data, lzma.FORMAT_ALONE) + size
    if compression == "xz":
        filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
        return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters) + size
    if compression == "lz4":
        return lz4_legacy(data) + size
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_content_size=False, write_checksum=True).compress(data) + size


def bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    cmdline_size: int = 255,
    initrd_addr_max: int = 0x7FFFFFFF,
    init_size: int = 0x200000,
    pref_address: int = 0x200000,
    xloadflags: int = 1,
    relocatable: int = 1,
    payload_gap: int = 0x300,
    setup_sects: int = 1,
) -> bytes:
    """Boot sector and setup (one sector), then the protected-mode code with ``payload`` in it."""
    setup = bytearray((setup_sects + 1) * 512)
    for offset, form, value in (
        (0x1F1, "<B", setup_sects),
        (0x1FE, "<H", 0xAA55),
        (0x200, "<BB", (0xEB, 0x6A)),
        (0x202, "<4s", b"HdrS"),
        (0x206, "<H", version),
        (0x211, "<B", 1),
        (0x214, "<I", 0x100000),
        (0x22C, "<I", initrd_addr_max),
        (0x230, "<I", 0x200000),
        (0x234, "<B", relocatable),
        (0x236, "<H", xloadflags),
        (0x238, "<I", cmdline_size),
        (0x248, "<I", payload_gap),
        (0x24C, "<I", len(payload)),
        (0x258, "<Q", pref_address),
        (0x260, "<I", init_size),
    ):
        struct.pack_into(form, setup, offset, *(value if isinstance(value, tuple) else (value,)))
    return bytes(setup) + bytes(payload_gap) + payload + bytes(64)


def multiboot_header(flags: int = 0, addresses: Sequence[int] = ()) -> bytes:
    """Magic, flags, checksum, and the five address fields if given."""
    magic = 0x1BADB002
    return struct.pack(f"<III{len(addresses)}I", magic, flags, -(magic + flags) & 0xFFFFFFFF, *addresses)


def kludge(data: bytes = b"\xf4" * 64, *, load: int = 0x100000, bss: int = 0, entry_at: int = 32) -> bytes:
    """A raw file with a Multiboot header that gives load addresses; the entry is behind the header."""
    end = load + 32 + len(data)
    return multiboot_header(1 << 16, (load, load, end, end + bss if bss else 0, load + entry_at)) + data


NOTE_LINUX = (b"Linux", 0x100, b"salt\0")


def note_pvh(entry: int, size: int = 4) -> tuple[bytes, int, bytes]:
    """The Xen note with the 32-bit entry."""
    return (b"Xen", 18, entry.to_bytes(size, "little"))
