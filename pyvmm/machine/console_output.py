"""Guest output, written by a thread of its own: a slow reader stalls the guest and nothing else."""

from __future__ import annotations

import os
import threading
import time

_LIMIT = 1 << 20
FLUSH_DEADLINE = 2.0


class ConsoleOutput:
    """Writes to ``fd`` in order. A full buffer blocks writers, except the thread named in ``never_block``.

    A reader that is gone (EPIPE, EIO) ends writing quietly: the guest goes on, as with a serial cable pulled.
    """

    def __init__(self, fd: int, *, own_fd: bool = False) -> None:
        self._fd = fd
        self._own_fd = own_fd
        self._buffer = bytearray()
        self._condition = threading.Condition()
        self._closing = False
        self._lenient = False
        self._broken = False
        self._writing = False
        self.never_block: threading.Thread | None = None
        self._thread = threading.Thread(target=self._main, name="console-output", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether a write would block now."""
        return len(self._buffer) >= _LIMIT

    def __call__(self, data: bytes) -> None:
        """Queue ``data``."""
        with self._condition:
            if self._broken:
                return
            if self.full and threading.current_thread() is not self.never_block:
                self._condition.wait_for(lambda: not self.full or self._lenient or self._broken)
            self._buffer += data
            self._condition.notify_all()

    def lenient(self, on: bool) -> None:
        """While ``on`` nobody blocks: vCPUs are being parked and must come out."""
        with self._condition:
            self._lenient = on
            self._condition.notify_all()

    def flush(self, seconds: float = FLUSH_DEADLINE) -> bool:
        """Wait until all is written; whether it was within ``seconds``."""
        with self._condition:
            return self._condition.wait_for(
                lambda: self._broken or not (self._buffer or self._writing), timeout=seconds
            )

    def close(self) -> None:
        """Flush with a deadline and end the thread (a daemon: a stuck reader cannot keep the process)."""
        self.lenient(True)
        self.flush()
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
                self._writing = True
                self._condition.notify_all()
            if not self._write(piece):
                with self._condition:
                    self._broken = True
                    self._writing = False
                    self._buffer.clear()
                    self._condition.notify_all()
                return

    def _write(self, piece: bytes) -> bool:
        view = memoryview(piece)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody who shares the terminal made it non-blocking.
                time.sleep(0.01)
            except OSError:
                return False
        return True
