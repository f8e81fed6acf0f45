"""How each configured virtio device is made. Adding one is a function and a line here.

Imports are inside: a machine pays only for the devices it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvmm.machine.device_config import RngConfig
from pyvmm.machine.machine import Machine
from pyvmm.virtio.device import VirtioDevice


def make_device(machine: Machine, config: Any) -> VirtioDevice:
    """The device that ``config`` (one of DeviceConfig) describes. ConfigError or HostError say why it cannot be."""
    return MAKERS[type(config)](machine, config)


def _rng(machine: Machine, config: RngConfig) -> VirtioDevice:
    from pyvmm.virtio.rng import VirtioRng

    return VirtioRng(machine.vm.native)


MAKERS: dict[type, Callable[[Machine, Any], VirtioDevice]] = {
    RngConfig: _rng,
}
