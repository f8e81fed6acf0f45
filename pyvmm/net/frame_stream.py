"""Frames on the connection between two proxies, each with its epoch.

::

    u32 size of what follows | u8 card | u8 direction: 0 to the guest, 1 from it | u64 epoch | virtio_net_hdr | frame

All big-endian but the header, which goes along as it is: offloads pass from one side to the other. Epochs
never go back on a connection.
"""

from __future__ import annotations

import struct

import msgspec

from pyvmm.errors import ChannelError
from pyvmm.native import lib
from pyvmm.net.filter import Direction, Frame

_HEAD = struct.Struct(">IBBQ")
_SIZE = struct.Struct(">I")
_AHEAD = _HEAD.size - _SIZE.size
_DIRECTIONS = (Direction.RX, Direction.TX)
NET_HEADER: int = lib.PV_NET_HEADER
LARGEST: int = _AHEAD + lib.PV_NET_UNIT


class EpochFrame(msgspec.Struct, frozen=True):
    """``card`` counts from 0, in the machine's order."""

    card: int
    direction: Direction
    epoch: int
    frame: Frame


def encode(direction: Direction, epoch: int, frame: Frame, card: int = 0) -> bytes:
    """One frame for the other side."""
    size = _AHEAD + len(frame.header) + len(frame.data)
    return _HEAD.pack(size, card, _DIRECTIONS.index(direction), epoch) + frame.header + frame.data


class FrameDecoder:
    """What comes from the other side, in whatever pieces. It holds one incomplete frame at most."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._epoch = 0

    def feed(self, data: bytes) -> list[EpochFrame]:
        """The frames that are complete now. ChannelError: a length, direction or epoch that cannot be."""
        self._buffer += data
        found, at = [], 0
        while len(self._buffer) - at >= _SIZE.size:
            (size,) = _SIZE.unpack_from(self._buffer, at)
            if not _AHEAD + NET_HEADER + lib.PV_NET_FRAME_MIN <= size <= LARGEST:
                raise ChannelError(f"the other side's proxy sent a frame of {size} bytes")
            if len(self._buffer) - at < _SIZE.size + size:
                break
            found.append(self._decode(at))
            at += _SIZE.size + size
        del self._buffer[:at]
        return found

    def _decode(self, at: int) -> EpochFrame:
        size, card, direction, epoch = _HEAD.unpack_from(self._buffer, at)
        if direction >= len(_DIRECTIONS) or epoch < self._epoch:
            raise ChannelError(f"the other side's proxy sent a frame of direction {direction} and epoch {epoch}")
        self._epoch = epoch
        body = bytes(self._buffer[at + _HEAD.size : at + _SIZE.size + size])
        return EpochFrame(card, _DIRECTIONS[direction], epoch, Frame(body[:NET_HEADER], body[NET_HEADER:]))
