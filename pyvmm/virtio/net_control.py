"""The network device's control queue (virtio 1.2, 5.1.6.5): what a command is, and whether it makes sense."""

from __future__ import annotations

import struct
from typing import Protocol

from pyvmm.virtio import net_features as features

OK, ERROR = 0, 1  # VIRTIO_NET_OK, VIRTIO_NET_ERR
COMMAND_MAX = 64 << 10
"""Bytes of a command that are read; the longest there is are two tables of MAC addresses."""

_RX, _MAC, _ANNOUNCE, _GUEST_OFFLOADS = 0, 1, 3, 5
_RX_PROMISC, _RX_ALLMULTI = 0, 1
_MAC_TABLE_SET, _MAC_ADDR_SET = 0, 1
_ANNOUNCE_ACK = 0
_GUEST_OFFLOADS_SET = 0


class Controlled(Protocol):
    """What commands change."""

    def may(self, feature: int) -> bool:
        """Whether ``feature`` was negotiated."""

    def set_mac(self, mac: bytes) -> None:
        """CTRL_MAC_ADDR_SET."""

    def announced(self) -> None:
        """The driver has sent what ANNOUNCE asked for."""

    def set_guest_offloads(self, wanted: int) -> bool:
        """``False``: some of these bits were not negotiated."""


def carry_out(device: Controlled, command: bytes) -> int:
    """``OK`` or ``ERROR``, the answer to ``command``: class, command and its data. Hostile."""
    if len(command) < 2:
        return ERROR
    kind, number, data = command[0], command[1], command[2:]
    return OK if _carry_out(device, kind, number, data) else ERROR


def _carry_out(device: Controlled, kind: int, number: int, data: bytes) -> bool:
    if kind == _RX and device.may(features.F_CTRL_RX):
        # 5.1.6.5.1. Every frame of the backend is passed on in any case, which the device is free to do.
        return number in (_RX_PROMISC, _RX_ALLMULTI) and len(data) == 1
    if kind == _MAC and number == _MAC_TABLE_SET and device.may(features.F_CTRL_RX):
        return _is_mac_tables(data)
    if kind == _MAC and number == _MAC_ADDR_SET and device.may(features.F_CTRL_MAC_ADDR):
        if len(data) != 6 or data[0] & 1:  # a group's address is no station's
            return False
        device.set_mac(data)
        return True
    if kind == _ANNOUNCE and number == _ANNOUNCE_ACK and device.may(features.F_GUEST_ANNOUNCE):
        device.announced()
        return True
    if kind == _GUEST_OFFLOADS and number == _GUEST_OFFLOADS_SET and device.may(features.F_CTRL_GUEST_OFFLOADS):
        return len(data) == 8 and device.set_guest_offloads(int.from_bytes(data, "little"))
    return False


def _is_mac_tables(data: bytes) -> bool:
    """Unicast and multicast addresses, each table led by its number of entries (5.1.6.5.2)."""
    at = 0
    for _ in range(2):
        if len(data) < at + 4:
            return False
        at += 4 + 6 * struct.unpack_from("<I", data, at)[0]
    return at == len(data)
