"""ICMP echo from this process: the host side of a network test, without the program ``ping``."""

from __future__ import annotations

import os
import socket
import struct
import time

ECHO_REPLY, ECHO = 0, 8  # RFC 792


def ping(address: str, seconds: float, payload: bytes = b"pyvmm") -> float | None:
    """Send an echo request each second until one is answered; how long that one took, or ``None`` in time.

    In the network namespace of the calling thread; needs CAP_NET_RAW.
    """
    identity = os.getpid() & 0xFFFF
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        sequence = 0
        while time.monotonic() < deadline:
            sequence += 1
            sent = time.monotonic()
            raw.sendto(_echo(identity, sequence, payload), (address, 0))
            while (left := sent + 1 - time.monotonic()) > 0:
                raw.settimeout(left)
                try:
                    packet, (source, _) = raw.recvfrom(65536)
                except TimeoutError:
                    break
                message = packet[(packet[0] & 15) * 4 :]  # behind the IP header
                kind, _, _, theirs, number = struct.unpack_from("!BBHHH", message)
                if (source, kind, theirs, number, message[8:]) == (address, ECHO_REPLY, identity, sequence, payload):
                    return time.monotonic() - sent
    return None


def _echo(identity: int, sequence: int, payload: bytes) -> bytes:
    header = struct.pack("!BBHHH", ECHO, 0, 0, identity, sequence)
    words = header + payload + bytes(len(payload) & 1)
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBHHH", ECHO, 0, ~total & 0xFFFF, identity, sequence) + payload
