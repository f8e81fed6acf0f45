"""The machine's main loop: file descriptors, timers and calls from other threads, all on one thread.

asyncio would do, but costs a third of the start-up budget to import and nothing here needs coroutines.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]


class Timer:
    """A call that is due later; :meth:`cancel` is harmless at any time."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callback) -> None:
        self.due = due
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Do not call after all."""
        self.callback = None


class EventLoop:
    """Made and run by one thread; only :meth:`post` and :meth:`stop` may come from others."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._posted: deque[Callback] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Re-entrant: a signal handler, too, calls post(), and may interrupt post() itself.
        self._lock = threading.RLock()
        self._stopped = False
        self._closed = False
        self.add_reader(self._wake, lambda: clear_eventfd(self._wake))

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up. KeyError: ``fd`` has a reader."""
        self._add(fd, selectors.EVENT_READ, callback)

    def remove_reader(self, fd: int) -> None:
        """Forget ``fd``'s reader; unknown ones are ignored."""
        self._remove(fd, selectors.EVENT_READ)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` is writable or hung up. KeyError: ``fd`` has a writer."""
        self._add(fd, selectors.EVENT_WRITE, callback)

    def remove_writer(self, fd: int) -> None:
        """Forget ``fd``'s writer; unknown ones are ignored."""
        self._remove(fd, selectors.EVENT_WRITE)

    def _add(self, fd: int, event: int, callback: Callback) -> None:
        key = self._selector.get_map().get(fd)
        if key is None:
            self._selector.register(fd, event, {event: callback})
        elif event in key.data:
            raise KeyError(f"descriptor {fd} is watched already")
        else:
            self._selector.modify(fd, key.events | event, {**key.data, event: callback})

    def _remove(self, fd: int, event: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            key = self._selector.get_key(fd)
            left = {other: callback for other, callback in key.data.items() if other != event}
            if not left:
                self._selector.unregister(fd)
            elif event in key.data:
                self._selector.modify(fd, key.events & ~event, left)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call ``callback`` once, in ``seconds``."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def post(self, callback: Callback) -> None:
        """From any thread: call ``callback`` in the loop's thread soon. Ignored after :meth:`close`."""
        with self._lock:
            if self._closed:
                return
            self._posted.append(callback)
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """From any thread: make :meth:`run` return."""
        self._stopped = True
        self.post(lambda: None)

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self._stopped:
            self.run_once()
        self._stopped = False

    def run_once(self, limit: float | None = None) -> None:
        """Wait for the next thing (at most ``limit`` seconds) and serve it."""
        timeout = limit
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if self._timers:
            until = max(0.0, self._timers[0][0] - time.monotonic())
            timeout = until if timeout is None else min(until, timeout)
        for key, ready in self._selector.select(timeout):
            for event, callback in key.data.items():
                # An earlier callback of this round may have removed the descriptor.
                current = self._selector.get_map().get(key.fd)
                if ready & event and current is not None and current.data.get(event) is callback:
                    callback()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback()
        for _ in range(len(self._posted)):
            self._posted.popleft()()

    def close(self) -> None:
        """Give the descriptors back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._selector.close()
        os.close(self._wake)


def clear_eventfd(fd: int) -> None:
    """Take a non-blocking eventfd's count back to zero; harmless when it is."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
