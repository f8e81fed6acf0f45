"""Options for further devices, which every command that starts a machine has."""

from __future__ import annotations

import argparse
import re
from typing import Literal

import msgspec

from pyvmm.errors import ConfigError
from pyvmm.machine.config import parse_number
from pyvmm.machine.device_config import (
    MTU_MAX,
    DeviceConfig,
    DiskConfig,
    NetConfig,
    RngConfig,
    parse_switch,
    split_option,
)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--rng`` and its like."""
    add = parser.add_argument
    add("--net", metavar="WHERE[,mac=..][,mtu=..]", action="append", default=[],
        help="a network card: in the network NAME (pyvmm net up), on tap:IFNAME, or on stream:unix:PATH or"
        " stream:tcp:HOST:PORT; may be repeated")  # fmt: skip
    add("--rng", action="store_true", help="give the guest a virtio entropy device")


    add(
        "--disk", action="append", default=[], metavar="PATH[,readonly][,overlay=FILE][,serial=TEXT]",
        help="a virtio disk on a raw file or block device; the first is vda, the next vdb... With overlay=, FILE takes"
        " what the guest writes and PATH stays as it is",
    )  # fmt: skip


def devices_of(args: argparse.Namespace) -> tuple[DeviceConfig, ...]:
    """The devices asked for, in the order of their slots. ConfigError for what makes no sense."""
    devices: list[DeviceConfig] = []
    devices += [parse_net(text) for text in args.net]
    if args.rng:
        devices.append(RngConfig())
    devices.extend(map(_disk, args.disk))
    return tuple(devices)


def parse_net(text: str) -> NetConfig:
    """``NAME``, ``tap:IFNAME``, ``stream:unix:PATH`` or ``stream:tcp:HOST:PORT``, then ``,mac=`` and ``,mtu=``."""
    first, pairs = split_option("--net", text, ("mac", "mtu"))
    kind, colon, target = first.partition(":")
    backend: Literal["network", "tap", "stream"]
    if not colon:
        from pyvmm.net.plan import check_network_name

        backend, target = "network", check_network_name(first)
    elif kind == "tap" and target:
        backend = "tap"
    elif kind == "stream" and _is_stream(target):
        backend = "stream"
    else:
        ways = "a network's NAME, tap:IFNAME, stream:unix:PATH or stream:tcp:HOST:PORT"
        raise ConfigError(f"--net {text!r}: write {ways}")
    mtu = parse_number(pairs["mtu"], "--net mtu", maximum=MTU_MAX) if "mtu" in pairs else None
    return NetConfig(backend=backend, target=target, mac=pairs.get("mac"), mtu=mtu)


def _is_stream(target: str) -> bool:
    kind, _, rest = target.partition(":")
    host, _, port = rest.rpartition(":")
    return (kind == "unix" and bool(rest)) or (
        kind == "tcp" and bool(host) and re.fullmatch("[0-9]{1,5}", port) is not None and 0 < int(port) < 65536
    )


KERNEL_ADDRESS = "ip="
"""What a named network adds to Linux's command line; removable like other additions."""


def settle_address(devices: tuple[DeviceConfig, ...], words: list[str], removed: list[str]) -> tuple[DeviceConfig, ...]:
    """``devices``, not announcing an address if the user has removed ``ip=`` or says it in ``words``."""
    if not any(KERNEL_ADDRESS.startswith(prefix) for prefix in removed if prefix) and not any(
        word.startswith(KERNEL_ADDRESS) for word in words
    ):
        return devices
    return tuple(msgspec.structs.replace(d, announce=False) if isinstance(d, NetConfig) else d for d in devices)


def _disk(text: str) -> DiskConfig:
    path, pairs = split_option("--disk", text, ("readonly", "overlay", "serial"))
    return DiskConfig(
        path=path,
        readonly=parse_switch("--disk", "readonly", pairs.get("readonly", "off")),
        overlay=pairs.get("overlay"),
        serial=pairs.get("serial", ""),
    )
