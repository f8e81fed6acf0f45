"""Guest output, written by a thread of its own: a slow reader stalls the guest and nothing else."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable

_LIMIT = 1 << 20
_REOPEN = _LIMIT // 2
"""Where a full buffer has room again: not at the first byte, or vCPUs would be woken for each."""
_PIECE = 4096
"""Bytes a write: a slow reader is told from one that never reads by how these get through."""
FLUSH_DEADLINE = 2.0
"""Seconds without progress after which nobody waits for a reader any more."""
_READER_GONE = frozenset({errno.EPIPE, errno.EIO, errno.ECONNRESET})


class OutputGate:
    """Back-pressure: vCPU threads wait here, between two accesses and with no lock held, while output is full.

    Waiting inside a device would hold its lock, and the main loop, which feeds input to the same device, would
    wait with it. So a write is always taken and ``full`` is what a vCPU looks at afterwards; the buffer
    overshoots by one access at most.
    """

    def __init__(self) -> None:
        self.full = False
        self.on_open: Callable[[], None] = lambda: None
        """Called, on a thread of an output's, when the last one that was full has room again."""
        self._sources: set[int] = set()
        self._condition = threading.Condition()
        self._open = False

    def set_full(self, source: object, full: bool) -> None:
        """Called by each output whenever it fills up or has room again; the gate is shut while any is full."""
        with self._condition:
            (self._sources.add if full else self._sources.discard)(id(source))
            before, self.full = self.full, bool(self._sources)
            self._condition.notify_all()
        if before and not self.full:
            self.on_open()

    def hold_open(self, on: bool) -> None:
        """While ``on`` nobody waits: vCPUs are being parked and must come out."""
        with self._condition:
            self._open = on
            self._condition.notify_all()

    def wait(self) -> None:
        """Wait for room."""
        with self._condition:
            self._condition.wait_for(lambda: not self.full or self._open)


class ConsoleOutput:
    """Writes to ``fd`` in order. Taking data never blocks; ``gate`` tells those who should slow down.

    A reader that is gone (EPIPE, EIO) ends writing quietly: the guest goes on, as with a serial cable pulled.
    Any other failure (a full disk) ends it, too, and is told by ``problem``.
    """

    def __init__(self, fd: int, gate: OutputGate, *, own_fd: bool = False) -> None:
        self._fd = fd
        self._own_fd = own_fd
        self._gate = gate
        self._buffer = bytearray()
        self._condition = threading.Condition()
        self._full = False
        self._closing = False
        self._broken = False
        self._writing = False
        self._written = 0
        self._stuck = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._main, name="console-output", daemon=True)
        self._thread.start()

    def __call__(self, data: bytes) -> None:
        """Queue ``data``."""
        with self._condition:
            if self._broken or self._closing:
                return
            self._buffer += data
            if len(self._buffer) >= _LIMIT and not self._full:
                self._set_full(True)
            self._condition.notify_all()

    def _set_full(self, full: bool) -> None:
        self._full = full
        self._gate.set_full(self, full)

    def flush(self, seconds: float = FLUSH_DEADLINE) -> bool:
        """Wait until all is written; ``False`` once nothing went out for ``seconds``."""
        with self._condition:
            while not self._idle():
                before = self._written
                if not self._condition.wait_for(lambda: self._idle() or self._written != before, seconds):  # noqa: B023
                    self._stuck = True
                    return False
            self._stuck = False
        return True

    @property
    def problem(self) -> str | None:
        """Why output is missing by now, if it is and somebody would want to know."""
        return self._failure or (None if self._idle() else "its reader does not read")

    def _idle(self) -> bool:
        return self._broken or not (self._buffer or self._writing)

    def close(self) -> None:
        """Flush with a deadline and end the thread (a daemon: a stuck reader cannot keep the process)."""
        self.flush(0.1 if self._stuck else FLUSH_DEADLINE)  # waited for once is enough
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._thread.join(0.2)
        if self._own_fd and not self._thread.is_alive():
            os.close(self._fd)

    def _main(self) -> None:
        while True:
            with self._condition:
                self._writing = False
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._buffer or self._closing)
                if not self._buffer:
                    return
                piece = bytes(self._buffer[:65536])
                del self._buffer[: len(piece)]
                if self._full and len(self._buffer) < _REOPEN:
                    self._set_full(False)
                self._writing = True
                self._condition.notify_all()
            if not self._write(piece):
                with self._condition:
                    self._broken = True
                    self._writing = False
                    self._buffer.clear()
                    self._set_full(False)
                    self._condition.notify_all()
                return

    def _write(self, piece: bytes) -> bool:
        view = memoryview(piece)
        while view:
            try:
                done = os.write(self._fd, view[:_PIECE])
            except BlockingIOError:
                # Somebody who shares the terminal made it non-blocking.
                time.sleep(0.01)
                continue
            except OSError as error:
                if error.errno not in _READER_GONE:
                    self._failure = error.strerror
                return False
            view = view[done:]
            with self._condition:
                self._written += done
                self._condition.notify_all()
        return True
