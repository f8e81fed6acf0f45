"""Disks, the balloon, network cards. Source: qapi/block-core.json (query-block), machine.json (balloon), net.json."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from msgspec import Meta

from pyvmm.migration.parameters import Parameters
from pyvmm.qmp.arguments import QmpStruct
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.errors import ErrorClass, QmpError
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import VirtioMmio

DetectZeroes = Literal["off", "on", "unmap"]


class ImageInfo(QmpStruct):
    """The file behind a disk. Sizes are bytes; ``actual_size`` is what it takes on the host."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int
    dirty_flag: bool
    backing_filename: str = ""


class CacheInfo(QmpStruct):
    """Through the host's page cache; flushes are carried out."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDeviceInfo(QmpStruct, rename=None):
    """A disk's medium. Limits are QEMU's; 0: there is none. The protocol's names have underscores here."""

    file: str
    ro: bool
    drv: str
    backing_file_depth: int
    encrypted: bool
    detect_zeroes: DetectZeroes
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    write_threshold: int
    image: ImageInfo
    cache: CacheInfo


class BlockInfo(QmpStruct):
    """One disk. QEMU's ``device`` is its backend's name, ``qdev`` says which device of the machine it is."""

    device: str
    qdev: str
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo


class BalloonArguments(QmpStruct):
    """``value``: bytes the guest is to have."""

    value: int


class BalloonInfo(QmpStruct):
    """``actual``: bytes the guest has."""

    actual: int


class AnnounceArguments(QmpStruct):
    """Milliseconds, and how often. ``interfaces`` are the names that query-block's kind of ``qdev`` has behind its last
    slash (virtio-net-0); none: all.
    """

    initial: Annotated[int, Meta(ge=1, le=100_000)]
    max: Annotated[int, Meta(ge=1, le=100_000)]
    rounds: Annotated[int, Meta(ge=1, le=1000)]
    step: Annotated[int, Meta(ge=0, le=10_000)]
    interfaces: Annotated[list[str], Meta(max_length=100)] | None = None


def _devices(context: CommandContext, name: str) -> list[tuple[str, Any]]:
    """(section, device) of every virtio device of a kind. Their classes are not imported for a question."""
    transports = [each for each in context.machine.devices if isinstance(each, VirtioMmio)]
    return [(each.section_id, each.device) for each in transports if _name_of(each.device) == name]


def _name_of(device: VirtioDevice) -> str:
    return device.name


@command("query-block")
def query_block(context: CommandContext) -> list[BlockInfo]:
    """All disks, in the order of their slots: the first is the guest's vda."""
    return [
        BlockInfo(
            device=f"virtio{number}",
            qdev=f"/machine/{section}",
            type="unknown",
            removable=False,
            locked=False,
            inserted=_medium(device.image),
        )
        for number, (section, device) in enumerate(_devices(context, "virtio-blk"))
    ]


def _medium(image: Any) -> BlockDeviceInfo:
    base = getattr(image, "base", None)
    info = ImageInfo(
        filename=image.path,
        format="raw" if base is None else "overlay",
        virtual_size=image.size,
        actual_size=os.fstat(image.fd).st_blocks * 512,
        dirty_flag=False,
        backing_filename="" if base is None else base.path,
    )
    return BlockDeviceInfo(
        file=image.path, ro=image.read_only, drv=info.format, backing_file_depth=int(base is not None),
        encrypted=False, detect_zeroes="off", bps=0, bps_rd=0, bps_wr=0, iops=0, iops_rd=0, iops_wr=0,
        write_threshold=0, image=info, cache=CacheInfo(writeback=True, direct=False, no_flush=False),
    )  # fmt: skip


@command("query-balloon")
def query_balloon(context: CommandContext) -> BalloonInfo:
    """What the guest has left."""
    return BalloonInfo(actual=context.machine.memory.size - _balloon(context).actual)


@command("balloon")
def balloon(context: CommandContext, arguments: BalloonArguments) -> None:
    """Ask the guest to get along with ``value`` bytes."""
    device, size = _balloon(context), context.machine.memory.size
    if not 0 < arguments.value <= size:
        raise QmpError("Parameter 'target' expects a size")
    device.set_target(size - arguments.value)


def _balloon(context: CommandContext) -> Any:
    found = _devices(context, "virtio-balloon")
    if not found:
        raise QmpError("No balloon device has been activated", ErrorClass.DEVICE_NOT_ACTIVE)
    return found[0][1]


@command("announce-self")
def announce_self(context: CommandContext, arguments: AnnounceArguments) -> None:
    """Tell the network where the guest is: after it was led elsewhere by hand, or its switch was exchanged."""
    cards = {section for section, _ in _devices(context, "virtio-net")}
    asked = cards if arguments.interfaces is None else set(arguments.interfaces)
    if unknown := sorted(asked - cards):
        there = ", ".join(sorted(cards)) or "none"
        raise QmpError(f"no network card {unknown[0]!a}; there are: {there}", ErrorClass.DEVICE_NOT_FOUND)
    parameters = Parameters(
        announce_initial=arguments.initial, announce_max=arguments.max, announce_rounds=arguments.rounds,
        announce_step=arguments.step,
    )  # fmt: skip
    context.monitor.migration.announce(parameters, lambda device: device.section_id in asked)
