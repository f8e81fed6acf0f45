"""x-query-disk-sums, pyvmm's own: what ``pyvmm colo compare`` compares."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import QmpError

AT_ONCE = 16
"""Pieces in one answer: 16 MiB are read for it, by the monitor's thread if it is asked for out-of-band."""


class DiskSumsArguments(QmpStruct):
    """``count`` pieces from number ``first`` on of disk number ``disk`` of those that the guest can write."""

    disk: Annotated[int, Meta(ge=0)]
    first: Annotated[int, Meta(ge=0)] = 0
    count: Annotated[int, Meta(ge=0, le=AT_ONCE)] = AT_ONCE


class DiskSums(QmpStruct):
    """``disks`` there are; this one has ``size`` bytes, in pieces of ``piece``. A secondary's: as of its checkpoint."""

    disks: int
    size: int
    piece: int
    sums: list[str]


@command("x-query-disk-sums", allow_oob=True)
def x_query_disk_sums(context: CommandContext, arguments: DiskSumsArguments) -> DiskSums:
    """Checksums (BLAKE2b, 32 bytes) of pieces of a disk as it is now."""
    from pyvmm.block import disk_sums
    from pyvmm.block.replica_disk import ReplicaOverlay
    from pyvmm.colo.disks import written_disks

    disks = written_disks(context.machine)
    if not disks:
        return DiskSums(disks=0, size=0, piece=disk_sums.PIECE, sums=[])
    if arguments.disk >= len(disks):
        raise QmpError(f"There is no disk {arguments.disk}: the guest can write {len(disks)}")
    image = disks[arguments.disk].image
    replica = image.replica if isinstance(image, ReplicaOverlay) else None
    sums = []
    for number in range(arguments.first, arguments.first + arguments.count):
        offset = number * disk_sums.PIECE
        if offset >= image.size:
            break
        size = min(disk_sums.PIECE, image.size - offset)
        try:
            one = replica.sum_at(offset, size) if replica is not None else disk_sums.sum_of(image.read(offset, size))
        except OSError as error:
            raise QmpError(f"disk {image.path} cannot be read: {error.strerror or error}") from None
        sums.append(one.hex())
    return DiskSums(disks=len(disks), size=image.size, piece=disk_sums.PIECE, sums=sums)
