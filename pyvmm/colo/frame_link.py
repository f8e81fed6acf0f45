"""The connection that carries frames between the cards of two guests, both ways; net/frame_stream.py has its format.

One thread reads and writes, because a TLS connection bears no two. Who has a frame to send never waits: it is queued,
and there is a bound.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable

from pyvmm.errors import ChannelError
from pyvmm.native import lib
from pyvmm.net.frame_stream import EpochFrame, FrameDecoder

QUEUED_MAX = 32 << 20
"""Bytes. A line that is so far behind is as good as none until the next checkpoint."""
AT_ONCE = 256 << 10
READS_AT_ONCE = 16
END_DEADLINE = 5.0


class FrameLink:
    """Owns ``sock``. ``take``, and ``tick`` each ``every`` seconds, are called on its thread and must not wait;
    ``lost`` is told why the connection is of no use any more, at most once, and not after :meth:`stop`. ChannelError
    from ``take`` is such a reason, too.
    """

    def __init__(
        self,
        sock: socket.socket,
        take: Callable[[EpochFrame], None],
        lost: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
        every: float = 1.0,
    ) -> None:
        self._socket, self._take, self._lost, self._tick, self._every = sock, take, lost, tick, every
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._unsent = memoryview(b"")
        self._broken = False
        self._stopping = False
        self._lock = threading.Lock()
        self._decoder = FrameDecoder()
        self._wake, self._waker = socket.socketpair()
        for each in (sock, self._wake, self._waker):
            each.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="colo-frames", daemon=True)

    def start(self) -> None:
        """Begin to carry."""
        self._thread.start()

    @property
    def broken(self) -> bool:
        """Whether nothing gets through any more."""
        return self._broken

    def send(self, data: bytes) -> bool:
        """Queue one frame as it goes over the line; any thread. ``False``: there is no room, or no line."""
        with self._lock:
            if self._broken or self._queued + len(data) > QUEUED_MAX:
                return False
            first = not self._queue
            self._queue.append(data)
            self._queued += len(data)
        if first:
            self._ring()
        return True

    def stop(self) -> None:
        """End the thread and close the connection. Not from within a callback. May be called again."""
        if self._stopping:
            return
        self._stopping = self._broken = True
        self._ring()
        if self._thread.ident is not None:
            self._thread.join(END_DEADLINE)
        for sock in (self._socket, self._wake, self._waker):
            sock.close()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake
            self._waker.send(b"x")

    def _run(self) -> None:
        lib.pv_net_be_prompt()  # clients wait for this thread, which works for microseconds each time
        try:
            self._carry()
        except ChannelError as error:
            self._broken = True
            if not self._stopping:
                self._lost(str(error))

    def _carry(self) -> None:
        turn = time.monotonic() + self._every
        while not self._stopping:
            writing = [self._socket] if self._unsent or self._queue else []
            with contextlib.suppress(InterruptedError):
                select.select([self._socket, self._wake], writing, [], max(0.0, turn - time.monotonic()))
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
            self._read()
            self._write()
            if (now := time.monotonic()) >= turn:
                turn = now + self._every
                self._tick()

    def _read(self) -> None:
        for _ in range(READS_AT_ONCE):  # and then what is to be written has its turn
            try:
                data = self._socket.recv(AT_ONCE)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                raise ChannelError(f"the frames' connection broke: {error.strerror or error}") from None
            if not data:
                raise ChannelError("the other side closed the frames' connection")
            for each in self._decoder.feed(data):
                self._take(each)

    def _write(self) -> None:
        while self._unsent or self._next():
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                raise ChannelError(f"the frames' connection broke: {error.strerror or error}") from None

    def _next(self) -> bool:
        with self._lock:
            pieces: list[bytes] = []
            size = 0
            while self._queue and size < AT_ONCE:
                pieces.append(self._queue.popleft())
                size += len(pieces[-1])
            self._queued -= size
        self._unsent = memoryview(b"".join(pieces))
        return size > 0
