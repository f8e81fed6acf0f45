"""Unpacking a bzImage's payload on the host, as a stream: memory use depends on neither size nor contents.

Formats are those of CONFIG_KERNEL_{GZIP,BZIP2,LZMA,XZ,LZ4,ZSTD} (scripts/Makefile.lib). Behind the
compressed data the kernel build appends the unpacked size in 4 bytes, little-endian (gzip's own trailer
ends with it): it bounds the output before the first byte is unpacked and must be met exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from pyvmm.errors import ImageError

SIZE_TRAILER = 4
TRAILER_INSIDE = frozenset({"gzip"})
"""Formats whose own last bytes are the size trailer; behind all others it is appended."""

_OUTPUT = 1 << 20
_LZ4_BLOCK_MAX = 8 << 20  # LZ4 frame format, "Legacy frame": every block but the last unpacks to 8 MiB
_LZMA_MEMORY_MAX = 192 << 20  # the kernel's build uses a 128 MiB dictionary (scripts/xz_wrap.sh)
_ZSTD_WINDOW_MAX = 128 << 20  # zstd -22 --ultra, as the kernel's build calls it

_CUT_OFF = "it is cut off"
_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (_LZ4_MAGIC, "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


class Source:
    """The packed bytes, in order: ``read(n)`` gives up to ``n``, ``b""`` at the end."""

    def __init__(self, chunks: Iterator[memoryview]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes (all of a chunk if negative)."""
        if not self._rest:
            # Chunks share one buffer, so what is handed out is copied before the next one is asked for.
            self._rest = next(self._chunks, memoryview(b""))
        piece = self._rest if size < 0 else self._rest[:size]
        self._rest = self._rest[len(piece) :]
        return bytes(piece)

    def read_exactly(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end."""
        pieces = []
        while size and (piece := self.read(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)


class _Decompressor(Protocol):
    """What lzma's and bz2's decompressor objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def compression_of(head: bytes) -> str | None:
    """Name of the payload's format from its first bytes, ``None`` if it is none of the six."""
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def unpack(path: str, compression: str, source: Source, size: int) -> Iterator[bytes]:
    """The ``size`` unpacked bytes in pieces of at most 8 MiB; ImageError if the data is damaged, short or longer.

    ``source`` gives the compressed data without the size trailer (of gzip, the trailer is a part).
    """
    left = size
    pieces = _FORMATS[compression](source)
    while True:
        try:
            piece = next(pieces, None)
        except _errors_of(compression) as error:
            raise ImageError(path, "payload", f"{compression} data is damaged: {error}") from None
        if piece is None:
            break
        if len(piece) > left:
            raise ImageError(path, "payload", f"{compression} data unpacks to more than the {size} bytes it announces")
        left -= len(piece)
        yield piece
    if left:
        raise ImageError(
            path, "payload", f"{compression} data ends after {size - left} of the {size} bytes it announces"
        )


def _errors_of(compression: str) -> tuple[type[Exception], ...]:
    """What the format's library raises on bad data."""
    if compression == "gzip":
        import zlib

        return (zlib.error, EOFError)
    if compression in ("xz", "lzma"):
        import lzma

        return (lzma.LZMAError, EOFError)
    if compression == "lz4":
        import lz4.block

        return (lz4.block.LZ4BlockError, ValueError, RuntimeError)
    if compression == "zstd":
        import zstandard

        return (zstandard.ZstdError, ValueError)
    return (OSError, EOFError, ValueError)  # bz2 has no error of its own


def _gzip(source: Source) -> Iterator[bytes]:
    import zlib

    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # gzip header and trailer, CRC checked
    while not decompressor.eof:
        if not (data := source.read(1 << 16)):
            raise EOFError(_CUT_OFF)
        # What zlib has not taken comes back as a copy: small inputs keep that from becoming quadratic.
        while data and not decompressor.eof:
            yield decompressor.decompress(data, _OUTPUT)
            data = decompressor.unconsumed_tail


def _pull(decompressor: _Decompressor, source: Source) -> Iterator[bytes]:
    while not decompressor.eof:
        data = source.read(1 << 16) if decompressor.needs_input else b""
        if not data and decompressor.needs_input:
            raise EOFError(_CUT_OFF)
        yield decompressor.decompress(data, _OUTPUT)


def _bzip2(source: Source) -> Iterator[bytes]:
    import bz2

    return _pull(bz2.BZ2Decompressor(), source)


def _xz(source: Source) -> Iterator[bytes]:
    import lzma

    return _pull(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_MAX), source)


def _lzma(source: Source) -> Iterator[bytes]:
    import lzma

    return _pull(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_MAX), source)


def _lz4(source: Source) -> Iterator[bytes]:
    """Legacy frame: magic, then blocks of (packed size, data), no end mark; frames may follow each other."""
    import lz4.block

    source.read_exactly(4)
    while head := source.read_exactly(4):
        packed = int.from_bytes(head, "little")
        if head == _LZ4_MAGIC:
            continue
        if packed > _LZ4_BLOCK_MAX + _LZ4_BLOCK_MAX // 255 + 16:  # LZ4_COMPRESSBOUND
            raise ValueError(f"a block of {packed} bytes")
        data = source.read_exactly(packed)
        if len(head) < 4 or len(data) < packed or not data:
            raise ValueError(f"a block of {packed} bytes is cut off after {len(data)}")
        yield lz4.block.decompress(data, uncompressed_size=_LZ4_BLOCK_MAX)


def _zstd(source: Source) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    # The reader asks the source for more only while its frame goes on.
    with decompressor.stream_reader(source, read_size=1 << 18, read_across_frames=False) as reader:  # type: ignore[arg-type]
        while piece := reader.read(_OUTPUT):
            yield piece


_FORMATS: dict[str, Callable[[Source], Iterator[bytes]]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "lzma": _lzma,
    "lz4": _lz4,
    "zstd": _zstd,
}
