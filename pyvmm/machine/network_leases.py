"""A machine's places in named networks, from before it is built until it is closed.

``--net demo`` is turned into what a machine can have: a tap, open already, with a MAC address; and for Linux the
parameter ``ip=`` that says the guest's address, so that it is there when user space begins, without a DHCP client.
"""

from __future__ import annotations

import contextlib

import msgspec

from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DeviceConfig, NetConfig
from pyvmm.net.leases import join
from pyvmm.net.plan import label
from pyvmm.net.tap import Tap


def take_leases(config: MachineConfig, stack: contextlib.ExitStack) -> tuple[MachineConfig, dict[str, Tap]]:
    """``config`` with taps in place of named networks, and these taps by name; ``stack`` gives the leases back.

    ConfigError or HostError: no such network, no rights, no address, MAC address taken.
    """
    devices: list[DeviceConfig] = []
    taps: dict[str, Tap] = {}
    word: str | None = None
    cards = 0
    for device in config.devices:
        if isinstance(device, NetConfig):
            card, cards = f"eth{cards}", cards + 1
            if device.backend == "network":
                lease = stack.enter_context(join(device.target, config.name, mac=device.mac, mtu=device.mtu))
                taps[lease.tap.name] = lease.tap
                if device.announce and word is None:  # Linux takes one ip= only
                    word = lease.plan.kernel_parameter(lease.address, label(config.name), card)
                devices.append(msgspec.structs.replace(
                    device, backend="tap", target=lease.tap.name, mac=lease.mac, bridge=lease.bridge
                ))  # fmt: skip
                continue
        devices.append(device)
    additions = f"{config.linux_additions} {word}".strip() if word is not None else config.linux_additions
    return msgspec.structs.replace(config, devices=tuple(devices), linux_additions=additions), taps
