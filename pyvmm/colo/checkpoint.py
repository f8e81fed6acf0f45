"""A checkpoint as it crosses the wire behind vmstate-size.

::

    head       magic "PVMC" | u32 version | u64 term | u64 epoch | u64 bytes of RAM | u64 bytes of state | u32 flags
    RAM        batches: u32 region | u32 flags | u64 bytes | batch (native/ram_stream.h)
    state      sections.py
    checksum   u32 CRC-32C of all before it

Big-endian but for the batches and the state, which are as elsewhere. Term and epoch make a checkpoint that is replayed,
or comes out of order, or belongs to another pair's life, one that is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyvmm.errors import ChannelError
from pyvmm.native import ffi, lib

HEAD = struct.Struct(">4sIQQQQI")
BATCH = struct.Struct(">IIQ")
CHECKSUM = struct.Struct(">I")
MAGIC = b"PVMC"
VERSION = 1
FLAG_RUNNING = 1
"""The guest ran at the primary, and goes on."""
STATE_MAX = 16 << 20


class Batch(NamedTuple):
    """Pages of one region, as native/ram_stream.h packs them; ``flags``: delta.py."""

    region: int
    flags: int
    data: memoryview


class Checkpoint(NamedTuple):
    """A whole one, as it was received; ``batches`` and ``state`` are looked into by others."""

    term: int
    epoch: int
    running: bool
    batches: tuple[Batch, ...]
    state: memoryview


def head_of(term: int, epoch: int, ram: int, state: int, *, running: bool) -> bytes:
    """The first bytes; ``ram`` and ``state`` are sizes in bytes, RAM's with its batches' heads."""
    return HEAD.pack(MAGIC, VERSION, term, epoch, ram, state, FLAG_RUNNING if running else 0)


def size_of(ram: int, state: int) -> int:
    """Bytes of a checkpoint of so much RAM and state."""
    return HEAD.size + ram + state + CHECKSUM.size


def with_checksum(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """``pieces``, one after the other, and then the checksum over them."""
    crc = 0
    for piece in pieces:
        crc = _checksum(crc, piece)
        yield piece
    yield CHECKSUM.pack(crc)


def _checksum(crc: int, piece: bytes | memoryview) -> int:
    return int(lib.pv_crc32c(crc, ffi.from_buffer(piece), len(piece))) if len(piece) else crc


def decode_checkpoint(payload: memoryview, *, term: int, epoch: int) -> Checkpoint:
    """Check ``payload`` (hostile) as far as this format goes. ChannelError: damaged, or not the one that is due."""
    if len(payload) < HEAD.size + CHECKSUM.size:
        raise ChannelError(f"a checkpoint of {len(payload)} bytes")
    covered = payload[: -CHECKSUM.size]
    if _checksum(0, covered) != CHECKSUM.unpack(payload[-CHECKSUM.size :])[0]:
        raise ChannelError("a checkpoint was damaged on the way")
    magic, version, its_term, its_epoch, ram, state, flags = HEAD.unpack_from(payload)
    if magic != MAGIC or version != VERSION or flags & ~FLAG_RUNNING:
        raise ChannelError(f"a checkpoint of version {version} with flags {flags:#x}; this side knows {VERSION}")
    if (its_term, its_epoch) != (term, epoch):
        raise ChannelError(f"checkpoint {its_epoch} of term {its_term} came where {epoch} of {term} was due")
    if state > STATE_MAX or HEAD.size + ram + state != len(covered):
        raise ChannelError(f"a checkpoint of {len(payload)} bytes says {ram} of RAM and {state} of state")
    batches, at, end = [], HEAD.size, HEAD.size + ram
    while at < end:
        if end - at < BATCH.size:
            raise ChannelError("a batch of pages without its head")
        region, kind, size = BATCH.unpack_from(payload, at)
        at += BATCH.size
        if size > end - at:
            raise ChannelError(f"a batch of {size} bytes where {end - at} are left")
        batches.append(Batch(region, kind, payload[at : at + size]))
        at += size
    return Checkpoint(its_term, its_epoch, bool(flags & FLAG_RUNNING), tuple(batches), covered[end:])
