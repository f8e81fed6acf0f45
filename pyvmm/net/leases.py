"""A VM's place in a named network: a tap on its bridge, an address, a MAC address.

The tap is the lease. It is opened here, by the process that runs the VM, and never made persistent: when the process
ends, whatever it ends of, the kernel takes the tap away, and the address is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from types import TracebackType
from typing import Any, Self

from pyvmm.errors import ConfigError, HostError
from pyvmm.net.bridge import attach
from pyvmm.net.links import Link, find_link, learned_addresses, open_route, read_links, set_alias, set_option
from pyvmm.net.networks import find_network, reclaim
from pyvmm.net.plan import Plan, label, mac_of, tap_name
from pyvmm.net.records import LeaseRecord, leases_in, networks_lock, write_record
from pyvmm.net.tap import Tap
from pyvmm.trace import trace_group

T = trace_group("net")


@dataclass
class Lease:
    """What a VM has for as long as this is open; a context manager."""

    network: str
    bridge: str
    tap: Tap
    plan: Plan
    address: IPv4Address
    mac: str
    nat: bool

    def close(self) -> None:
        """Give it back. Harmless twice."""
        self.tap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def join(network: str, vm: str, *, mac: str | None = None, mtu: int | None = None) -> Lease:
    """A place in ``network`` for ``vm``. ConfigError: no such network, it is full, the MAC address is taken.

    Two VMs that start at once take turns (networks_lock), so no address is given out twice.
    """
    with open_route() as route, networks_lock():
        bridge, record = find_network(read_links(route), network)
        links = reclaim(route, read_links(route), network)
        leases = leases_in(links, network)
        address = record.plan.lowest_free(lease.ip for _, lease in leases)
        if address is None:
            names = ", ".join(lease.vm for _, lease in leases)
            raise ConfigError(f"--net {network}: {record.cidr} has no address left ({names}); end one, or take a"
                              " larger network")  # fmt: skip
        chosen = _mac(route, bridge, network, vm, mac, leases)
        tap = Tap(tap_name(vm, (link.name for link in links)), mtu=mtu)
        try:
            link = find_link(route, tap.name)
            if link is None:
                raise HostError(f"tap {tap.name}: was removed as soon as it was made; somebody else removes taps here")
            set_alias(route, link, write_record(LeaseRecord(1, network, label(vm), str(address), chosen)))
            set_option("ipv6", tap.name, "disable_ipv6", True)  # or the guest hears the port's own solicitations
            attach(tap.name, bridge.name, route)
        except BaseException:
            tap.close()
            raise
        T.net_join.on and T.net_join(network, vm, tap.name, str(address), chosen)
        return Lease(network, bridge.name, tap, record.plan, address, chosen, record.nat)


def _mac(
    route: Any, bridge: Link, network: str, vm: str, wanted: str | None, leases: list[tuple[Link, LeaseRecord]]
) -> str:
    """``wanted`` if nobody on the bridge has it, else the first made one that nobody has."""
    taken = {mac: f"port {port}" for mac, port in learned_addresses(route, bridge).items()}
    taken[bridge.mac] = f"the host ({bridge.name})"
    taken |= {lease.mac.lower(): f"VM {lease.vm} ({link.name})" for link, lease in leases}
    if wanted is not None:
        if wanted.lower() in taken:
            raise ConfigError(f"--net {network},mac={wanted}: {taken[wanted.lower()]} has it; choose another")
        return wanted.lower()
    number = 0
    while mac_of(network, vm, number) in taken:
        number += 1
    return mac_of(network, vm, number)
