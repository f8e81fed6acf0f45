"""Snapshots: a machine kept in a file, and machines that go on from it, any number of them."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from typing import Literal

import msgspec

from pyvmm import __version__
from pyvmm.devices.vmgenid import VmGenId
from pyvmm.errors import ConfigError, HostError, ImageError, PyvmmError, SectionError, StateError
from pyvmm.machine.builder import build_machine
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DiskConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.memory.guest_memory import PAGE_SIZE, Region
from pyvmm.migration.machine_state import prepare_machine, save_machine
from pyvmm.migration.sections import decode_sections, encode_sections
from pyvmm.migration.snapshot_chain import RUNS_MAX, SnapshotChain, base_stamp, map_layers, refuse_if_needed
from pyvmm.migration.snapshot_file import (
    BaseStamp,
    DiskStamp,
    RamPart,
    SnapshotFile,
    SnapshotHeader,
    new_file,
    pack_head,
    ram_start,
)
from pyvmm.migration.snapshot_zstd import write_compressed, zstd_library
from pyvmm.trace import trace_group

T = trace_group("migration")

Compression = Literal["none", "zstd"]
_HEAD_ROOM = 4096
"""What the header may grow by once RAM is written and its numbers are known."""


def save_snapshot(
    machine: Machine, path: str, *, description: str = "", base: str | None = None, compress: Compression = "none"
) -> SnapshotHeader:
    """Write ``machine`` to ``path``, whole or not at all. In the loop's thread; a running machine is paused meanwhile.

    ``base``: the path of a snapshot; only pages that differ from it are stored. They are found by comparing, so it
    need not be one of this machine's past, and no dirty log is needed.
    ConfigError names the path and what is wrong with it, ImageError what is wrong with the base; the machine goes on
    in any case.
    """
    if machine.ending is not None:
        raise StateError("the guest has ended: there is nothing to go on from")
    if compress == "zstd":
        zstd_library()
    refuse_if_needed(path, "replaced")
    running = machine.run_state is RunState.RUNNING
    with contextlib.ExitStack() as stack:
        chain = stack.enter_context(SnapshotChain(base)) if base is not None else None
        stamp = base_stamp(chain, path) if chain is not None else None
        if running:
            machine.pause()
            stack.callback(machine.resume)
        try:
            runs = _runs(machine, chain)
            return _write(machine, path, description, running, stamp, runs, compress)
        except OSError as error:
            raise ConfigError(f"snapshot {path}: {error.strerror}") from None


def _runs(machine: Machine, base: SnapshotChain | None) -> list[list[tuple[int, int]] | None]:
    """For each region the pages that differ from the base's; None: all are to be stored."""
    regions = _regions(machine)
    if base is None:
        return [None] * len(regions)
    check_regions(base.top, regions)
    room = max(RUNS_MAX // len(regions), 1)
    found: list[list[tuple[int, int]] | None] = []
    with base.readable() as layers:
        for index, region in enumerate(regions):
            was = Region(region.gpa, region.size, "base")
            try:
                map_layers(was, [layer[index] for layer in layers])
                found.append(region.differences(was, room))
            finally:
                was.close()
    return found


def check_regions(file: SnapshotFile, regions: list[Region]) -> None:
    """ImageError unless the file's RAM is made of these regions."""
    if [(p.gpa, p.size) for p in file.header.ram] != [(r.gpa, r.size) for r in regions]:
        raise ImageError(file.path, "ram", "other regions than the machine has")


def _write(
    machine: Machine,
    path: str,
    description: str,
    was_running: bool,
    base: BaseStamp | None,
    runs: list[list[tuple[int, int]] | None],
    compression: Compression,
) -> SnapshotHeader:
    began = time.monotonic()
    state = encode_sections(save_machine(machine))
    config = _portable(machine.config)
    parts = [
        RamPart(gpa=r.gpa, size=r.size, offset=0, length=r.size, pages=0, crc=0, runs=tuple(n) if n is not None else n)
        for r, n in zip(_regions(machine), runs, strict=True)
    ]
    header = SnapshotHeader(
        id=uuid.uuid4().hex,
        created=int(time.time()),
        description=description[:4096],
        pyvmm=__version__,
        config=msgspec.to_builtins(config, builtin_types=(bytes,)),
        compression=compression,
        base=base,
        state_size=len(state),
        ram=tuple(parts),
        disks=_stamps(config),
        was_running=was_running,
    )
    at = ram_start(len(pack_head(header)) + _HEAD_ROOM, len(state))
    with new_file(path) as fd:
        for index, region in enumerate(_regions(machine)):
            parts[index] = _write_part(region, fd, at, parts[index], compression)
            end = at + parts[index].length
            at = -(-end // PAGE_SIZE) * PAGE_SIZE
        os.ftruncate(fd, end)
        header = msgspec.structs.replace(header, ram=tuple(parts))
        head = pack_head(header) + state
        if len(head) > parts[0].offset:
            raise ValueError(f"a header of {len(head)} bytes")
        _write_all(fd, head)
    T.snapshot_saved.on and T.snapshot_saved(path, sum(p.pages for p in parts), int((time.monotonic() - began) * 1e6))
    return header


def _write_part(region: Region, fd: int, at: int, part: RamPart, compression: Compression) -> RamPart:
    length = part.size
    if compression == "none":
        crc, pages = region.write_to_file(fd, at, part.runs)
    else:
        runs = part.runs if part.runs is not None else region.differences(None, RUNS_MAX)
        length = write_compressed(region, fd, at, runs)
        crc, pages = region.sum_pages(part.runs)
    return msgspec.structs.replace(part, offset=at, length=length, pages=pages, crc=crc)


def _write_all(fd: int, data: bytes) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], at)


def _regions(machine: Machine) -> list[Region]:
    return machine.memory.regions


def load_snapshot(
    path: str,
    *,
    adapt: Callable[[MachineConfig], MachineConfig] = lambda config: config,
    quirks: frozenset[str] | None = None,
    verify: bool = False,
) -> Machine:
    """A new machine that stands where the saved one stood; ``run`` lets it go on.

    ``adapt`` changes what may differ (name, serial line, timeout...); ``quirks`` are this host's, ``None``: as its
    profile says. Raises ImageError naming what is wrong with the file, SectionError what does not fit this host or
    pyvmm, or what building a machine raises; nothing is left open then. ``verify`` reads all RAM to check its CRC.
    """
    with SnapshotChain(path) as chain:
        config = adapt(config_of(chain.top))
        check_disks(chain.top)
        machine = build_machine(config, _of_profile() if quirks is None else quirks, saved_ram=Region)
        try:
            _restore(machine, chain, verify=verify)
        except BaseException:
            machine.close()
            raise
    return machine


def restore_snapshot(machine: Machine, path: str, *, verify: bool = False) -> SnapshotHeader:
    """Put ``machine``, which must be of the same make, back to the snapshot at ``path``. In the loop's thread.

    It is paused first and stays so. Refused (as by :func:`load_snapshot`) before anything of it has changed, if the
    file or what is in it does not fit.
    """
    with SnapshotChain(path) as chain:
        check_disks(chain.top)
        if machine.run_state is RunState.RUNNING:
            machine.pause()
        _restore(machine, chain, verify=verify)
        return chain.top.header


def _of_profile() -> frozenset[str]:
    from pyvmm.host.profile import load_profile

    return frozenset(load_profile().quirks)


def config_of(file: SnapshotFile) -> MachineConfig:
    """The configuration of the saved machine. ImageError if it is none."""
    try:
        return msgspec.convert(file.header.config, MachineConfig, builtin_types=(bytes,))
    except (msgspec.ValidationError, PyvmmError) as error:
        raise ImageError(file.path, "config", str(error)) from None


def verify_ram(chain: SnapshotChain) -> None:
    """Read all RAM of every file; ImageError if a CRC does not fit."""
    memory = config_of(chain.top).memory
    if any(part.size > memory for part in chain.top.header.ram):
        raise ImageError(chain.top.path, "ram", f"a region of more than the machine's {memory >> 20} MiB")
    with chain.readable() as layers:
        for file, layer in zip(chain.files, layers, strict=True):
            for part, fd, offset in layer:
                _verify(file, part, fd, offset)


def _verify(file: SnapshotFile, part: RamPart, fd: int, offset: int) -> None:
    region = Region(part.gpa, part.size, "verified")
    try:
        region.map_file(fd, offset)
        if region.sum_pages(part.runs) != (part.crc, part.pages):
            raise ImageError(file.path, "ram", f"the CRC of the region at {part.gpa:#x} does not fit: it is damaged")
    finally:
        region.close()


def check_disks(file: SnapshotFile) -> None:
    """ConfigError if a disk that the guest could write to has changed since: its own caches would be wrong."""
    for stamp in file.header.disks:
        if _stamp(stamp.path) != stamp:
            raise ConfigError(
                f"snapshot {file.path}: the disk {stamp.path} was written to since; a snapshot needs the disk as it"
                " was (restore it, or save with an overlay and keep a copy of that)"
            )


def _restore(machine: Machine, chain: SnapshotChain, *, verify: bool) -> None:
    began, file = time.monotonic(), chain.top
    try:
        apply = prepare_machine(machine, decode_sections(file.state()))
    except SectionError as error:
        raise SectionError(error.section, error.field, f"{error.problem} ({file.path})") from None
    check_regions(file, _regions(machine))
    if verify:
        verify_ram(chain)
    with chain.readable() as layers:
        machine.rest.pause()
        for index, region in enumerate(_regions(machine)):
            map_layers(region, [layer[index] for layer in layers])
    mismatches = apply()
    if mismatches:
        raise HostError(f"snapshot {file.path}: this host does not take {', '.join(mismatches[:8])}")
    for device in machine.devices:
        if isinstance(device, VmGenId):
            device.renew()
    T.snapshot_loaded.on and T.snapshot_loaded(file.path, int((time.monotonic() - began) * 1e6))


def _portable(config: MachineConfig) -> MachineConfig:
    """With absolute paths, since who loads it may stand elsewhere, and without what was this host's or this run's."""
    devices = tuple(
        msgspec.structs.replace(
            device,
            path=os.path.abspath(device.path),
            overlay=os.path.abspath(device.overlay) if device.overlay is not None else None,
        )
        if isinstance(device, DiskConfig)
        else device
        for device in config.devices
    )
    return msgspec.structs.replace(
        config,
        image=os.path.abspath(config.image),
        initrd=os.path.abspath(config.initrd) if config.initrd is not None else None,
        devices=devices,
        start_paused=False,
        incoming=False,
    )


def _stamps(config: MachineConfig) -> tuple[DiskStamp, ...]:
    written = [d.overlay or d.path for d in config.devices if isinstance(d, DiskConfig) and not d.readonly]
    return tuple(_stamp(path) for path in written)


def _stamp(path: str) -> DiskStamp:
    try:
        found = os.stat(path)
    except OSError:
        return DiskStamp(path=path, size=0, modified_ns=0)
    return DiskStamp(path=path, size=found.st_size, modified_ns=found.st_mtime_ns)
