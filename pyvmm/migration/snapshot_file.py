"""A snapshot's file: everything about a machine that stands still, in one file that can be mapped.

::

    0          +--------------------------------------------------------------+
               | PYVMSNAP | u32 format | u32 bytes of header | u32 its CRC32  |
               +--------------------------------------------------------------+
    20         | header: msgpack of SnapshotHeader                            |
               +--------------------------------------------------------------+
    behind it  | state: sections.py's stream, with its own CRCs               |
               +--------------------------------------------------------------+
    4096 * n   | RAM, region by region, page by page; zero pages are holes    |
               +--------------------------------------------------------------+

A differential snapshot (snapshot_chain.py) has holes also where nothing differs from its base; a compressed one
(snapshot_zstd.py) has records instead of pages, and is read whole. Otherwise RAM is mapped, not read: a guest of any
size starts at once and gets its pages as it uses them. So its CRC is checked only when somebody asks for it (``pyvmm
snapshot info --verify``); the rest always is, and so is the file's length. A file appears under its name whole or not
at all, and is never changed afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pyvmm.devices.state import decode_fields
from pyvmm.errors import ImageError, SectionError
from pyvmm.kvm.state import U32, U64
from pyvmm.memory.guest_memory import PAGE_SIZE

MAGIC = b"PYVMSNAP"
FORMAT = 2
HEADER_MAX = 1 << 20
STATE_MAX = 64 << 20
_HEAD = struct.Struct("<8sIII")
_Text = Annotated[str, Meta(max_length=4096)]


class RamPart(msgspec.Struct, frozen=True, kw_only=True):
    """One region: ``size`` bytes of the file from ``offset`` hold what is at ``gpa``."""

    gpa: U64
    size: U64
    offset: U64
    length: U64
    """Bytes in the file: ``size``, unless compressed."""
    pages: U64
    """Pages that are not zero, of those in ``runs``."""
    crc: U32
    """CRC32C over these (native/ram_file.h)."""
    runs: Annotated[tuple[tuple[U64, U64], ...], Meta(max_length=4096)] | None
    """Which pages are here, (first, count), ascending; the others are the base's. None: all."""


class BaseStamp(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshot that a differential one builds on."""

    name: Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00]+\Z")]
    """Its path, relative to the folder of the differential one."""
    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """SHA-256 of its header."""


class DiskStamp(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the guest may write to, as it was: a snapshot does not hold disks."""

    path: _Text
    size: U64
    modified_ns: U64


class SnapshotHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the file."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    created: U64
    """Seconds since 1970."""
    description: _Text
    pyvmm: _Text
    config: dict[str, Any]
    """MachineConfig; paths are absolute."""
    compression: Literal["none", "zstd"]
    base: BaseStamp | None
    state_size: Annotated[int, Meta(ge=0, le=STATE_MAX)]
    ram: Annotated[tuple[RamPart, ...], Meta(min_length=1, max_length=16)]
    disks: Annotated[tuple[DiskStamp, ...], Meta(max_length=64)]
    was_running: bool
    """Whether the guest ran when the snapshot was asked for."""


def pack_head(header: SnapshotHeader) -> bytes:
    """The file up to its state."""
    raw = msgspec.msgpack.encode(header)
    return _HEAD.pack(MAGIC, FORMAT, len(raw), zlib.crc32(raw)) + raw


def ram_start(head_max: int, state_size: int) -> int:
    """Where RAM may start behind a head of at most ``head_max`` bytes and the state."""
    return -(-(head_max + state_size) // PAGE_SIZE) * PAGE_SIZE


class SnapshotFile:
    """An open snapshot, its header checked. A context manager. ImageError names what is wrong with the file."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            raise ImageError(path, "snapshot", error.strerror or str(error)) from None
        try:
            self.header, self._state_offset, self.digest = self._read_header()
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self.fd)

    def state(self) -> bytes:
        """The stream of sections."""
        return self._pread(self._state_offset, self.header.state_size, "state")

    def _read_header(self) -> tuple[SnapshotHeader, int, str]:
        magic, form, size, crc = _HEAD.unpack(self._pread(0, _HEAD.size, "header"))
        if magic != MAGIC:
            raise ImageError(self.path, "header", "is no snapshot of pyvmm")
        if form != FORMAT:
            raise ImageError(self.path, "format", f"{form} is not this pyvmm's {FORMAT}")
        if size > HEADER_MAX:
            raise ImageError(self.path, "header", f"{size} bytes are too many")
        raw = self._pread(_HEAD.size, size, "header")
        if zlib.crc32(raw) != crc:
            raise ImageError(self.path, "header", "its CRC does not fit: the file is damaged")
        try:
            header = decode_fields("header", SnapshotHeader, msgspec.msgpack.decode(raw))
        except (msgspec.DecodeError, RecursionError, TypeError, ValueError, SectionError) as error:
            raise ImageError(self.path, "header", str(error)) from None
        self._check_layout(header, _HEAD.size + size)
        return header, _HEAD.size + size, hashlib.sha256(raw).hexdigest()

    def _check_layout(self, header: SnapshotHeader, state_offset: int) -> None:
        end = state_offset + header.state_size
        for part in header.ram:
            whole = part.length == part.size or header.compression != "none"
            if part.offset % PAGE_SIZE or part.size % PAGE_SIZE or not part.size or part.offset < end or not whole:
                raise ImageError(self.path, "ram", f"the region at {part.gpa:#x} is not where one can be")
            end = part.offset + part.length
            if (part.runs is None) != (header.base is None) or not _ascending(part):
                raise ImageError(self.path, "ram", f"the runs of pages of the region at {part.gpa:#x} make no sense")
        found = os.fstat(self.fd).st_size
        if found != end:
            raise ImageError(self.path, "length", f"{found} bytes, {end} are needed: truncated, or something is behind")

    def _pread(self, at: int, size: int, field: str) -> bytes:
        try:
            data = os.pread(self.fd, size, at)
        except OSError as error:
            raise ImageError(self.path, field, error.strerror or str(error)) from None
        if len(data) != size:
            raise ImageError(self.path, field, "truncated")
        return data


def _ascending(part: RamPart) -> bool:
    """Whether the runs are apart, in order, and in the region."""
    end = 0
    for first, count in part.runs or ():
        if first < end or not count:
            return False
        end = first + count
    return end <= part.size // PAGE_SIZE


@contextlib.contextmanager
def new_file(path: str) -> Iterator[int]:
    """A descriptor of a file that takes ``path``'s place once the block is left without an error, and is on disk then.

    OSError; whatever happens, ``path`` is what it was or the whole new file.
    """
    folder = os.path.dirname(os.path.abspath(path))
    partial = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.partial")
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)
