"""What tells switches where a guest is now: a frame with its address as the source, to everybody.

It asks "what is the protocol address of this hardware address?" (RARP, RFC 903), which nobody answers any more, and
which needs no knowledge of what the guest speaks.
"""

from __future__ import annotations

import struct

_EVERYBODY = b"\xff" * 6
_ETHERTYPE_RARP = 0x8035
_ETHERNET, _IPV4 = 1, 0x0800
_REQUEST_REVERSE = 3
_SIZE = 60
"""The least that an Ethernet frame has without its FCS."""
_NO_ADDRESS = bytes(4)


def self_announcement(mac: bytes) -> bytes:
    """The frame, 60 bytes, of the card with the address ``mac`` (6 bytes)."""
    request = struct.pack(">HHBBH", _ETHERNET, _IPV4, len(mac), len(_NO_ADDRESS), _REQUEST_REVERSE)
    body = request + mac + _NO_ADDRESS + mac + _NO_ADDRESS
    return (_EVERYBODY + mac + struct.pack(">H", _ETHERTYPE_RARP) + body).ljust(_SIZE, b"\0")
