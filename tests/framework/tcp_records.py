"""One TCP connection to an echo server that is kept as long as one likes, with every byte checked."""

from __future__ import annotations

import hashlib
import selectors
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

RECORD = 256
WINDOW = 16 * RECORD
"""Bytes on their way at most: something always is."""
NOTABLE = 0.05
_TOTAL_RETRANSMISSIONS = 100  # offset in struct tcp_info, <linux/tcp.h>
_DEADLINE = 60.0
"""Seconds without a byte after which the connection counts as dead."""


def record(number: int) -> bytes:
    """Record ``number``: it, and bytes that no other record has."""
    return number.to_bytes(8, "big") + hashlib.shake_128(b"%d" % number).digest(RECORD - 8)


@dataclass
class EchoResult:
    """What became of the connection."""

    problem: str | None = None
    records: int = 0
    """Sent, and come back."""
    resent: int = 0
    """Segments that the client's kernel had to send again: lost ones, or ones it took for that."""
    pauses: list[tuple[float, float]] = field(default_factory=list)
    """(time.monotonic() at its end, seconds) of each time for which nothing came back though something was due."""

    @property
    def longest(self) -> float:
        """Seconds."""
        return max((seconds for _, seconds in self.pauses), default=0.0)

    def longest_between(self, begin: float, end: float) -> float:
        """The longest that had to do with this span of time.monotonic()."""
        within = [seconds for at, seconds in self.pauses if at >= begin and at - seconds <= end]
        return max(within, default=0.0)


class EchoClient:
    """Sends records over ``connection``, which it owns, on a thread, from now until :meth:`finish`."""

    def __init__(self, connection: socket.socket) -> None:
        self.result = EchoResult()
        self._socket = connection
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._due: deque[bytes] = deque()
        self._unsent = b""
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._main, name="echo client")
        self._thread.start()

    def finish(self, seconds: float = _DEADLINE) -> EchoResult:
        """Wait until all that was sent has come back, then end the connection; it must end at the other side, too."""
        self._finishing.set()
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the connection hangs"
        return self.result

    def close(self) -> None:
        """In any case: end the thread. Harmless after :meth:`finish`."""
        self._finishing.set()
        self._socket.close()
        self._thread.join(_DEADLINE)

    def _main(self) -> None:
        try:
            self._run()
        except (OSError, AssertionError, ValueError) as error:
            self.result.problem = f"after {self.result.records} records: {error!r}"
        finally:
            self._socket.close()

    def _run(self) -> None:
        number = on_their_way = begun = 0
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while not (self._finishing.is_set() and not on_their_way):
                while on_their_way + RECORD <= WINDOW and not self._finishing.is_set():
                    if not on_their_way:
                        heard = time.monotonic()
                    piece = record(number)
                    number += 1
                    self._due.append(piece)
                    self._unsent += piece
                    on_their_way += RECORD
                self._send()
                if not selector.select(0.01):
                    assert time.monotonic() - heard < _DEADLINE, f"nothing came for {_DEADLINE:g} s"
                    continue
                got = self._socket.recv(65536)
                assert got, "the other side ended the connection"
                now = time.monotonic()
                if now - heard >= NOTABLE:
                    self.result.pauses.append((now, now - heard))
                heard = now
                on_their_way -= len(got)
                begun = self._check(got, begun)
        self._socket.setblocking(True)
        self._socket.settimeout(_DEADLINE)
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANSMISSIONS + 4)
        self.result.resent = int.from_bytes(info[_TOTAL_RETRANSMISSIONS:], sys.byteorder)
        self._socket.shutdown(socket.SHUT_WR)
        assert self._socket.recv(1) == b"", "more came back than was sent"

    def _send(self) -> None:
        if self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                return

    def _check(self, got: bytes, begun: int) -> int:
        """Compare; how much of the first record that is due has come."""
        while got:
            assert self._due, f"{len(got)} bytes more than were sent"
            piece = self._due[0][begun : begun + len(got)]
            assert got[: len(piece)] == piece, f"record {self.result.records}: other bytes came back"
            got = got[len(piece) :]
            begun += len(piece)
            if begun == RECORD:
                self._due.popleft()
                self.result.records += 1
                begun = 0
        return begun
