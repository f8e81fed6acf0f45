"""How each configured virtio device is made. Adding one is a function and a line here.

Imports are inside: a machine pays only for the devices it has.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError
from pyvmm.machine.device_config import (
    BalloonConfig,
    ConsoleConfig,
    DiskConfig,
    NetConfig,
    RngConfig,
    VsockConfig,
)
from pyvmm.machine.machine import Machine
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pyvmm.block.image import Image
    from pyvmm.net.backend import Backend


def make_device(machine: Machine, config: Any) -> VirtioDevice:
    """The device that ``config`` (one of DeviceConfig) describes. ConfigError or HostError say why it cannot be."""
    return MAKERS[type(config)](machine, config)


def _rng(machine: Machine, config: RngConfig) -> VirtioDevice:
    from pyvmm.virtio.rng import VirtioRng

    return VirtioRng(machine.vm.native)


def _net(machine: Machine, config: NetConfig) -> VirtioDevice:
    from pyvmm.net.mac import default_mac, parse_mac
    from pyvmm.virtio.net import VirtioNet

    if config.mac is not None:
        mac = parse_mac(config.mac)
    else:
        cards = [each for each in machine.config.devices if isinstance(each, NetConfig)]
        mac = default_mac(machine.config.name, next(i for i, each in enumerate(cards) if each is config))
    return VirtioNet(machine.vm.native, _net_backend(machine, config), mac, _say)


def _net_backend(machine: Machine, config: NetConfig) -> Backend:
    if config.backend == "stream":
        if config.mtu is not None or config.bridge is not None:
            raise ConfigError(f"--net {config.target}: mtu and bridge are a tap's; a stream has neither")
        from pyvmm.net.stream import Stream

        return Stream(config.target)
    if config.target in machine.leases:
        return machine.leases[config.target].tap
    from pyvmm.net.tap import Tap

    tap = Tap(config.target, mtu=config.mtu)
    try:
        if config.bridge is not None:
            from pyvmm.net.bridge import attach

            attach(tap.name, config.bridge, up=not machine.config.incoming)
        if machine.config.incoming:  # the guest still runs elsewhere
            tap.release()
        else:
            tap.bring_up()
    except BaseException:
        tap.close()
        raise
    return tap


def _say(text: str) -> None:
    """One line for the user; whose terminal may be gone."""
    with contextlib.suppress(OSError):
        print(f"pyvmm: {text}", file=sys.stderr, flush=True)


def _disk(machine: Machine, config: DiskConfig) -> VirtioDevice:
    from pyvmm.block.image import open_image
    from pyvmm.block.pair_file import check_startable
    from pyvmm.virtio.blk import VirtioBlk

    if machine.config.replica and not config.readonly:
        return VirtioBlk(machine.vm.native, _replica_image(machine, config), config.serial, _say)
    check_startable(config.path, config.overlay)
    later = machine.config.incoming  # the source writes to it until it hands over
    if config.overlay is None:
        image = open_image(config.path, read_only=config.readonly, later=later)
    else:
        from pyvmm.block.overlay import open_overlay

        image = open_overlay(config.overlay, config.path, later=later)
    return VirtioBlk(machine.vm.native, image, config.serial, _say)


def _replica_image(machine: Machine, config: DiskConfig) -> Image:
    from pyvmm.block.replica_disk import ReplicaDisk

    if config.overlay is not None:
        raise ConfigError(f"--disk {config.path}: a secondary keeps an overlay of its own; leave overlay= out")
    disk = ReplicaDisk(config.path)
    disk.overlay.replica = disk
    return disk.overlay


def _console(machine: Machine, config: ConsoleConfig) -> VirtioDevice:
    from pyvmm.machine.serial_backend import SocketSerialBackend
    from pyvmm.virtio.console import VirtioConsole

    backend = SocketSerialBackend(machine.loop, config.path, "--virtconsole")
    gate = backend.gate
    console = VirtioConsole(machine.vm.native, backend.output, lambda: gate.full, backend.close)
    gate.on_open = lambda: machine.loop.post(console.output_has_room)
    backend.attach(console)
    return console


def _balloon(machine: Machine, config: BalloonConfig) -> VirtioDevice:
    from pyvmm.virtio.balloon import VirtioBalloon

    if config.target >= machine.memory.size:
        raise ConfigError(f"--balloon target={config.target >> 20}M: the guest has {machine.memory.size >> 20}M in all")
    return VirtioBalloon(machine.vm.native, machine.memory, config.target)


def _vsock(machine: Machine, config: VsockConfig) -> VirtioDevice:
    from pyvmm.machine.unix_listener import listen_unix
    from pyvmm.virtio.vsock import VirtioVsock

    listener = listen_unix(config.path, f"--vsock {config.cid},unix:{config.path}", backlog=64)
    return VirtioVsock(machine.vm.native, machine.loop, config.cid, listener, config.path)


MAKERS: dict[type, Callable[[Machine, Any], VirtioDevice]] = {
    RngConfig: _rng,
    NetConfig: _net,
    DiskConfig: _disk,
    ConsoleConfig: _console,
    BalloonConfig: _balloon,
    VsockConfig: _vsock,
}
