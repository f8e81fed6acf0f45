"""What the kernel says of its network devices and routes, by netlink (pyroute2): no shell-out, and not from /sys.

/sys shows the namespace of whoever mounted it; a netlink socket is in the namespace of the thread that opened it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

from pyvmm.errors import HostError

ALIAS_MAX = 255
"""Bytes of an interface's alias: IFALIASZ without its NUL, <linux/if.h>."""
IFF_UP = 1
_AF_INET = 2
_RTN_MULTICAST = 5  # <linux/rtnetlink.h>


@dataclass(frozen=True)
class Link:
    """One network device."""

    index: int
    name: str
    kind: str
    """``bridge``, ``tun``, ``veth``...; empty for hardware."""
    alias: str
    mac: str
    up: bool
    master: int
    """Index of the bridge that it is a port of, or 0."""
    persistent: bool
    """A tap that outlives the program that has it open."""
    carrier: bool
    """For a tap: some program has it open."""


@contextlib.contextmanager
def open_route() -> Iterator[Any]:
    """A routing socket (pyroute2.IPRoute) in this thread's network namespace."""
    from pyroute2 import IPRoute  # 0.15 s of CPU time: for those who have a network

    with IPRoute() as route:
        yield route


@contextlib.contextmanager
def netlink_errors(purpose: str) -> Iterator[None]:
    """Let the kernel's refusal of ``purpose`` be a HostError with the remedy."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        raise HostError(f"cannot {purpose}: {_explain(error.code)}") from None
    except OSError as error:
        raise HostError(f"cannot {purpose}: {_explain(error.errno or 0)}") from None


def _explain(code: int) -> str:
    text = os.strerror(code)
    if code in (errno.EPERM, errno.EACCES):
        return f"{text}: it needs CAP_NET_ADMIN; run as root"
    if code == errno.EOPNOTSUPP:
        return f"{text}: this kernel lacks it; load the module (bridge, nf_tables) or take a kernel that has it"
    return text


def read_links(route: Any) -> list[Link]:
    """Every device of the namespace."""
    with netlink_errors("list network devices"):
        return [_link(message) for message in route.get_links()]


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    data = info.get_attr("IFLA_INFO_DATA") if info and kind == "tun" else None
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind,
        alias=message.get_attr("IFLA_IFALIAS") or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        up=bool(message["flags"] & IFF_UP),
        master=message.get_attr("IFLA_MASTER") or 0,
        persistent=bool(data and data.get_attr("IFLA_TUN_PERSIST")),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
    )


def find_link(route: Any, name: str) -> Link | None:
    """The device ``name``."""
    return next((link for link in read_links(route) if link.name == name), None)


def set_alias(route: Any, link: Link, alias: str) -> None:
    """Write ``alias`` at the device, where everybody can read it (``ip link``) and only root can change it."""
    assert len(alias.encode()) <= ALIAS_MAX, alias
    with netlink_errors(f"label {link.name}"):
        route.link("set", index=link.index, ifalias=alias)


def addresses(route: Any, link: Link) -> set[IPv4Interface]:
    """The IPv4 addresses of a device, with their prefixes."""
    with netlink_errors(f"read the addresses of {link.name}"):
        found = [m for m in route.get_addr(family=_AF_INET) if m["index"] == link.index]
    return {IPv4Interface(f"{m.get_attr('IFA_ADDRESS')}/{m['prefixlen']}") for m in found}


def routed_networks(route: Any, but: int = 0) -> list[tuple[IPv4Network, str]]:
    """(addresses, through which device) of every route but those of the device ``but``.

    All tables count: a VPN's or a policy's addresses are as little ours to take as the main table's. Routes of more
    than a /8 do not: they say how to get out (VPNs write the default route as two halves), not what is there.
    """
    names = {link.index: link.name for link in read_links(route)}
    found = []
    with netlink_errors("list routes"):
        for message in route.get_routes(family=_AF_INET):
            destination, out = message.get_attr("RTA_DST"), message.get_attr("RTA_OIF") or 0
            if destination is None or message["dst_len"] < 8 or message["type"] == _RTN_MULTICAST:
                continue
            if but and out == but:
                continue
            network = IPv4Network((IPv4Address(destination), message["dst_len"]), strict=False)
            found.append((network, names.get(out, "a route without a device")))
    return found


def default_device(route: Any) -> str | None:
    """The device that the main table's default route leaves by, the cheapest if there are several."""
    names = {link.index: link.name for link in read_links(route)}
    with netlink_errors("list routes"):
        defaults = [
            (message.get_attr("RTA_PRIORITY") or 0, names[out])
            for message in route.get_default_routes(family=_AF_INET, table=254)
            if (out := message.get_attr("RTA_OIF")) in names
        ]
    return min(defaults)[1] if defaults else None


def learned_addresses(route: Any, bridge: Link) -> dict[str, str]:
    """MAC address -> port, of what a bridge has seen and what its ports have themselves."""
    names = {link.index: link.name for link in read_links(route)}
    with netlink_errors(f"read the forwarding table of {bridge.name}"):
        entries = [m for m in route.fdb("dump") if m.get_attr("NDA_MASTER") == bridge.index]
    return {m.get_attr("NDA_LLADDR"): names.get(m["ifindex"], "?") for m in entries}


def read_option(family: str, device: str, option: str) -> bool | None:
    """A switch of ``device`` in /proc/sys/net (which is the calling thread's namespace's); ``None``: no such thing."""
    try:
        return _option_path(family, device, option).read_text(encoding="ascii").strip() != "0"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"{_option_path(family, device, option)}: {os.strerror(error.errno or 0)}") from None


def set_option(family: str, device: str, option: str, on: bool) -> None:
    """Set a switch of ``device``, unless it is so. A device that has gone, or a family that is not there, is none."""
    if read_option(family, device, option) in (None, on):
        return
    path = _option_path(family, device, option)
    try:
        path.write_text("1" if on else "0", encoding="ascii")
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise HostError(f"{path}: {reason}; it needs CAP_NET_ADMIN and a writable /proc/sys") from None


def _option_path(family: str, device: str, option: str) -> Path:
    return Path("/proc/sys/net") / family / "conf" / device / option
