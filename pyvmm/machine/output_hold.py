"""Output that may have to wait: a guest that is protected must not be heard before its state is safe elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

Mode = Literal["pass", "hold", "discard"]


class OutputHold:
    """Between a guest and where its output goes. Any thread may call any of it; ``out`` is called in order.

    ``pass``: at once. ``hold``: kept, until it is released up to the last mark, or all of it is passed on. ``discard``:
    another process says the same.
    """

    def __init__(self, out: Callable[[bytes], None]) -> None:
        self.mode: Mode = "pass"
        self._out = out
        self._held = bytearray()
        self._marked = 0
        self._condition = threading.Condition()

    def put(self, data: bytes) -> None:
        """What the guest sends."""
        if self.mode == "pass":  # as good as always; a change of mode stands between two writes of the guest's
            self._out(data)
            return
        with self._condition:
            now: Mode = self.mode
            if now == "hold":
                self._held += data
                return
            if now == "discard":
                return
        self._out(data)

    def set(self, mode: Mode) -> None:
        """From now on. ``pass`` lets out what was held, ``discard`` throws it away."""
        with self._condition:
            if mode == "pass":
                self._let_out(len(self._held))
            elif mode == "discard":
                self._held.clear()
            self._marked = min(self._marked, len(self._held))
            self.mode = mode
            self._condition.notify_all()

    def mark(self) -> None:
        """What is held by now belongs to the epoch that ends; what comes, to the next."""
        with self._condition:
            self._marked = len(self._held)

    def release(self) -> None:
        """Let out what is before the mark."""
        with self._condition:
            self._let_out(self._marked)

    @property
    def held(self) -> int:
        """Bytes that wait."""
        return len(self._held)

    def wait_empty(self, seconds: float) -> bool:
        """Wait until nothing is held; did it come to that?"""
        with self._condition:
            return self._condition.wait_for(lambda: not self._held, seconds)

    def _let_out(self, size: int) -> None:
        if size:
            out = bytes(self._held[:size])
            del self._held[:size]
            self._marked = max(0, self._marked - size)
            self._out(out)
            self._condition.notify_all()
