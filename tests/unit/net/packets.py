"""Frames made by hand: Ethernet, VLAN, ARP, IPv4, IPv6, TCP, UDP, ICMP; with checksums as RFC 1071 has them."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyvmm.net.filter import Frame

FIN, SYN, RST, PSH, ACK, URG, ECE = 1, 2, 4, 8, 16, 32, 64
TCP, UDP, ICMP, ICMP6, FRAGMENT = 6, 17, 1, 58, 44
NO_HEADER = bytes(12)
GUEST_MAC, PEER_MAC = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")


def internet_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_header(source: str, destination: str, protocol: int, size: int) -> bytes:
    ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    return ends + (struct.pack(">BBH", 0, protocol, size) if len(ends) == 8 else struct.pack(">II", size, protocol))


def ethernet(ethertype: int, body: bytes, vlan: Sequence[int] = (), source: bytes = GUEST_MAC) -> bytes:
    tags = b"".join(struct.pack(">HH", 0x8100, tag) for tag in vlan)
    return PEER_MAC + source + tags + struct.pack(">H", ethertype) + body


def ipv4(source: str, destination: str, protocol: int, body: bytes, *, identification: int = 7, fragment: int = 0x4000,
         ttl: int = 64, tos: int = 0, options: bytes = b"") -> bytes:  # fmt: skip
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45 + len(options) // 4, tos, 20 + len(options) + len(body), identification, fragment, ttl,
        protocol, 0, ipaddress.ip_address(source).packed, ipaddress.ip_address(destination).packed,
    ) + options  # fmt: skip
    return header[:10] + struct.pack(">H", ~internet_sum(header) & 0xFFFF) + header[12:] + body


def ipv6(source: str, destination: str, protocol: int, body: bytes, *, extensions: bytes = b"",
         first: int | None = None, hop_limit: int = 64) -> bytes:  # fmt: skip
    """``extensions`` are headers whose last names ``protocol``; ``first`` is the kind of the first of them."""
    return struct.pack(
        ">IHBB16s16s", 6 << 28, len(extensions) + len(body), protocol if first is None else first, hop_limit,
        ipaddress.ip_address(source).packed, ipaddress.ip_address(destination).packed,
    ) + extensions + body  # fmt: skip


def internet(source: str, destination: str, protocol: int, body: bytes, vlan: Sequence[int] = ()) -> bytes:
    if ":" in source:
        return ethernet(0x86DD, ipv6(source, destination, protocol, body), vlan)
    return ethernet(0x0800, ipv4(source, destination, protocol, body), vlan)


def timestamps(value: int, echo: int) -> bytes:
    return struct.pack(">BBII", 8, 10, value & 0xFFFFFFFF, echo & 0xFFFFFFFF)


def sack(*blocks: tuple[int, int]) -> bytes:
    return struct.pack(">BB", 5, 2 + 8 * len(blocks)) + b"".join(
        struct.pack(">II", a & 0xFFFFFFFF, b & 0xFFFFFFFF) for a, b in blocks
    )


@dataclass(frozen=True)
class Segment:
    """One TCP segment; ``data`` of the frame it makes has a complete checksum."""

    seq: int
    ack: int = 0
    flags: int = ACK
    payload: bytes = b""
    options: bytes = b""
    window: int = 1000
    urgent: int = 0
    source: str = "10.0.0.1"
    destination: str = "10.0.0.2"
    ports: tuple[int, int] = (80, 40000)
    vlan: tuple[int, ...] = ()

    def tcp(self) -> bytes:
        options = self.options + b"\x01" * (-len(self.options) % 4)
        header = struct.pack(
            ">HHIIHHHH", *self.ports, self.seq & 0xFFFFFFFF, self.ack & 0xFFFFFFFF,
            (5 + len(options) // 4) << 12 | self.flags, self.window, 0, self.urgent,
        )  # fmt: skip
        whole = header + options + self.payload
        total = ~internet_sum(pseudo_header(self.source, self.destination, TCP, len(whole)) + whole) & 0xFFFF
        return whole[:16] + struct.pack(">H", total) + whole[18:]

    def frame(self) -> Frame:
        return Frame(NO_HEADER, internet(self.source, self.destination, TCP, self.tcp(), self.vlan))

    def but(self, **changes: object) -> Segment:
        return replace(self, **changes)  # type: ignore[arg-type]


def udp(payload: bytes, source: str = "10.0.0.1", destination: str = "10.0.0.2", ports: tuple[int, int] = (53, 999),
        vlan: Sequence[int] = ()) -> Frame:  # fmt: skip
    whole = struct.pack(">HHHH", *ports, 8 + len(payload), 0) + payload
    total = ~internet_sum(pseudo_header(source, destination, UDP, len(whole)) + whole) & 0xFFFF or 0xFFFF
    return Frame(NO_HEADER, internet(source, destination, UDP, whole[:6] + struct.pack(">H", total) + whole[8:], vlan))


def icmp(message: bytes, source: str = "10.0.0.1", destination: str = "10.0.0.2") -> Frame:
    """``message`` with a checksum of 0, which is filled in."""
    six = ":" in source
    before = pseudo_header(source, destination, ICMP6, len(message)) if six else b""
    total = ~internet_sum(before + message) & 0xFFFF
    whole = message[:2] + struct.pack(">H", total) + message[4:]
    return Frame(NO_HEADER, internet(source, destination, ICMP6 if six else ICMP, whole))


def arp(question: str, source: str = "10.0.0.1", padding: bytes = bytes(18)) -> Frame:
    ends = ipaddress.ip_address(source).packed, ipaddress.ip_address(question).packed
    body = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, GUEST_MAC, ends[0], bytes(6), ends[1])
    return Frame(NO_HEADER, ethernet(0x0806, body + padding))
