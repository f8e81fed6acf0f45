"""Names of flows and kinds of packets that the proxy's native part tells of."""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

from pyvmm.native import ffi, lib

PACKET_CLASSES: tuple[str, ...] = ("tcp", "udp", "icmp", "arp", "fragment", "ip", "other")
"""By ``enum pv_packet_class``. ``fragment``: of either IP version; ``ip``: other protocols above it; ``other``: other
ethertypes, and what cannot be understood."""


class Flow(msgspec.Struct, frozen=True):
    """Who talks with whom. ``guest`` and ``peer`` are addresses, empty without IP; ports are 0 where there are none."""

    kind: str
    guest: str
    peer: str
    guest_port: int
    peer_port: int
    vlan: tuple[int, ...] = ()

    def __str__(self) -> str:
        tags = "".join(f" vlan {each}" for each in self.vlan)
        if not self.guest:
            return self.kind + tags
        ends = [
            f"[{address}]:{port}" if ":" in address and port else f"{address}:{port}" if port else address
            for address, port in ((self.guest, self.guest_port), (self.peer, self.peer_port))
        ]
        return f"{self.kind} {ends[0]} - {ends[1]}{tags}"


def flow_of(key: Any) -> Flow:
    """From ``struct pv_flow_key``."""
    size = {4: 4, 6: 16}.get(key.family, 0)
    guest, peer = (bytes(ffi.buffer(each, 16))[:size] for each in (key.guest, key.peer))
    return Flow(
        PACKET_CLASSES[getattr(key, "class")],
        str(ipaddress.ip_address(guest)) if size else "",
        str(ipaddress.ip_address(peer)) if size else "",
        key.guest_port,
        key.peer_port,
        tuple(tag & 0xFFF for tag in key.vlan if tag),
    )


assert len(PACKET_CLASSES) == lib.PV_PACKET_CLASSES
