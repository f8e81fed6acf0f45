"""A VM's place in a named network: a tap on its bridge, an address, a MAC address.

The tap is the lease. It is opened here, by the process that runs the VM, and never made persistent: when the process
ends, whatever it ends of, the kernel takes the tap away, and the address is free.

A guest that moves to another process takes its lease along. The new process waits with a tap that is a port of the
bridge but down (:func:`await_guest`): a bridge sends no frame to it and learns nothing from it. Once the source has
said which lease its guest has, that tap has the lease, too (:meth:`Lease.succeed`): it is never free in between.
As soon as the guest stands still that tap is set up and announced, so that what is sent to the guest meanwhile waits
for it there; the other one goes down, and gives the lease up (:meth:`Lease.leave`), when the guest runs. Never are both
down: a bridge without a port that is up has no carrier, and the host forgets whom it knows there and waits a second.
Whichever process is killed meanwhile, the other one has the lease, or nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from types import TracebackType
from typing import Any, Self

from pyvmm.errors import ConfigError, HostError
from pyvmm.net.bridge import attach, detach
from pyvmm.net.cards import MovingCard
from pyvmm.net.links import Link, find_link, learned_addresses, open_route, read_links, set_alias, set_option
from pyvmm.net.networks import find_network, reclaim
from pyvmm.net.plan import Plan, label, mac_of, tap_name
from pyvmm.net.records import ArrivalRecord, LeaseRecord, Record, leases_in, networks_lock, write_record
from pyvmm.net.tap import Tap
from pyvmm.trace import trace_group

T = trace_group("net")

Leases = list[tuple[Link, LeaseRecord]]


@dataclass
class Lease:
    """What a VM has for as long as this is open; a context manager. Until :meth:`succeed` without ``record``."""

    network: str
    vm: str
    bridge: str
    tap: Tap
    plan: Plan
    nat: bool
    record: LeaseRecord | None = None
    left: bool = False
    """Whether the guest has moved on, and its lease with it."""

    @property
    def address(self) -> IPv4Address:
        """The guest's."""
        assert self.record is not None
        return self.record.ip

    @property
    def mac(self) -> str:
        """The guest's."""
        assert self.record is not None
        return self.record.mac

    def succeed(self, card: MovingCard, *, mac: str | None = None) -> None:
        """The guest that comes has ``card``: have its lease, or one for it if it had none.

        ConfigError: its address or MAC address is another VM's here, or it has no business in this network, or not
        with the address ``mac`` that was asked for. Called again, it is for the guest that comes now.
        """
        where = f"--net {self.network}"
        if mac is not None and mac.lower() != card.mac:
            raise ConfigError(f"{where},mac={mac}: the guest that comes has {card.mac}; leave mac= out")
        with open_route() as route, networks_lock():
            bridge, network = find_network(read_links(route), self.network)
            links = reclaim(route, read_links(route), self.network)
            leases = [(link, lease) for link, lease in leases_in(links, self.network) if link.name != self.tap.name]
            address = card.address
            if not any(card.id and lease.id == card.id for _, lease in leases):  # it comes from another host
                taken = {bridge.mac: f"the host ({bridge.name})"} | _macs(leases)
                if card.mac in taken:
                    raise ConfigError(f"{where}: the guest that comes has {card.mac}, which {taken[card.mac]} has here")
                address = _free_address(network.plan, leases, card.address, where)
            self.plan, self.bridge = network.plan, bridge.name
            self.record = LeaseRecord(1, self.network, label(self.vm), address, card.mac, card.id or _new_id())
            self._write(route, self.record)
        T.net_succeed.on and T.net_succeed(self.network, self.tap.name, address, card.mac)

    def leave(self) -> None:
        """The guest runs elsewhere: give the lease up, keep the tap."""
        if self.record is None or self.left:
            return
        with open_route() as route, networks_lock():
            link = find_link(route, self.tap.name)
            if link is not None:  # else somebody removed it, and the lease with it
                set_alias(route, link, "")
                detach(link, route)
        self.left = True
        T.net_leave.on and T.net_leave(self.network, self.tap.name)

    def take_back(self) -> None:
        """The guest is to run here after all. HostError: it runs elsewhere, or somebody else has its lease by now."""
        if self.record is None:
            return
        with open_route() as route, networks_lock():
            for link, lease in leases_in(read_links(route), self.network):
                if link.name == self.tap.name:
                    continue
                same = lease.id == self.record.id
                if (same and link.up) or (not same and {lease.address, lease.mac} & {self.record.address, self.mac}):
                    raise HostError(f"--net {self.network}: VM {lease.vm} ({link.name}) has the guest's place there")
            if self.left:
                self._write(route, self.record)
                attach(self.tap.name, self.bridge, route, up=False)
                self.left = False

    def _write(self, route: Any, record: Record) -> None:
        set_alias(route, _must_find(route, self.tap), write_record(record))

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

    def choose(route: Any, bridge: Link, plan: Plan, leases: Leases) -> LeaseRecord:
        address = _free_address(plan, leases, "", f"--net {network}")
        return LeaseRecord(1, network, label(vm), address, _mac(route, bridge, network, vm, mac, leases), _new_id())

    lease = _enter(network, vm, mtu, choose)
    T.net_join.on and T.net_join(network, vm, lease.tap.name, str(lease.address), lease.mac)
    return lease


def await_guest(network: str, vm: str, *, mtu: int | None = None) -> Lease:
    """A tap on ``network`` for a guest that will come from elsewhere, down until then. ConfigError: no such network."""
    lease = _enter(network, vm, mtu, lambda route, bridge, plan, leases: ArrivalRecord(1, network, label(vm)))
    lease.tap.release()
    T.net_await.on and T.net_await(network, vm, lease.tap.name)
    return lease


def _enter(network: str, vm: str, mtu: int | None, choose: Callable[[Any, Link, Plan, Leases], Record]) -> Lease:
    with open_route() as route, networks_lock():
        bridge, record = find_network(read_links(route), network)
        links = reclaim(route, read_links(route), network)
        chosen = choose(route, bridge, record.plan, leases_in(links, network))
        tap = Tap(tap_name(vm, (link.name for link in links)), mtu=mtu)
        try:
            set_alias(route, _must_find(route, tap), write_record(chosen))
            set_option("ipv6", tap.name, "disable_ipv6", True)  # or the guest hears the port's own solicitations
            has_lease = isinstance(chosen, LeaseRecord)
            attach(tap.name, bridge.name, route, up=has_lease)
        except BaseException:
            tap.close()
            raise
        return Lease(
            network, vm, bridge.name, tap, record.plan, record.nat, chosen if isinstance(chosen, LeaseRecord) else None
        )


def _must_find(route: Any, tap: Tap) -> Link:
    link = find_link(route, tap.name)
    if link is None:
        raise HostError(f"tap {tap.name}: was removed as soon as it was made; somebody else removes taps here")
    return link


def _new_id() -> str:
    return os.urandom(8).hex()


def _free_address(plan: Plan, leases: Leases, wanted: str, where: str) -> str:
    """``wanted`` if nobody has it and it is in the plan; the lowest free one if it is empty."""
    if not wanted:
        address = plan.lowest_free(lease.ip for _, lease in leases)
        if address is None:
            names = ", ".join(lease.vm for _, lease in leases)
            raise ConfigError(f"{where}: {plan.cidr} has no address left ({names}); end one, or take a larger network")
        return str(address)
    if not plan.has(IPv4Address(wanted)):
        raise ConfigError(f"{where}: the guest that comes has {wanted}, which is no guest's address in {plan.cidr}")
    holder = next((lease.vm for _, lease in leases if lease.address == wanted), None)
    if holder is not None:
        raise ConfigError(f"{where}: the guest that comes has {wanted}, which VM {holder} has here")
    return wanted


def _macs(leases: Leases) -> dict[str, str]:
    return {lease.mac.lower(): f"VM {lease.vm} ({link.name})" for link, lease in leases}


def _mac(route: Any, bridge: Link, network: str, vm: str, wanted: str | None, leases: Leases) -> str:
    """``wanted`` if nobody on the bridge has it, else the first made one that nobody has."""
    taken = {mac: f"port {port}" for mac, port in learned_addresses(route, bridge).items()}
    taken[bridge.mac] = f"the host ({bridge.name})"
    taken |= _macs(leases)
    if wanted is not None:
        if wanted.lower() in taken:
            raise ConfigError(f"--net {network},mac={wanted}: {taken[wanted.lower()]} has it; choose another")
        return wanted.lower()
    number = 0
    while mac_of(network, vm, number) in taken:
        number += 1
    return mac_of(network, vm, number)
