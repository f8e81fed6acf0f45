"""One browser's connection, bounded: how many there are, how long a request may take, how long an answer may wait."""

from __future__ import annotations

import asyncio
import socket
import struct

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS_MAX = 64
REQUEST_DEADLINE = 10.0
"""Seconds for a whole request, and for a connection that asks nothing."""
SLOW_DEADLINE = 5.0
"""Seconds for a browser to take what waits for it."""
HEAD_MAX = 16 << 10
WAITING_MAX = 16 << 10
"""Bytes that wait here beside those in the kernel before the next ones are made."""
_KERNEL_WAITING = 64 << 10


class BoundedConnection(H11Protocol):
    """uvicorn's protocol, with the limits that it leaves to a proxy in front of it."""

    _watchdog: asyncio.TimerHandle | None = None
    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A browser has come."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            transport.abort()
            return
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _KERNEL_WAITING)
        transport.set_write_buffer_limits(high=WAITING_MAX)
        self._watchdog = self.loop.call_later(REQUEST_DEADLINE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        for timer in (self._watchdog, self._slow):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Too much waits for it."""
        super().pause_writing()
        self._slow = self.loop.call_later(SLOW_DEADLINE, self._drop)

    def resume_writing(self) -> None:
        """It took some."""
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        super().resume_writing()

    def _look(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if not answering:
            self._drop()
            return
        self._watchdog = self.loop.call_later(REQUEST_DEADLINE, self._look)

    def _drop(self) -> None:
        """At once: what the kernel still has for it is thrown away, too."""
        link = self.transport.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
