"""Named networks: a bridge ``pvm-NAME`` with the host's address, its VMs' taps as ports, perhaps translated (nat.py).

What exists is what the kernel says (see records.py). Everything here may be done again, and puts right what is half
there: a process that died in the middle, a bridge that somebody removed under running VMs.

The host is protected from guests; guests of one network are not protected from each other, no more than machines on
one switch: give those that must not meet networks of their own.
"""

from __future__ import annotations

from ipaddress import IPv4Interface
from typing import Any, Literal

import msgspec

from pyvmm.errors import ConfigError, HostError
from pyvmm.net import nat
from pyvmm.net.bridge import attach, configure_bridge, make_bridge, remove_link
from pyvmm.net.links import (
    Link,
    addresses,
    default_device,
    find_link,
    open_route,
    read_links,
    routed_networks,
    set_alias,
    set_option,
)
from pyvmm.net.plan import Plan, bridge_name, check_network_name, first_free_plan, mac_of
from pyvmm.net.records import (
    ArrivalRecord,
    LeaseRecord,
    NetworkRecord,
    arrivals_in,
    is_stale,
    leases_in,
    networks_lock,
    read_record,
    write_record,
)
from pyvmm.trace import trace_group

T = trace_group("net")


VmStanding = Literal["connected", "off the bridge", "left over", "waiting", "moving"]
"""``waiting``: for a guest from elsewhere. ``moving``: its guest is about to run here, or ran here until now; another
tap has the same lease. ``left over``: its VM is dead; the next ``up`` or the next VM takes the tap away.
"""


class VmState(msgspec.Struct, frozen=True):
    """One VM of a network."""

    vm: str
    tap: str
    address: str
    """Empty, like ``mac``, for one that waits."""
    mac: str
    state: VmStanding


class NetworkState(msgspec.Struct, frozen=True):
    """One network, as ``pyvmm net list`` shows it."""

    name: str
    bridge: str
    state: Literal["up", "down", "gone"]
    """``gone``: the bridge was removed under its VMs; ``pyvmm net up`` brings it back."""
    cidr: str | None
    host: str | None
    nat: bool
    uplink: str | None
    """The device that a translated network leaves by."""
    vms: tuple[VmState, ...]
    other_ports: tuple[str, ...]
    """Ports of the bridge that are no VM's of this network."""


def set_up(name: str, cidr: str | None = None, nat_wanted: bool | None = None) -> tuple[NetworkState, bool]:
    """Make the network, or make sure of it. ``None``: as it is, else the first free /24, not translated.

    Returns its state and whether it is new. ConfigError: another plan, bad names, addresses that are taken.
    HostError: the kernel's refusals; what was half made is gone then.
    """
    check_network_name(name)
    asked = Plan.parse(cidr) if cidr is not None else None
    with open_route() as route, networks_lock():
        links = read_links(route)
        bridge = _own_bridge(route, links, name)
        record = _record_of(bridge) if bridge is not None else None
        new = record is None
        try:
            if record is None:
                leases = [lease for link, lease in leases_in(links, name) if not is_stale(link)]
                plan = _choose(route, name, asked, leases, bridge)
                record = NetworkRecord(1, str(plan.cidr), bool(nat_wanted))
                if bridge is None:
                    bridge = make_bridge(route, bridge_name(name), mac_of(name, "host"))
                set_alias(route, bridge, write_record(record))
            else:
                _check_same(name, record, asked, nat_wanted)
            assert bridge is not None
            _complete(route, name, bridge, record)
        except (ConfigError, HostError):
            if new and bridge is not None:
                _undo(route, name)
            raise
        T.net_up.on and T.net_up(name, record.cidr, record.nat, new)
        return _state(route, read_links(route), name), new


def take_down(name: str, *, force: bool = False) -> bool:
    """Remove the network; False if there is none. ConfigError names the VMs on it, unless ``force`` takes them off."""
    check_network_name(name)
    with open_route() as route, networks_lock():
        links = read_links(route)
        bridge = next((link for link in links if link.name == bridge_name(name)), None)
        if bridge is not None and _record_of(bridge) is None:
            _own_bridge(route, links, name)  # refuses what is not ours; else it is half made
        leases = leases_in(links, name)
        if not force:
            _refuse_users(name, links, bridge, leases)
        for link, _ in leases:
            if is_stale(link):
                remove_link(route, link)
        record = _record_of(bridge) if bridge is not None else None
        # A bridge that somebody else removed may have left its translation.
        had_table = (bridge is None or (record is not None and record.nat)) and nat.take_down_if_there(name)
        if bridge is not None:
            remove_link(route, bridge)
        T.net_down.on and T.net_down(name, bridge is not None)
        return bridge is not None or had_table


def list_networks() -> list[NetworkState]:
    """All networks of this namespace, also those of which only VMs are left. Needs no privilege."""
    with open_route() as route:
        links = read_links(route)
        names = {record.network for _, record in leases_in(links)} | _bridges(links).keys()
        names |= {record.network for _, record in arrivals_in(links)}
        return [_state(route, links, name) for name in sorted(names)]


def reclaim(route: Any, links: list[Link], network: str) -> list[Link]:
    """Remove taps that dead VMs left in ``network``; the devices that are left. The lock must be held."""
    stale = {link.index for link, _ in leases_in(links, network) if is_stale(link)}
    for link in links:
        if link.index in stale:
            remove_link(route, link)
            T.net_reclaim.on and T.net_reclaim(network, link.name)
    return [link for link in links if link.index not in stale]


def find_network(links: list[Link], name: str) -> tuple[Link, NetworkRecord]:
    """The bridge of a network that is up, and its plan; ConfigError says which there are."""
    networks = _bridges(links)
    if name not in networks:
        there = f"there is {', '.join(sorted(networks))}" if networks else "none is up"
        raise ConfigError(f"--net {name}: no such network ({there}); pyvmm net up {name} makes it")
    return networks[name]


def _bridges(links: list[Link]) -> dict[str, tuple[Link, NetworkRecord]]:
    """The networks that have a bridge, by name."""
    return {
        link.name.removeprefix("pvm-"): (link, record)
        for link in links
        if link.name.startswith("pvm-") and (record := _record_of(link)) is not None
    }


def _own_bridge(route: Any, links: list[Link], name: str) -> Link | None:
    """The bridge of ``name`` if there is one; ConfigError if what has its name is not pyvmm's."""
    found = next((link for link in links if link.name == bridge_name(name)), None)
    if found is None or _record_of(found) is not None:
        return found
    # Without alias, address or port it is what a process that died between making and labelling left.
    used = found.alias or addresses(route, found) or any(link.master == found.index for link in links)
    if found.kind == "bridge" and not used:
        return found
    raise ConfigError(
        f"network {name}: there is a device {found.name} that this pyvmm did not make; remove it or take another name"
    )


def _record_of(link: Link) -> NetworkRecord | None:
    record = read_record(link.alias) if link.kind == "bridge" else None
    return record if isinstance(record, NetworkRecord) else None


def _check_same(name: str, record: NetworkRecord, asked: Plan | None, nat_wanted: bool | None) -> None:
    remedy = f"pyvmm net down {name} comes first"
    if asked is not None and asked != record.plan:
        raise ConfigError(f"network {name}: is up with {record.cidr}, not {asked.cidr}; {remedy}")
    if nat_wanted is not None and nat_wanted != record.nat:
        raise ConfigError(f"network {name}: is up {'with' if record.nat else 'without'} NAT; {remedy}")


def _choose(route: Any, name: str, asked: Plan | None, leases: list[LeaseRecord], bridge: Link | None) -> Plan:
    routed = routed_networks(route, bridge.index if bridge is not None else 0)
    if asked is None and leases:
        # Its VMs outlived the bridge, and they keep their addresses: so it is the smallest usual network with them.
        asked = next((p for p in _plans_around(leases[0]) if all(p.has(lease.ip) for lease in leases)), None)
    if asked is None:
        plan = first_free_plan(network for network, _ in routed)
        if plan is None:
            raise ConfigError(f"network {name}: no /24 of 10.91.0.0/16 is free here; choose addresses with --cidr")
        return plan
    for network, device in routed:
        if network.overlaps(asked.cidr):
            raise ConfigError(f"--cidr {asked.cidr}: this host already routes {network} ({device}); choose another")
    strangers = [f"{lease.vm} ({lease.address})" for lease in leases if not asked.has(lease.ip)]
    if strangers:
        raise ConfigError(
            f"--cidr {asked.cidr}: running VMs of {name} have other addresses: {', '.join(strangers)}; end them first"
        )
    return asked


def _plans_around(lease: LeaseRecord) -> list[Plan]:
    return [Plan(IPv4Interface(f"{lease.address}/{prefix}").network) for prefix in (24, 16, 12, 8)]


def _complete(route: Any, name: str, bridge: Link, record: NetworkRecord) -> None:
    """Everything that belongs to the network, as far as it is not there."""
    plan = record.plan
    configure_bridge(route, bridge, IPv4Interface(f"{plan.host}/{plan.cidr.prefixlen}"))
    if record.nat:
        device = default_device(route)
        if device is None:
            raise HostError("--nat: this host has no default route, so there is no way out to lead to")
        nat.set_up(name, bridge.name, plan.cidr, device)
    else:
        set_option("ipv4", bridge.name, "forwarding", False)
    links = reclaim(route, read_links(route), name)
    for link, _ in [*leases_in(links, name), *arrivals_in(links, name)]:
        if link.master == 0:
            attach(link.name, bridge.name, route, up=link.up)  # one that is down is not where its guest runs


def _undo(route: Any, name: str) -> None:
    nat.take_down_if_there(name)
    bridge = find_link(route, bridge_name(name))
    if bridge is not None:
        remove_link(route, bridge)


def _refuse_users(name: str, links: list[Link], bridge: Link | None, leases: list[tuple[Link, LeaseRecord]]) -> None:
    taps: list[tuple[Link, LeaseRecord | ArrivalRecord]] = [*leases, *arrivals_in(links, name)]
    users = {link.name: f"{record.vm} ({link.name})" for link, record in taps if not is_stale(link)}
    if bridge is not None:
        stale = {link.name for link, _ in leases if is_stale(link)}
        for link in links:
            if link.master == bridge.index and link.name not in stale:
                users.setdefault(link.name, link.name)
    if bridge is not None and users:
        raise ConfigError(f"network {name}: in use by {', '.join(users.values())}; end them, or take them off: --force")


def _state(route: Any, links: list[Link], name: str) -> NetworkState:
    bridge = next((link for link in links if link.name == bridge_name(name)), None)
    record = _record_of(bridge) if bridge is not None else None
    leases, arrivals = leases_in(links, name), arrivals_in(links, name)
    index = bridge.index if bridge is not None and record is not None else -1
    own = {link.index for link, _ in [*leases, *arrivals]}
    vms = [VmState(r.vm, link.name, r.address, r.mac, _vm_state(link, index)) for link, r in leases]
    vms += [VmState(r.vm, link.name, "", "", "waiting") for link, r in arrivals]
    return NetworkState(
        name=name,
        bridge=bridge_name(name),
        state="gone" if bridge is None or record is None else "up" if bridge.up else "down",
        cidr=record.cidr if record is not None else None,
        host=str(record.plan.host) if record is not None else None,
        nat=record is not None and record.nat,
        uplink=nat.uplink_of(name) if record is not None and record.nat else None,
        vms=tuple(vms),
        other_ports=tuple(link.name for link in links if link.master == index and link.index not in own),
    )


def _vm_state(link: Link, bridge: int) -> VmStanding:
    if is_stale(link):
        return "left over"
    if link.master != bridge:
        return "off the bridge"
    return "connected" if link.up else "moving"
