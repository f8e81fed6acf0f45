"""Options for further devices, which every command that starts a machine has."""

from __future__ import annotations

import argparse
import re
from typing import Literal

import msgspec

from pyvmm.errors import ConfigError
from pyvmm.machine.config import parse_number, parse_size
from pyvmm.machine.device_config import (
    CID_LAST,
    MTU_MAX,
    BalloonConfig,
    ConsoleConfig,
    DeviceConfig,
    DiskConfig,
    NetConfig,
    RngConfig,
    VsockConfig,
    parse_switch,
    split_option,
)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--rng`` and its like."""
    add = parser.add_argument
    add("--net", metavar="WHERE[,mac=..][,mtu=..][,bridge=..]", action="append", default=[],
        help="a network card: in the network NAME (pyvmm net up), on tap:IFNAME, which joins a bridge that is named,"
        " or on stream:unix:PATH or stream:tcp:HOST:PORT; may be repeated")  # fmt: skip
    add("--device", choices=("testdev",), action="append", default=[],
        help="testdev: QEMU's pc-testdev, which bare-metal test suites use")  # fmt: skip
    add("--rng", action="store_true", help="give the guest a virtio entropy device")
    add("--virtconsole", metavar="unix:PATH", help="virtio console (hvc0) on a unix socket that pyvmm listens on")
    add("--balloon", metavar="target=SIZE", nargs="?", const="",
        help="virtio memory balloon, which takes SIZE from the guest at first (default 0)")  # fmt: skip
    add("--vsock", metavar="CID,unix:PATH",
        help="virtio sockets: write 'CONNECT port' to PATH to reach the guest; PATH_N is host port N")  # fmt: skip


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
    if args.virtconsole is not None:
        devices.append(ConsoleConfig(path=_unix_path("--virtconsole", args.virtconsole)))
    if args.balloon is not None:
        devices.append(_balloon(args.balloon))
    if args.vsock is not None:
        cid, _, where = args.vsock.partition(",")
        path = _unix_path(f"--vsock {cid},", where)
        devices.append(VsockConfig(cid=parse_number(cid, "--vsock", maximum=CID_LAST), path=path))
    return tuple(devices)


def parse_net(text: str) -> NetConfig:
    """``NAME``, ``tap:IFNAME``, ``stream:unix:PATH`` or ``stream:tcp:HOST:PORT``, then ``,mac=`` and ``,mtu=``.

    A tap may have ``,bridge=``, which it joins.
    """
    first, pairs = split_option("--net", text, ("mac", "mtu", "bridge"))
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
    bridge = pairs.get("bridge")
    if bridge is not None:
        from pyvmm.net.tap import check_name

        if backend != "tap":
            raise ConfigError(f"--net {first},bridge={bridge}: bridge= is for tap:IFNAME; a network has its own")
        check_name(bridge)
    mtu = parse_number(pairs["mtu"], "--net mtu", maximum=MTU_MAX) if "mtu" in pairs else None
    return NetConfig(backend=backend, target=target, mac=pairs.get("mac"), mtu=mtu, bridge=bridge)


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


def _unix_path(option: str, text: str) -> str:
    """The path in ``unix:PATH``."""
    kind, _, path = text.partition(":")
    if kind != "unix" or not path:
        raise ConfigError(f"{option} {text!r}: write unix:PATH")
    return path


def _balloon(text: str) -> BalloonConfig:
    if text and not text.startswith("target="):
        # A file behind a bare --balloon lands here: it looks like the option's value.
        raise ConfigError(f"--balloon {text!r}: write --balloon target=SIZE, for example target=32M")
    _, pairs = split_option("--balloon", f",{text}" if text else "", ("target",))
    return BalloonConfig(target=parse_size(pairs.get("target", "0"), "--balloon target"))
