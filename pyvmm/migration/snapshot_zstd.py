"""RAM of a snapshot, compressed with zstd: it takes less room, and is read whole when it is loaded instead of mapped.

A region is a sequence of records, ascending, each a frame of its own with a checksum::

    u64 first page | u32 pages (1..256) | u32 bytes that follow | zstd frame of exactly that many pages

A frame that claims another size, or needs a window larger than its content, is refused before anything is allocated.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from pyvmm.errors import ConfigError, ImageError
from pyvmm.memory.guest_memory import PAGE_SIZE, Region, Runs

CHUNK = 256
"""Pages in a record."""
_RECORD = struct.Struct("<QII")
_FRAME_MAX = CHUNK * PAGE_SIZE + (64 << 10)
_WINDOW_MAX = CHUNK * PAGE_SIZE
LEVEL = 1
"""The guest stands still meanwhile."""


def zstd_library() -> Any:
    """The module ``zstandard``. ConfigError if it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError("zstd needs the Python package zstandard: pip install zstandard") from None
    return zstandard


def write_compressed(region: Region, fd: int, offset: int, runs: Runs) -> int:
    """Write the pages of ``runs`` to ``fd`` from ``offset`` on; the bytes that it took. OSError."""
    compressor = zstd_library().ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
    at = offset
    for first, count in runs:
        for start in range(first, first + count, CHUNK):
            pages = min(CHUNK, first + count - start)
            frame = compressor.compress(region.pages(start, pages))
            record = memoryview(_RECORD.pack(start, pages, len(frame)) + frame)
            while record:
                done = os.pwrite(fd, record, at)
                record, at = record[done:], at + done
    return at - offset


def read_compressed(path: str, fd: int, offset: int, length: int, region: Region) -> None:
    """Fill ``region``, which is zeros, from ``length`` bytes at ``offset``. ImageError names what is wrong."""
    zstandard = zstd_library()
    decompressor = zstandard.ZstdDecompressor()
    at, end, next_page = offset, offset + length, 0
    while at < end:
        raw = os.pread(fd, min(_RECORD.size, end - at), at)
        if len(raw) != _RECORD.size:
            raise ImageError(path, "ram", "a record is truncated")
        first, pages, size = _RECORD.unpack(raw)
        at += _RECORD.size
        if not 1 <= pages <= CHUNK or first < next_page or first + pages > region.size // PAGE_SIZE:
            raise ImageError(path, "ram", f"a record of pages {first}+{pages} cannot be here")
        if size > _FRAME_MAX or size > end - at:
            raise ImageError(path, "ram", f"a record of {size} bytes cannot be here")
        frame = os.pread(fd, size, at)
        try:
            parameters = zstandard.get_frame_parameters(frame)
            if parameters.content_size != pages * PAGE_SIZE or parameters.window_size > _WINDOW_MAX:
                raise ImageError(path, "ram", f"a frame that is not of {pages} pages")
            data = decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ImageError(path, "ram", f"zstd: {error}") from None
        if len(data) != pages * PAGE_SIZE:
            raise ImageError(path, "ram", f"a frame that is not of {pages} pages")
        region.fill_pages(first, data)
        at, next_page = at + size, first + pages
