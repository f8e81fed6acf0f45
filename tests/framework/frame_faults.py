"""A line between two processes that does something to the first frame of a kind of a migration, in either direction."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pyvmm.migration.channel import HEAD

DEADLINE = 60.0
WHATS = ("cut", "cut-after", "stall", "flip", "drop", "double", "swap")


@dataclass
class FrameFaults:
    """Listens at ``near`` for the source and connects to ``far``. A context manager.

    What happens to the first frame of ``kind`` that ``sender`` (``source``, ``destination``) sends: ``cut`` the line
    before it, or ``cut-after`` it; ``stall``: it and what follows never come; ``flip`` a bit of it; ``drop`` it,
    ``double`` it, or ``swap`` it with the next, which makes a stall of one that is answered.
    """

    near: Path
    far: Path
    sender: str = ""
    kind: int = -1
    what: str = ""
    hit: bool = False
    kinds: dict[str, list[int]] = field(default_factory=lambda: {"source": [], "destination": []})
    """Of the frames that came, by sender."""

    def __enter__(self) -> FrameFaults:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.near))
        self._listener.listen(1)
        self._listener.settimeout(DEADLINE)
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="frame-faults")]
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._cut()
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _cut(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            self._sockets += [near, far]
            far.connect(str(self.far))
            for one, other, sender in ((near, far, "source"), (far, near, "destination")):
                thread = threading.Thread(target=self._carry, args=(one, other, sender), name=f"from-{sender}")
                self._threads.append(thread)
                thread.start()

    def _carry(self, one: socket.socket, other: socket.socket, sender: str) -> None:
        kept = b""
        try:
            while True:
                head = _exactly(one, HEAD.size)
                kind, _, length, _ = HEAD.unpack(head)
                frame = head + _exactly(one, length)
                at = len(self.kinds[sender])
                self.kinds[sender].append(kind)
                what = self.what if (sender, kind) == (self.sender, self.kind) and not self.hit else ""
                self.hit = self.hit or bool(what)
                if what == "cut":
                    return
                if what == "stall":
                    while one.recv(1 << 16):
                        time.sleep(0)
                    return
                if what == "swap":
                    kept = frame
                    continue
                if what == "flip":
                    bit = (at * 7919 + len(frame) // 2) % len(frame)
                    frame = frame[:bit] + bytes([frame[bit] ^ 1 << at % 8]) + frame[bit + 1 :]
                if what != "drop":
                    other.sendall(frame * (2 if what == "double" else 1) + kept)
                    kept = b""
                if what == "cut-after":
                    return
        except OSError:
            pass
        finally:
            self._cut()


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        piece = sock.recv(size - len(parts))
        if not piece:
            raise OSError("the end")
        parts += piece
    return parts
