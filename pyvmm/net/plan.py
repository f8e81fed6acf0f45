"""Who has which address in a network: a plan that needs no server, only arithmetic.

The host has the first address of the network, guests the ones behind it, each the lowest that is free. A guest learns
its own by Linux's ``ip=`` parameter, or is told by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from pyvmm.errors import ConfigError
from pyvmm.net.mac import default_mac, format_mac

PREFIX_MIN, PREFIX_MAX = 8, 30
"""/30 is the host and one guest."""
NAME_MAX = 11
"""Bytes of a network's name: its bridge's name is four longer, and an interface's has at most 15."""
CANDIDATES = IPv4Network("10.91.0.0/16")
"""Where networks go when nobody says where: the first /24 in it that the host does not route yet."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_network_name(name: str) -> str:
    """``name`` if a network can have it; ConfigError."""
    if len(name) > NAME_MAX or _NAME.fullmatch(name) is None:
        raise ConfigError(f"network {name!r}: a name has 1 to {NAME_MAX} letters, digits, '-', '_' or '.', and no"
                          " punctuation at its start")  # fmt: skip
    return name


@dataclass(frozen=True)
class Plan:
    """The addresses of one network."""

    cidr: IPv4Network

    @classmethod
    def parse(cls, text: str) -> Plan:
        """``A.B.C.D/N``, N from 8 to 30, of addresses that hosts can have; ConfigError."""
        address, slash, prefix = text.partition("/")
        try:
            start = IPv4Address(address)
        except ValueError:
            slash = ""
        if not slash or re.fullmatch(r"[0-9]{1,2}", prefix) is None:
            raise ConfigError(f"--cidr {text!r}: write an IPv4 network, for example 10.91.0.0/24")
        if not PREFIX_MIN <= int(prefix) <= PREFIX_MAX:
            raise ConfigError(f"--cidr {text}: the prefix must be /{PREFIX_MIN} to /{PREFIX_MAX}")
        cidr = IPv4Network((start, int(prefix)), strict=False)
        if cidr.network_address != start:
            raise ConfigError(f"--cidr {text}: is an address within a network; did you mean {cidr}?")
        for what in ("loopback", "multicast", "link_local", "reserved"):
            if getattr(cidr, f"is_{what}"):
                raise ConfigError(f"--cidr {text}: is {what.replace('_', '-')}; take one for private use, 10.x.y.0/24")
        if cidr.overlaps(IPv4Network("0.0.0.0/8")):
            raise ConfigError(f"--cidr {text}: 0.0.0.0/8 is no network to be in; take one for private use, 10.x.y.0/24")
        return cls(cidr)

    @property
    def host(self) -> IPv4Address:
        """The host's address, which is the guests' gateway."""
        return self.cidr.network_address + 1

    @property
    def guests(self) -> range:
        """The guests' addresses, as numbers: all but the network's, the host's and the broadcast address."""
        return range(int(self.host) + 1, int(self.cidr.broadcast_address))

    def lowest_free(self, taken: Iterable[IPv4Address]) -> IPv4Address | None:
        """The first guest address that nobody has; ``None``: the network is full."""
        used = {int(address) for address in taken}
        # At most one more step than there are leases, however large the network.
        found = next((number for number in self.guests if number not in used), None)
        return None if found is None else IPv4Address(found)

    def has(self, address: IPv4Address) -> bool:
        """Whether a guest may have ``address``."""
        return int(address) in self.guests

    def kernel_parameter(self, address: IPv4Address, hostname: str, device: str) -> str:
        """Linux's ``ip=``: client, server, gateway, mask, host name, device, how.

        Documentation/admin-guide/nfs/nfsroot.rst. The host is the gateway also where it leads nowhere (no NAT): that
        does no harm, and the host may be made a router later.
        """
        return f"ip={address}::{self.host}:{self.cidr.netmask}:{hostname}:{device}:off"


def first_free_plan(routed: Iterable[IPv4Network]) -> Plan | None:
    """The first /24 of ``CANDIDATES`` that overlaps none of ``routed``."""
    taken = list(routed)
    return next((Plan(c) for c in CANDIDATES.subnets(new_prefix=24) if not any(c.overlaps(t) for t in taken)), None)


def bridge_name(network: str) -> str:
    """The bridge that is ``network``."""
    return f"pvm-{network}"


def label(vm: str) -> str:
    """A VM's name in the form that aliases, host names and interface names can have: 1 to 63 ASCII characters."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", vm)[:63].strip("-.") or "vm"


def tap_name(vm: str, taken: Iterable[str]) -> str:
    """A name for the tap of ``vm`` that is not ``taken``: ``vm-NAME``, then ``vm-NAME-2``..., at most 15 bytes.

    With a prefix, so that a VM called eth0 does not pass for something else.
    """
    used = set(taken)
    number = 1
    while True:
        tail = f"-{number}" if number > 1 else ""
        name = f"vm-{label(vm)[: 12 - len(tail)]}{tail}"
        if name not in used:
            return name
        number += 1


def mac_of(network: str, vm: str, number: int = 0) -> str:
    """The same MAC address for the same VM in the same network each time; ``number`` tells VMs of one name apart."""
    return format_mac(default_mac(f"{network}\0{vm}", number))
