"""Options for further devices, which every command that starts a machine has."""

from __future__ import annotations

import argparse

from pyvmm.machine.device_config import DeviceConfig, RngConfig


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--rng`` and its like."""
    add = parser.add_argument
    add("--rng", action="store_true", help="give the guest a virtio entropy device")


def devices_of(args: argparse.Namespace) -> tuple[DeviceConfig, ...]:
    """The devices asked for, in the order of their slots. ConfigError for what makes no sense."""
    devices: list[DeviceConfig] = []
    if args.rng:
        devices.append(RngConfig())
    return tuple(devices)
