"""What a network card's other end must be able to do, whichever it is."""

from __future__ import annotations

from typing import Protocol


class Backend(Protocol):
    """One end of a link, with a non-blocking descriptor that frames are written to and read from."""

    @property
    def name(self) -> str:
        """For messages: the tap's name, the socket's address."""

    @property
    def fd(self) -> int:
        """Owned by the backend; -1 once it is closed."""

    @property
    def carries_header(self) -> bool:
        """``True``: a frame a read, led by ``struct virtio_net_hdr``, so offloads can be passed on (a tap).
        ``False``: a stream of big-endian u32 lengths, each followed by a bare frame.
        """

    @property
    def mtu(self) -> int | None:
        """Bytes of a frame behind its Ethernet header, if there is a limit that the driver should know."""

    def set_offload(self, flags: int) -> None:
        """What the driver copes with (``tap.OFFLOAD_*``). HostError if the backend is gone."""

    def release(self) -> None:
        """Carry no frames: the guest runs elsewhere, or has not come yet. HostError."""

    def claim(self) -> None:
        """Carry them: the guest is here. HostError if the backend is gone."""

    def announce(self, frame: bytes) -> None:
        """Send ``frame``, if the other end wants to know where a guest is, while nobody else sends."""

    def close(self) -> None:
        """Give the descriptor back. Harmless twice."""
