"""Slowing a guest down so that a migration can keep up: vCPUs are held for a share of every period."""

from __future__ import annotations

import threading
from collections.abc import Callable

PERIOD = 0.05
"""Seconds of one hold and one run. Short, so that connections do not notice; long against what holding costs."""


class Throttle:
    """Holds vCPUs ``percentage`` percent of the time, by calling ``hold(True)`` and ``hold(False)`` on its own thread.

    The thread exists only while the percentage is not 0, and ends with the vCPUs let go.
    """

    def __init__(self, hold: Callable[[bool], None]) -> None:
        self.percentage = 0
        self._hold = hold
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, percentage: int) -> None:
        """Hold this much from the next period on: 1 to 99."""
        if not 1 <= percentage <= 99:
            raise ValueError(f"a guest cannot be slowed down by {percentage} percent")
        self.percentage = percentage
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._main, name="migration-throttle", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Full speed again; returns when that is so."""
        thread, self._thread = self._thread, None
        self.percentage = 0
        if thread is not None:
            self._ended.set()
            thread.join(10 * PERIOD)

    def _main(self) -> None:
        while not self._ended.is_set():
            share = self.percentage / 100
            self._hold(True)
            try:
                self._ended.wait(PERIOD * share)
            finally:
                self._hold(False)
            self._ended.wait(PERIOD * (1 - share))
