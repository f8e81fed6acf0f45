"""What a disk holds, by checksums of its pieces: so that only what differs is copied, and two disks can be compared.

A checksum is BLAKE2b of 32 bytes over PIECE bytes (the last piece may be shorter). Two pieces with the same one are
taken for the same: so a copy that was broken off goes on where it was, and a stale disk is the beginning of a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from pyvmm.block.image import Image
from pyvmm.native import lib

PIECE: int = lib.PV_FORWARD_DATA
SUM = 32


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each piece of a disk of ``size`` bytes."""
    for offset in range(0, size, PIECE):
        yield offset, min(PIECE, size - offset)


def count_of(size: int) -> int:
    """Pieces of such a disk."""
    return -(-size // PIECE)


def sum_of(data: bytes) -> bytes:
    """The checksum of a piece."""
    return hashlib.blake2b(data, digest_size=SUM).digest()


def sums(image: Image) -> Iterator[bytes]:
    """Of each piece of ``image`` as it is when it is read. OSError, HostError."""
    for offset, size in pieces(image.size):
        yield sum_of(image.read(offset, size))


def differences(first: Image, second: Image) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each run of pieces that are not the same; images of one size."""
    begin: int | None = None
    at = 0
    for (offset, size), mine, theirs in zip(pieces(first.size), sums(first), sums(second), strict=True):
        at = offset + size
        if mine != theirs:
            begin = offset if begin is None else begin
        elif begin is not None:
            yield begin, offset - begin
            begin = None
    if begin is not None:
        yield begin, at - begin
