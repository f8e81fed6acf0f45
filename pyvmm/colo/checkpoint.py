"""A checkpoint as it crosses the wire: its state behind vmstate-send, then its pages behind vmstate-size.

::

    state      head       magic "PVMC" | u32 version | u64 term | u64 epoch | u64 bytes of sections | u32 flags
               sections   migration/sections.py
               checksum   u32 CRC-32C of all before it
    pages      batches    u32 region | u32 flags | u64 bytes | batch (native/ram_stream.h)
               checksum   u32 CRC-32C of all before it, the state part's bytes included

Big-endian but for the batches and the sections, which are as elsewhere. Term and epoch make a checkpoint that is
replayed, or comes out of order, or belongs to another pair's life, one that is refused. The state comes first: the
secondary checks it while the primary still makes its pages smaller.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyvmm.errors import ChannelError
from pyvmm.native import ffi, lib

HEAD = struct.Struct(">4sIQQQI")
BATCH = struct.Struct(">IIQ")
CHECKSUM = struct.Struct(">I")
MAGIC = b"PVMC"
VERSION = 2
FLAG_RUNNING = 1
"""The guest ran at the primary, and goes on."""
STATE_MAX = 16 << 20
"""Bytes of sections."""


class Batch(NamedTuple):
    """Pages of one region, as native/ram_stream.h packs them; ``flags``: delta.py."""

    region: int
    flags: int
    data: memoryview


class SavedState(NamedTuple):
    """The first part, as it was received; ``sections`` are looked into by others."""

    epoch: int
    running: bool
    sections: memoryview
    crc: int
    """Of all of it; the pages' checksum goes on from there."""


def head_of(term: int, epoch: int, sections: int, *, running: bool) -> bytes:
    """The first bytes; ``sections`` is their size."""
    return HEAD.pack(MAGIC, VERSION, term, epoch, sections, FLAG_RUNNING if running else 0)


def state_size(sections: int) -> int:
    """Bytes of the state part with so many bytes of sections."""
    return HEAD.size + sections + CHECKSUM.size


def pages_size(batches: int) -> int:
    """Bytes of the pages part with so many bytes of batches, their heads included."""
    return batches + CHECKSUM.size


class Summed:
    """The checksum over a checkpoint's parts, one after the other."""

    def __init__(self) -> None:
        self.crc = 0

    def part(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """``pieces``, one after the other, and then the checksum."""
        for piece in pieces:
            self._add(piece)
            yield piece
        end = CHECKSUM.pack(self.crc)
        self._add(end)
        yield end

    def _add(self, piece: bytes | memoryview) -> None:
        self.crc = _checksum(self.crc, piece)


def _checksum(crc: int, piece: bytes | memoryview) -> int:
    return int(lib.pv_crc32c(crc, ffi.from_buffer(piece), len(piece))) if len(piece) else crc


def _covered(part: memoryview, crc: int, least: int) -> memoryview:
    """What the checksum at the end of ``part`` covers, if it is right. ChannelError."""
    if len(part) < least + CHECKSUM.size:
        raise ChannelError(f"a part of a checkpoint of {len(part)} bytes")
    covered = part[: -CHECKSUM.size]
    if _checksum(crc, covered) != CHECKSUM.unpack(part[-CHECKSUM.size :])[0]:
        raise ChannelError("a checkpoint was damaged on the way")
    return covered


def decode_state(part: memoryview, *, term: int, epoch: int) -> SavedState:
    """Check the state part (hostile) as far as this format goes. ChannelError: damaged, or not the one that is due."""
    covered = _covered(part, 0, HEAD.size)
    magic, version, its_term, its_epoch, size, flags = HEAD.unpack_from(part)
    if magic != MAGIC or version != VERSION or flags & ~FLAG_RUNNING:
        raise ChannelError(f"a checkpoint of version {version} with flags {flags:#x}; this side knows {VERSION}")
    if (its_term, its_epoch) != (term, epoch):
        raise ChannelError(f"checkpoint {its_epoch} of term {its_term} came where {epoch} of {term} was due")
    if size > STATE_MAX or HEAD.size + size != len(covered):
        raise ChannelError(f"the state part of a checkpoint has {len(part)} bytes and says {size} of sections")
    return SavedState(its_epoch, bool(flags & FLAG_RUNNING), covered[HEAD.size :], _checksum(0, part))


def decode_pages(part: memoryview, state: SavedState) -> tuple[Batch, ...]:
    """Check the pages part (hostile) that belongs to ``state``. ChannelError: damaged, or of another checkpoint."""
    covered = _covered(part, state.crc, 0)
    batches, at = [], 0
    while at < len(covered):
        if len(covered) - at < BATCH.size:
            raise ChannelError("a batch of pages without its head")
        region, kind, size = BATCH.unpack_from(covered, at)
        at += BATCH.size
        if size > len(covered) - at:
            raise ChannelError(f"a batch of {size} bytes where {len(covered) - at} are left")
        batches.append(Batch(region, kind, covered[at : at + size]))
        at += size
    return tuple(batches)
