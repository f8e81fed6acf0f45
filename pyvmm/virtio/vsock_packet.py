"""Packets of the socket device and the credit they carry (virtio 1.2, 5.10.6)."""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

HEADER = struct.Struct("<QQIIIHHIII")
"""struct virtio_vsock_hdr: 44 bytes, the payload behind it."""

HOST_CID = 2
STREAM = 1  # VIRTIO_VSOCK_TYPE_STREAM

# VIRTIO_VSOCK_OP_*
REQUEST, RESPONSE, RESET, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)

# VIRTIO_VSOCK_SHUTDOWN_F_*: the sender of the packet will not receive, will not send any more
NO_RECEIVE, NO_SEND = 1, 2
NOTHING_MORE = NO_RECEIVE | NO_SEND

BUFFER = 64 << 10
"""buf_alloc of the host's side: bytes of one connection that wait for a host program to read them."""
_U32 = 0xFFFFFFFF


class Header(NamedTuple):
    """The fields as they are on the wire; of a guest's packet, none can be relied on."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    kind: int
    operation: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """From the 44 bytes."""
        return cls._make(HEADER.unpack(data))

    def encode(self) -> bytes:
        """The 44 bytes."""
        return HEADER.pack(*self)

    def refusal(self) -> bytes:
        """The packet that answers this one with RST."""
        return HEADER.pack(self.dst_cid, self.src_cid, self.dst_port, self.src_port, 0, self.kind, RESET, 0, 0, 0)


class Credit:
    """How much each side may still send (5.10.6.3). Counters are of bytes since the start, modulo 2^32."""

    __slots__ = ("forwarded", "peer_buffer", "peer_forwarded", "received", "sent", "told")

    def __init__(self) -> None:
        self.sent = 0
        """To the peer (tx_cnt)."""
        self.peer_buffer = 0
        self.peer_forwarded = 0
        self.received = 0
        """From the peer."""
        self.forwarded = 0
        """Of these, out of our buffer (fwd_cnt)."""
        self.told = 0
        """What the peer last heard of ``forwarded``."""

    def heard(self, buf_alloc: int, fwd_cnt: int) -> None:
        """What every packet of the peer says."""
        self.peer_buffer, self.peer_forwarded = buf_alloc, fwd_cnt

    @property
    def room(self) -> int:
        """Bytes that may be sent now. A peer may also shrink its buffer, or claim what was never sent: then none."""
        return max(0, self.peer_buffer - (self.sent - self.peer_forwarded & _U32))

    def send(self, size: int) -> None:
        """``size`` bytes, at most :attr:`room`, go to the peer."""
        self.sent = self.sent + size & _U32

    def covers(self, size: int) -> bool:
        """Whether the peer may send ``size`` bytes, for all it can know."""
        return size <= BUFFER - (self.received - self.told & _U32)

    def receive(self, size: int) -> None:
        """``size`` bytes came, which was :meth:`covered <covers>`."""
        self.received = self.received + size & _U32

    def forward(self, size: int) -> None:
        """``size`` received bytes have left our buffer."""
        self.forwarded = self.forwarded + size & _U32

    def tell(self) -> tuple[int, int]:
        """(buf_alloc, fwd_cnt) for a packet that goes to the peer now."""
        self.told = self.forwarded
        return BUFFER, self.forwarded

    @property
    def is_news(self) -> bool:
        """Whether the peer should hear of ``forwarded`` by a packet of its own: it knows of less than half a buffer."""
        return self.told != self.forwarded and (self.received - self.told & _U32) > BUFFER // 2
