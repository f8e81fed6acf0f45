"""One virtqueue: what the driver set up, and the native walk over its ring (virtio 1.2, 2.7).

The walk itself is ``native/virtqueue.c``; here is who configures, starts, stops, saves and loads it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pyvmm.devices.state import Word
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

T = trace_group("virtio")

# 6: the feature bits that change how a ring is used
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29

QUEUE_MAX: int = lib.PV_QUEUE_MAX
"""Largest queue that is offered."""

Address = Annotated[int, Meta(ge=0)]

PROBLEMS: dict[int, str] = {
    lib.PV_QUEUE_STOPPED: "the queue is stopped",
    lib.PV_QUEUE_BAD_SIZE: f"the size is not a power of two up to {QUEUE_MAX}",
    lib.PV_QUEUE_BAD_RING: "a part of the ring is misaligned or not inside one region of RAM",
    lib.PV_QUEUE_BAD_INDEX: "the available index is ahead by more than the queue's size",
    lib.PV_QUEUE_BAD_HEAD: "a chain starts outside the descriptor table",
    lib.PV_QUEUE_BAD_NEXT: "a chain goes on outside its table",
    lib.PV_QUEUE_LOOP: "a chain is longer than its table",
    lib.PV_QUEUE_BAD_ADDRESS: "a buffer is not in RAM",
    lib.PV_QUEUE_BAD_ORDER: "a device-readable buffer behind a device-writable one",
    lib.PV_QUEUE_BAD_TABLE: "an indirect table that must not be there, is malformed or not in RAM",
    lib.PV_QUEUE_TOO_LONG: "a chain of too many bytes or segments",
}


class NeedsReset(Exception):
    """The device cannot go on until it is reset: the driver broke a rule, or the host side failed.

    Caught in ``VirtioDevice.serve`` and by the transport, where it becomes DEVICE_NEEDS_RESET (2.1.2).
    """


class QueueState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A queue as it is saved. Addresses are GPAs; the three indices count modulo 2^16."""

    size: Word
    ready: bool
    descriptors: Address
    driver_area: Address
    device_area: Address
    next_available: Word
    next_used: Word
    notified: Word


class Chain:
    """A chain of buffers that the driver made available: bytes to read, then bytes to write."""

    __slots__ = ("_queue", "native")

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.native = ffi.new("struct pv_chain *")

    @property
    def readable(self) -> int:
        """Bytes the device may read."""
        return int(self.native.readable_bytes)

    @property
    def writable(self) -> int:
        """Bytes the device may write."""
        return int(self.native.writable_bytes)

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` of the readable bytes from ``offset`` on. Allocates no more than there are."""
        size = max(0, min(size, self.readable - offset))
        data = ffi.new("uint8_t[]", size)
        count = lib.pv_chain_read(self.native, offset, data, size)
        return bytes(ffi.buffer(data, count))

    def writable_segments(self) -> list[tuple[int, int]]:
        """(HVA, bytes) of each piece the device may write, for what is done to memory other than writing to it."""
        native, first = self.native, self.native.readable
        pieces = (native.segments[first + i] for i in range(native.writable))
        return [(int(ffi.cast("uintptr_t", piece.iov_base)), int(piece.iov_len)) for piece in pieces]

    def write(self, offset: int, data: bytes) -> int:
        """Write ``data`` to the writable bytes from ``offset`` on; how many bytes there was room for."""
        return int(lib.pv_chain_write(self._queue, self.native, offset, data, len(data)))


class VirtQueue:
    """Queue ``index`` of a device. ``memory_table`` is the native table of RAM (``struct pv_vm *``), which must
    outlive the queue. The device's lock is held around every call.
    """

    def __init__(self, memory_table: Any, index: int, max_size: int, device_name: str = "") -> None:
        if not 1 <= max_size <= QUEUE_MAX or max_size & (max_size - 1):
            raise ValueError(f"queue size {max_size} is not a power of two up to {QUEUE_MAX}")
        self._memory_table = memory_table
        self._native = ffi.new("struct pv_queue *")
        self._device_name = device_name
        self.index = index
        self.max_size = max_size
        self.size = 0
        self.descriptors = 0
        self.driver_area = 0
        self.device_area = 0

    @property
    def native(self) -> Any:
        """``struct pv_queue *``, for native code that serves the queue; lives as long as this object."""
        return self._native

    @property
    def ready(self) -> bool:
        """Whether the driver has handed the ring over."""
        return bool(self._native.size)

    def start(self, features: int) -> None:
        """The driver set QueueReady (4.2.3.2) after ``features`` were negotiated.

        Raises NeedsReset if what it configured before is not usable.
        """
        if self.size > self.max_size:
            raise NeedsReset(f"queue {self.index}: the driver asked for {self.size} of {self.max_size} entries")
        result = lib.pv_queue_start(
            self._native, self._memory_table, self.size, self.descriptors, self.driver_area, self.device_area,
            bool(features & F_EVENT_IDX), bool(features & F_INDIRECT_DESC),
        )  # fmt: skip
        self._check(result)
        T.virtio_queue_start.on and T.virtio_queue_start(self._device_name, self.index, self.size)

    def stop(self) -> None:
        """Hand out nothing more; the configuration stays."""
        lib.pv_queue_stop(self._native)

    def reset(self) -> None:
        """Stop, and forget the configuration."""
        self.stop()
        self.size = self.descriptors = self.driver_area = self.device_area = 0

    def new_chain(self) -> Chain:
        """Room for a chain; one for each that is to be in flight at once."""
        return Chain(self._native)

    def pop(self, chain: Chain) -> bool:
        """Take the next available chain into ``chain``; ``False`` if there is none.

        Raises NeedsReset if the ring or the chain breaks a rule; the queue stays broken then.
        """
        result = lib.pv_queue_pop(self._native, chain.native)
        if result < 0:
            self._check(result)
        return bool(result)

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back, the first ``written`` of its writable bytes written."""
        result = lib.pv_queue_push(self._native, chain.native, written)
        if result == lib.PV_QUEUE_MISUSED:
            raise ValueError(f"queue {self.index}: a chain is given back that is not out, or {written} is too much")
        self._check(result)

    def put_back(self) -> None:
        """Undo the last :meth:`pop`, so that nothing is out: it is available again. Only if no other chain is out."""
        if self.in_flight != 1:
            raise ValueError(f"queue {self.index}: put back with {self.in_flight} chains out")
        self._native.next_avail = self._native.next_avail - 1 & 0xFFFF

    def wants_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call (2.7.7)."""
        return bool(lib.pv_queue_wants_interrupt(self._native))

    def enable_kicks(self) -> bool:
        """Ask for doorbells (2.7.10); ``True``: there is more already, for which none may come."""
        return bool(lib.pv_queue_enable_kicks(self._native))

    def disable_kicks(self) -> None:
        """Spare the driver its doorbells while the queue is served anyway."""
        lib.pv_queue_disable_kicks(self._native)

    @property
    def in_flight(self) -> int:
        """Chains that are out."""
        return int(self._native.next_avail - self._native.next_used) & 0xFFFF

    @property
    def depth(self) -> int:
        """Chains the driver made available and has not got back yet; 0 while the ring is not there."""
        native = self._native
        if not native.size:
            return 0
        return min(int(lib.pv_queue_available(native) - native.next_used) & 0xFFFF, int(native.size))

    def save(self) -> QueueState:
        """Configuration and indices. Chains must not be out: the device gives back what it has first."""
        if self.in_flight:
            raise ValueError(f"queue {self.index} is saved while {self.in_flight} chains are out")
        native = self._native
        return QueueState(
            size=self.size, ready=self.ready, descriptors=self.descriptors, driver_area=self.driver_area,
            device_area=self.device_area, next_available=native.next_avail, next_used=native.next_used,
            notified=native.notified,
        )  # fmt: skip

    def problem(self, state: QueueState) -> str | None:
        """Why ``state`` cannot be loaded here, if so."""
        if (state.descriptors | state.driver_area | state.device_area) >> 64:
            return "an address of more than 64 bits"
        if not state.ready:
            return "indices of a stopped queue" if state.next_available or state.next_used or state.notified else None
        if state.next_available != state.next_used:
            return "chains are out"
        if state.size > self.max_size:
            return f"{state.size} entries, {self.max_size} are offered"
        trial = ffi.new("struct pv_queue *")
        result = lib.pv_queue_start(
            trial, self._memory_table, state.size, state.descriptors, state.driver_area, state.device_area, 0, 0
        )
        return PROBLEMS[result] if result else None

    def load(self, state: QueueState, features: int) -> None:
        """Take over ``state``, for which :meth:`problem` found none."""
        self.reset()
        self.size, self.descriptors = state.size, state.descriptors
        self.driver_area, self.device_area = state.driver_area, state.device_area
        if state.ready:
            self.start(features)
            native = self._native
            native.next_avail, native.next_used = state.next_available, state.next_used
            native.notified = state.notified

    def _check(self, result: int) -> None:
        if result < 0:
            raise NeedsReset(f"queue {self.index}: {PROBLEMS[result]}")
