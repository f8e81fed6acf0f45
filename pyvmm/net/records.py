"""What pyvmm writes at the devices it makes, as their alias: which network a bridge is, and whose tap a tap is.

The device and what is known of it are one thing in the kernel, so they cannot disagree: when a VM dies, of whatever,
its tap goes, and with it its lease. Nothing is kept in files.

    pvm-demo   {"pyvmm":"network","version":1,"cidr":"10.91.0.0/24","nat":false}
    vm-linux   {"pyvmm":"lease","version":1,"network":"demo","vm":"linux","address":"10.91.0.2","mac":"02:..","id":".."}
    vm-next    {"pyvmm":"arrival","version":1,"network":"demo","vm":"next"}

While a VM moves between two processes two taps have its lease, with the same id; the one that is up is where it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

import msgspec

from pyvmm.errors import ConfigError, HostError
from pyvmm.net.links import Link
from pyvmm.net.plan import Plan

LOCK_DEADLINE = 10.0


class NetworkRecord(msgspec.Struct, frozen=True, tag_field="pyvmm", tag="network", forbid_unknown_fields=True):
    """Alias of a network's bridge."""

    version: Literal[1]
    cidr: str
    nat: bool

    @property
    def plan(self) -> Plan:
        """Its addresses."""
        return Plan(IPv4Network(self.cidr))


class LeaseRecord(msgspec.Struct, frozen=True, tag_field="pyvmm", tag="lease", forbid_unknown_fields=True):
    """Alias of a VM's tap."""

    version: Literal[1]
    network: str
    vm: str
    address: str
    mac: str
    id: str = ""
    """Made anew for each lease, and kept when the lease goes to another tap with its VM."""

    @property
    def ip(self) -> IPv4Address:
        """The guest's address."""
        return IPv4Address(self.address)


class ArrivalRecord(msgspec.Struct, frozen=True, tag_field="pyvmm", tag="arrival", forbid_unknown_fields=True):
    """Alias of the tap of a VM that waits for a guest from elsewhere: which lease it will have is not known yet."""

    version: Literal[1]
    network: str
    vm: str


Record = NetworkRecord | LeaseRecord | ArrivalRecord


def write_record(record: Record) -> str:
    """The alias that says it. At most 255 bytes: its parts are bounded."""
    return msgspec.json.encode(record).decode()


def read_record(alias: str) -> Record | None:
    """What an alias says; ``None``: it is not pyvmm's, or another version's, so hands off."""
    try:
        record: Record = msgspec.json.decode(alias, type=Record)
        # Only root writes aliases, but any program of root's.
        if isinstance(record, NetworkRecord):
            Plan.parse(record.cidr)
        elif isinstance(record, LeaseRecord):
            IPv4Address(record.address)
    except (msgspec.DecodeError, ConfigError, ValueError):
        return None
    return record


def leases_in(links: list[Link], network: str | None = None) -> list[tuple[Link, LeaseRecord]]:
    """The taps of VMs, of one network or of all, with what they say, in the order of addresses."""
    found = []
    for link in links:
        record = read_record(link.alias) if link.kind == "tun" else None
        if isinstance(record, LeaseRecord) and network in (None, record.network):
            found.append((link, record))
    return sorted(found, key=lambda item: (item[1].network, item[1].ip))


def arrivals_in(links: list[Link], network: str | None = None) -> list[tuple[Link, ArrivalRecord]]:
    """The taps of VMs that wait for a guest."""
    found = []
    for link in links:
        record = read_record(link.alias) if link.kind == "tun" else None
        if isinstance(record, ArrivalRecord) and network in (None, record.network):
            found.append((link, record))
    return found


def is_stale(link: Link) -> bool:
    """Whether a VM's tap was left behind: it is persistent, and no program has it open."""
    return link.persistent and not link.carrier


@contextlib.contextmanager
def networks_lock(seconds: float = LOCK_DEADLINE) -> Iterator[None]:
    """One at a time among all pyvmm processes of this network namespace. HostError after ``seconds``.

    The lock is on the namespace itself (flock of /proc/thread-self/ns/net): no file to make, to clean up or to share
    between namespaces that share /run; and it goes with the process that has it.
    """
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise HostError(
                        f"another pyvmm has been changing networks here for {seconds:g} s; see what it waits for"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)
