"""The chain of filters that frames pass between a guest's card and its backend.

::

    guest   -- TX -->  filters[0]  filters[1]  ...  -- TX -->  backend
            <-- RX --                               <-- RX --

Directions are the guest's: TX is what it sends, RX what it is to receive (QEMU's filters count from the netdev: its
``queue=rx`` is TX here). A filter passes a frame on, changed or not, drops it, or keeps it and injects it later, from
whatever thread; an injected frame goes on behind the filter it came from.

While a chain is empty frames do not come to Python at all. With a filter in it each one does, on the device's thread:
``virtio/net_filtering.py`` moves them. Filters run under the chain's lock, one frame at a time, and must not block. A
filter in native code would take the frame's segments in ``native/net_pump.c`` instead, which says where; the chain
would then count only filters without such code.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable

import msgspec

from pyvmm.trace import trace_group

T = trace_group("net")


class Direction(enum.Enum):
    """Which way a frame goes; what a filter wants to see."""

    TX = "tx"
    RX = "rx"
    ALL = "all"


class Frame(msgspec.Struct, frozen=True):
    """``data`` from the destination's address on; ``header``: ``struct virtio_net_hdr``, 12 bytes (virtio 1.2, 5.1.6).

    With VIRTIO_NET_HDR_F_NEEDS_CSUM in the header, or a gso_type, checksums in ``data`` are not complete.
    """

    header: bytes
    data: bytes


Injection = Callable[[Direction, Frame], None]


class Filter:
    """Base of all filters. ``direction`` says which frames it is shown."""

    def __init__(self, name: str, direction: Direction = Direction.ALL) -> None:
        self.name = name
        self.direction = direction
        self.inject: Injection = _nowhere
        """Once attached: send a frame on its way (TX or RX) behind this filter; any thread, never waits."""

    def handle(self, direction: Direction, frame: Frame) -> Frame | None:
        """What is to go on in place of ``frame``; ``None``: nothing, or not now."""
        raise NotImplementedError(f"handle is not implemented for {type(self).__name__}")

    def release(self) -> list[tuple[Direction, Frame]]:
        """The filter is being removed: what it still holds, oldest first. These frames go on without it."""
        return []


def _nowhere(direction: Direction, frame: Frame) -> None:
    raise ValueError("the filter is in no chain")


class FilterChain:
    """The filters of one device, from the guest's side to the backend's; and what came out at either end.

    ``changed`` is called, from any thread and without a wait, when the device should look at the chain: a filter came
    or went, a frame was injected. ``lock`` covers the list, the filters' work and both outputs.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.filters: list[Filter] = []
        self.to_guest: deque[Frame] = deque()
        """RX frames that have passed all filters."""
        self.to_backend: deque[Frame] = deque()
        """TX frames that have."""
        self._injected: deque[tuple[Filter, Direction, Frame]] = deque()
        self._changed = changed

    @property
    def idle(self) -> bool:
        """Nothing to do: no filter, no frame in it."""
        return not (self.filters or self._injected or self.to_guest or self.to_backend)

    def add(self, new: Filter, position: int | None = None) -> None:
        """Put ``new`` at ``position`` counted from the guest; at the backend's end unless given."""
        with self.lock:
            if new in self.filters:
                raise ValueError(f"filter {new.name} is in the chain already")
            self.filters.insert(len(self.filters) if position is None else position, new)
            new.inject = lambda direction, frame: self._inject(new, direction, frame)
            T.filter_add.on and T.filter_add(new.name, new.direction.value, len(self.filters))
            self._changed()

    def remove(self, old: Filter) -> None:
        """Take ``old`` out; what it holds goes on. Nothing is lost and nothing overtaken."""
        with self.lock:
            self.settle()
            for direction, frame in old.release():
                self._go_on(old, direction, frame)
            self.settle()  # what it injected while it was at it
            self.filters.remove(old)
            old.inject = _nowhere
            T.filter_remove.on and T.filter_remove(old.name, len(self.filters))
            self._changed()

    def _inject(self, source: Filter, direction: Direction, frame: Frame) -> None:
        if direction is Direction.ALL:
            raise ValueError("a frame goes one way")
        self._injected.append((source, direction, frame))
        self._changed()

    def emit(self, frame: Frame) -> None:
        """Send a frame of the host's own to the backend, behind all filters. Any thread, never waits."""
        with self.lock:
            self.to_backend.append(frame)
        self._changed()

    def settle(self) -> None:
        """Send injected frames on; the lock is held."""
        while self._injected:
            source, direction, frame = self._injected.popleft()
            if source in self.filters:  # else it went on injecting while it was removed: there is no place for that
                self._go_on(source, direction, frame)

    def forget(self) -> None:
        """Drop all frames on their way, at either end too: they were of a guest's life that is undone."""
        with self.lock:
            self._injected.clear()
            self.to_guest.clear()
            self.to_backend.clear()

    @property
    def waiting(self) -> int:
        """Frames for the guest that it has no room for yet, those about to enter included."""
        return len(self._injected) + len(self.to_guest)

    def enter(self, direction: Direction, frame: Frame) -> None:
        """Send a frame through from its end of the chain; the lock is held."""
        self._pass(direction, frame, self.filters if direction is Direction.TX else self.filters[::-1])

    def _go_on(self, source: Filter, direction: Direction, frame: Frame) -> None:
        at = self.filters.index(source)
        self._pass(direction, frame, self.filters[at + 1 :] if direction is Direction.TX else self.filters[:at][::-1])

    def _pass(self, direction: Direction, frame: Frame, filters: list[Filter]) -> None:
        for each in filters:
            if each.direction in (direction, Direction.ALL):
                result = each.handle(direction, frame)
                if result is None:
                    return
                frame = result
        (self.to_backend if direction is Direction.TX else self.to_guest).append(frame)
