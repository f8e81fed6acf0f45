"""Moves a network device's frames through its chain of filters, on the device's thread. See net/filter.py."""

from __future__ import annotations

from typing import Any

from pyvmm.native import ffi, lib
from pyvmm.net.filter import Direction, FilterChain, Frame

HEADER: int = lib.PV_NET_HEADER
BATCH = 64
"""Frames moved each way before the caller looks at doorbells again."""

_DONE, _NOTHING, _WAIT, _GONE = lib.PV_NET_DONE, lib.PV_NET_NOTHING, lib.PV_NET_WAIT, lib.PV_NET_GONE


class FilteredPath:
    """``native`` is ``struct pv_net *``. A frame that the far side cannot take yet waits at its end of the chain, and
    the near side is not asked for more.
    """

    def __init__(self, native: Any, chain: FilterChain) -> None:
        self._native = native
        self._chain = chain
        self._unit = ffi.new("uint8_t[]", lib.PV_NET_UNIT)
        self._size = ffi.new("uint32_t *")
        self._bytes = ffi.buffer(self._unit)

    def chain_changed(self) -> None:
        """Whatever happened to the chain: look at it on the device's thread. Any thread."""
        if not self._chain.idle:
            lib.pv_net_set_filtered(self._native, 1)
        lib.pv_net_poke(self._native)

    def move(self) -> int:
        """One batch each way: 0, or PV_NET_BROKEN as from ``pv_net_run``."""
        chain = self._chain
        with chain.lock:
            for _ in range(BATCH):
                chain.settle()
                moved = [self._backend_to_guest(), self._guest_to_backend()]
                if min(moved) < 0:
                    return int(lib.PV_NET_BROKEN)
                if _GONE in moved or _DONE not in moved:
                    break
            if chain.idle:
                lib.pv_net_set_filtered(self._native, 0)
        return 0

    def _backend_to_guest(self) -> int:
        queue = self._chain.to_guest
        result: int = _DONE
        while queue and result == _DONE:
            result = self._push(lib.pv_net_push_guest, queue[0])
            if result == _DONE:
                queue.popleft()
        return result if result != _DONE else self._pull(lib.pv_net_pull_backend, Direction.RX)

    def _guest_to_backend(self) -> int:
        queue = self._chain.to_backend
        result: int = _DONE
        while queue and result == _DONE:
            result = self._push(lib.pv_net_push_backend, queue[0])
            if result == _DONE:
                queue.popleft()
        return result if result != _DONE else self._pull(lib.pv_net_pull_guest, Direction.TX)

    def _push(self, function: Any, frame: Frame) -> int:
        unit = frame.header + frame.data
        return int(function(self._native, unit, len(unit)))

    def _pull(self, function: Any, direction: Direction) -> int:
        result = int(function(self._native, self._unit, self._size))
        if result == _DONE:
            size = self._size[0]
            self._chain.enter(direction, Frame(self._bytes[:HEADER], self._bytes[HEADER:size]))
        return result
