"""A machine's places in named networks, from before it is built until it is closed, or its guest takes them elsewhere.

``--net demo`` is turned into what a machine can have: a tap, open already, with a MAC address; and for Linux the
parameter ``ip=`` that says the guest's address, so that it is there when user space begins, without a DHCP client.

A machine that waits for a guest has taps, too, but which addresses they stand for the source says
(:func:`expect_cards`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from pyvmm.errors import ConfigError
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DeviceConfig, NetConfig
from pyvmm.net.cards import MovingCard
from pyvmm.net.leases import Lease, await_guest, join
from pyvmm.net.mac import format_mac, parse_mac
from pyvmm.net.plan import label

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.virtio.net import VirtioNet


def take_leases(config: MachineConfig, stack: contextlib.ExitStack) -> tuple[MachineConfig, dict[str, Lease]]:
    """``config`` with taps in place of named networks, and the leases by these taps' names; ``stack`` gives them back.

    ConfigError or HostError: no such network, no rights, no address, MAC address taken.
    """
    devices: list[DeviceConfig] = []
    leases: dict[str, Lease] = {}
    word: str | None = None
    cards = 0
    for device in config.devices:
        if isinstance(device, NetConfig):
            card, cards = f"eth{cards}", cards + 1
            if device.backend == "network":
                if config.incoming:
                    lease = stack.enter_context(await_guest(device.target, config.name, mtu=device.mtu))
                else:
                    lease = stack.enter_context(join(device.target, config.name, mac=device.mac, mtu=device.mtu))
                    if device.announce and word is None:  # Linux takes one ip= only
                        word = lease.plan.kernel_parameter(lease.address, label(config.name), card)
                leases[lease.tap.name] = lease
                devices.append(msgspec.structs.replace(
                    device, backend="tap", target=lease.tap.name, mac=lease.mac if lease.record else device.mac,
                    bridge=lease.bridge,
                ))  # fmt: skip
                continue
        devices.append(device)
    return msgspec.structs.replace(
        config, devices=tuple(devices), linux_additions=_with_word(config.linux_additions, word)
    ), leases


def cards_of(machine: Machine) -> tuple[MovingCard, ...]:
    """What the machine that its guest moves to must know of its cards, in their order."""
    cards = []
    for config, device in _cards(machine):
        lease = machine.leases.get(config.target)
        record = lease.record if lease is not None else None
        if record is None:
            cards.append(MovingCard(format_mac(device.state.mac)))
        else:
            cards.append(MovingCard(record.mac, record.id, record.address))
    return tuple(cards)


def expect_cards(machine: Machine, cards: Sequence[MovingCard]) -> None:
    """A guest with ``cards`` is on its way: have their leases, and remember them for its resets here.

    ConfigError: they do not fit into the networks here. HostError: the kernel refuses.
    """
    here = list(_cards(machine))
    if len(cards) != len(here):
        raise ConfigError(f"the guest that comes has {len(cards)} network cards, this machine {len(here)}")
    word: str | None = None
    for number, (card, (config, device)) in enumerate(zip(cards, here, strict=True)):
        device.state.mac = parse_mac(card.mac)  # until its state is loaded
        lease = machine.leases.get(config.target)
        if lease is None:
            continue
        lease.succeed(card, mac=config.mac)
        device.power_on_mac = parse_mac(card.mac)
        if config.announce and word is None:
            word = lease.plan.kernel_parameter(lease.address, label(machine.config.name), f"eth{number}")
    machine.config = msgspec.structs.replace(
        machine.config, linux_additions=_with_word(machine.config.linux_additions, word)
    )


def _with_word(additions: str, word: str | None) -> str:
    return f"{additions} {word}".strip() if word is not None else additions


def _cards(machine: Machine) -> Iterator[tuple[NetConfig, VirtioNet]]:
    from pyvmm.machine.virtio_slots import virtio_devices
    from pyvmm.virtio.net import VirtioNet

    configs = [config for config in machine.config.devices if isinstance(config, NetConfig)]
    return zip(configs, virtio_devices(machine, VirtioNet), strict=True)
