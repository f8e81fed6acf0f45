"""Ethernet addresses of guests."""

from __future__ import annotations

import hashlib


def default_mac(machine: str, index: int = 0) -> bytes:
    """The address of card ``index`` of the machine of that name: the same at each start and on every host.

    Locally administered (the 2 in 0x52), so no manufacturer's; with 40 bits of the name's hash clashes are unlikely.
    """
    return b"\x52" + hashlib.sha256(f"{machine}\0{index}".encode()).digest()[:5]


def parse_mac(text: str) -> bytes:
    """Six bytes of ``52:54:00:12:34:56``, whose form has been checked."""
    return bytes.fromhex(text.replace(":", ""))


def format_mac(mac: bytes) -> str:
    """As people write it."""
    return mac.hex(":")
