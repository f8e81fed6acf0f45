"""From the feed to the browsers: one state, the newest. Who is slow misses some, and nobody waits for anybody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

CLIENTS_MAX = 16
FRESH = 1.0
"""Seconds."""


class Hub:
    """Lives on the event loop. ``watch`` is told whether anybody looks."""

    def __init__(self, watch: Callable[[bool], None]) -> None:
        self._watch = watch
        self.clients = 0
        self._number = 0
        self._over = False
        self._state = b""
        self._made = 0.0
        self._changed = asyncio.Event()

    def join(self) -> bool:
        """One more looks; False: there are enough."""
        if self.clients >= CLIENTS_MAX:
            return False
        self.clients += 1
        if self.clients == 1:
            if time.monotonic() > self._made + FRESH:
                self._state = b""  # of a time when somebody looked last
            self._watch(True)
        return True

    def leave(self) -> None:
        """One looks no more."""
        self.clients -= 1
        if not self.clients:
            self._watch(False)

    def publish(self, state: bytes) -> None:
        """It is the newest."""
        self._state = state
        self._made = time.monotonic()
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def end(self) -> None:
        """There will be no more."""
        self._over = True
        self._changed.set()

    async def states(self) -> AsyncIterator[bytes]:
        """The newest, and each time there is another and this one was taken, the newest again, until the end."""
        seen = -1
        while True:
            while not self._state or self._number == seen:
                if self._over:
                    return
                await self._changed.wait()
            seen = self._number
            yield self._state
