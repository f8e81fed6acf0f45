"""The network device's feature bits (virtio 1.2, 5.1.3), and which of them need which (5.1.3.1)."""

from __future__ import annotations

from pyvmm.net.tap import OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6

F_CSUM, F_GUEST_CSUM, F_CTRL_GUEST_OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6 = 1 << 7, 1 << 8
F_HOST_TSO4, F_HOST_TSO6 = 1 << 11, 1 << 12
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX = 1 << 15, 1 << 16, 1 << 17, 1 << 18
F_GUEST_ANNOUNCE, F_CTRL_MAC_ADDR = 1 << 21, 1 << 23

PLAIN = F_MAC | F_STATUS | F_MRG_RXBUF | F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR | F_GUEST_ANNOUNCE
"""Offered over any backend."""
GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6
"""What the driver copes with; it may turn them off and on with CTRL_GUEST_OFFLOADS."""
OFFLOADS = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | GUEST_OFFLOADS | F_CTRL_GUEST_OFFLOADS
"""Offered besides over a backend that carries their header."""

_NEEDS = {
    F_GUEST_TSO4: F_GUEST_CSUM, F_GUEST_TSO6: F_GUEST_CSUM,
    F_HOST_TSO4: F_CSUM, F_HOST_TSO6: F_CSUM,
    F_CTRL_RX: F_CTRL_VQ, F_GUEST_ANNOUNCE: F_CTRL_VQ, F_CTRL_MAC_ADDR: F_CTRL_VQ, F_CTRL_GUEST_OFFLOADS: F_CTRL_VQ,
}  # fmt: skip


def consistent(features: int) -> bool:
    """Whether every feature has the one it needs."""
    return all(features & needed or not features & feature for feature, needed in _NEEDS.items())


def tap_offloads(features: int) -> int:
    """``tap.OFFLOAD_*`` for those of ``GUEST_OFFLOADS`` that are in force."""
    pairs = ((F_GUEST_CSUM, OFFLOAD_CSUM), (F_GUEST_TSO4, OFFLOAD_TSO4), (F_GUEST_TSO6, OFFLOAD_TSO6))
    flags = sum(offload for feature, offload in pairs if features & feature)
    return flags if flags & OFFLOAD_CSUM else 0  # segments have no checksums of their own
