"""Bridges: made, addressed, filled with ports, removed."""

from __future__ import annotations

from ipaddress import IPv4Interface
from typing import Any

from pyvmm.errors import ConfigError, HostError
from pyvmm.net.links import Link, addresses, find_link, netlink_errors, open_route, set_option


def make_bridge(route: Any, name: str, mac: str) -> Link:
    """A bridge, still down. Its address is its own, not that of a port: guests remember their gateway's."""
    with netlink_errors(f"make the bridge {name}"):
        route.link("add", ifname=name, kind="bridge", address=mac)
    return _must_find(route, name)


def configure_bridge(route: Any, bridge: Link, address: IPv4Interface) -> None:
    """Give it ``address`` and set it up, as far as it is not so yet."""
    # A guest must not be able to tell the host of IPv6 routes (router advertisements): the host has no IPv6 here.
    set_option("ipv6", bridge.name, "disable_ipv6", True)
    if address not in addresses(route, bridge):
        with netlink_errors(f"give {bridge.name} the address {address}"):
            route.addr("add", index=bridge.index, address=str(address.ip), prefixlen=address.network.prefixlen)
    if not bridge.up:
        with netlink_errors(f"set {bridge.name} up"):
            route.link("set", index=bridge.index, state="up")


def remove_link(route: Any, link: Link) -> None:
    """Delete a device; a bridge's ports are just no longer ports."""
    with netlink_errors(f"remove {link.name}"):
        route.link("del", index=link.index)


def attach(tap: str, bridge: str, route: Any = None, *, up: bool = True) -> None:
    """Make the device ``tap`` a port of ``bridge`` and set it up. Nothing happens if it is one already.

    Without ``up`` it stays as it is: over a port that is down no frame goes.
    ConfigError if there is no such bridge, HostError if the kernel refuses.
    """
    if route is None:
        with open_route() as route:
            attach(tap, bridge, route, up=up)
        return
    port, master = _must_find(route, tap), find_link(route, bridge)
    if master is None or master.kind != "bridge":
        what = "there is no such device" if master is None else "it is no bridge"
        raise ConfigError(f"bridge {bridge}: {what}; pyvmm net up makes one")
    if port.master not in (0, master.index):
        raise ConfigError(f"tap {tap}: is a port of another bridge; take it off that (ip link set {tap} nomaster)")
    if port.master != master.index or (up and not port.up):
        state = {"state": "up"} if up else {}
        with netlink_errors(f"make {tap} a port of {bridge}"):
            route.link("set", index=port.index, master=master.index, **state)


def detach(port: Link, route: Any) -> None:
    """``port`` is one no longer."""
    with netlink_errors(f"take {port.name} off its bridge"):
        route.link("set", index=port.index, master=0)


def _must_find(route: Any, name: str) -> Link:
    found = find_link(route, name)
    if found is None:
        raise HostError(f"network device {name}: has gone; somebody else removes devices here")
    return found
