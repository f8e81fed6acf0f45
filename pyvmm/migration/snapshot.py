"""Snapshots: a machine kept in a file, and machines that go on from it, any number of them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable

import msgspec

from pyvmm import __version__
from pyvmm.devices.vmgenid import VmGenId
from pyvmm.errors import ConfigError, HostError, ImageError, PyvmmError, SectionError, StateError
from pyvmm.machine.builder import build_machine
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DiskConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.memory.guest_memory import Region
from pyvmm.migration.machine_state import prepare_machine, save_machine
from pyvmm.migration.sections import decode_sections, encode_sections
from pyvmm.migration.snapshot_file import (
    DiskStamp,
    RamPart,
    SnapshotFile,
    SnapshotHeader,
    new_file,
    pack_head,
    ram_start,
)
from pyvmm.trace import trace_group

T = trace_group("migration")

_HEAD_ROOM = 4096
"""What the header may grow by once RAM is written and its numbers are known."""


def save_snapshot(machine: Machine, path: str, *, description: str = "") -> SnapshotHeader:
    """Write ``machine`` to ``path``, whole or not at all. In the loop's thread; a running machine is paused meanwhile.

    ConfigError names the path and what is wrong with it; the machine goes on in any case.
    """
    if machine.ending is not None:
        raise StateError("the guest has ended: there is nothing to go on from")
    running = machine.run_state is RunState.RUNNING
    if running:
        machine.pause()
    try:
        return _write(machine, path, description, running)
    except OSError as error:
        raise ConfigError(f"snapshot {path}: {error.strerror}") from None
    finally:
        if running:
            machine.resume()


def _write(machine: Machine, path: str, description: str, was_running: bool) -> SnapshotHeader:
    began = time.monotonic()
    state = encode_sections(save_machine(machine))
    config = _portable(machine.config)
    header = SnapshotHeader(
        id=uuid.uuid4().hex,
        created=int(time.time()),
        description=description[:4096],
        pyvmm=__version__,
        config=msgspec.to_builtins(config, builtin_types=(bytes,)),
        compression="none",
        state_size=len(state),
        ram=tuple(RamPart(gpa=r.gpa, size=r.size, offset=0, length=r.size, pages=0, crc=0) for r in _regions(machine)),
        disks=_stamps(config),
        was_running=was_running,
    )
    at = ram_start(len(pack_head(header)) + _HEAD_ROOM, len(state))
    parts = []
    with new_file(path) as fd:
        for region in _regions(machine):
            crc, pages = region.write_to_file(fd, at)
            parts.append(RamPart(gpa=region.gpa, size=region.size, offset=at, length=region.size, pages=pages, crc=crc))
            at += region.size
        os.ftruncate(fd, at)
        header = msgspec.structs.replace(header, ram=tuple(parts))
        head = pack_head(header) + state
        if len(head) > parts[0].offset:
            raise ValueError(f"a header of {len(head)} bytes")
        _write_all(fd, head)
    T.snapshot_saved.on and T.snapshot_saved(path, sum(p.pages for p in parts), int((time.monotonic() - began) * 1e6))
    return header


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
    profile says. Raises ImageError naming what is wrong with the
    file, SectionError what does not fit this host or pyvmm, or what building a machine raises; nothing is left open
    then. ``verify`` reads all RAM to check its CRC.
    """
    with SnapshotFile(path) as file:
        config = adapt(config_of(file))
        check_disks(file)
        machine = build_machine(config, _of_profile() if quirks is None else quirks, saved_ram=Region)
        try:
            _restore(machine, file, verify=verify)
        except BaseException:
            machine.close()
            raise
    return machine


def restore_snapshot(machine: Machine, path: str, *, verify: bool = False) -> SnapshotHeader:
    """Put ``machine``, which must be of the same make, back to the snapshot at ``path``. In the loop's thread.

    It is paused first and stays so. Refused (as by :func:`load_snapshot`) before anything of it has changed, if the
    file or what is in it does not fit.
    """
    with SnapshotFile(path) as file:
        check_disks(file)
        if machine.run_state is RunState.RUNNING:
            machine.pause()
        _restore(machine, file, verify=verify)
        return file.header


def _of_profile() -> frozenset[str]:
    from pyvmm.host.profile import load_profile

    return frozenset(load_profile().quirks)


def config_of(file: SnapshotFile) -> MachineConfig:
    """The configuration of the saved machine. ImageError if it is none."""
    try:
        return msgspec.convert(file.header.config, MachineConfig, builtin_types=(bytes,))
    except (msgspec.ValidationError, PyvmmError) as error:
        raise ImageError(file.path, "config", str(error)) from None


def verify_ram(file: SnapshotFile) -> None:
    """Read all RAM; ImageError if a CRC does not fit."""
    for part in file.header.ram:
        region = Region(part.gpa, part.size, "verified")
        try:
            region.map_file(file.fd, part.offset)
            _verify(file, part, region)
        finally:
            region.close()


def _verify(file: SnapshotFile, part: RamPart, region: Region) -> None:
    if region.sum_pages() != (part.crc, part.pages):
        raise ImageError(file.path, "ram", f"the CRC of the region at {part.gpa:#x} does not fit: it is damaged")


def check_disks(file: SnapshotFile) -> None:
    """ConfigError if a disk that the guest could write to has changed since: its own caches would be wrong."""
    for stamp in file.header.disks:
        if _stamp(stamp.path) != stamp:
            raise ConfigError(
                f"snapshot {file.path}: the disk {stamp.path} was written to since; a snapshot needs the disk as it"
                " was (restore it, or save with an overlay and keep a copy of that)"
            )


def _restore(machine: Machine, file: SnapshotFile, *, verify: bool) -> None:
    began = time.monotonic()
    try:
        apply = prepare_machine(machine, decode_sections(file.state()))
    except SectionError as error:
        raise SectionError(error.section, error.field, f"{error.problem} ({file.path})") from None
    parts = file.header.ram
    if [(p.gpa, p.size) for p in parts] != [(r.gpa, r.size) for r in _regions(machine)]:
        raise ImageError(file.path, "ram", "other regions than the machine has")
    if verify:
        verify_ram(file)
    machine.rest.pause()
    for part, region in zip(parts, _regions(machine), strict=True):
        region.map_file(file.fd, part.offset)
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
