"""Is the other side alive? Each side says so every ``interval`` on a connection of its own, whatever else it does.

One beat, big-endian: u32 magic, u32 zero, u64 term, u64 count from 0. A side that has heard nothing for ``interval *
loss`` seconds, or whose connection broke, tells its owner *once*. That proves nothing (the line may be cut, the other
side stopped): it starts a claim at the arbiter, which decides.

Who was asleep itself (a stopped process, a host that had no time) judges nobody: what came meanwhile is read first, and
a turn that came late counts as one interval.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.errors import ConfigError
from pyvmm.native import lib
from pyvmm.trace import trace_group

T = trace_group("colo")

BEAT = struct.Struct(">IIQQ")
MAGIC = 0x70766862
INTERVAL = 0.05
LOSS = 4
READ_AT_ONCE = 1 << 12
INTERVALS = (0.001, 60.0)
LOSSES = (2, 1000)
END_DEADLINE = 5.0


@dataclass
class HeartbeatCounts:
    """What a heartbeat has seen; times in seconds."""

    sent: int = 0
    heard: int = 0
    not_sent: int = 0
    """The line took no more: the other side does not read."""
    longest_silence: float = 0.0


class Heartbeat:
    """Both directions of one connection, on a thread of its own; owns ``sock``.

    ``lost`` is called with the reason, on that thread and at most once; not after ``stop``.
    """

    def __init__(
        self, sock: socket.socket, term: int, lost: Callable[[str], None], *,
        interval: float = INTERVAL, loss: int = LOSS,
    ) -> None:  # fmt: skip
        if not INTERVALS[0] <= interval <= INTERVALS[1]:
            raise ConfigError(f"heartbeat interval {interval:g} s: has to be {INTERVALS[0]:g} to {INTERVALS[1]:g} s")
        if not LOSSES[0] <= loss <= LOSSES[1]:
            raise ConfigError(f"heartbeat loss count {loss}: has to be {LOSSES[0]} to {LOSSES[1]}")
        self.counts = HeartbeatCounts()
        self.interval, self.loss = interval, loss
        self._socket, self._term, self._lost = sock, term, lost
        self._unsent = b""
        self._unread = b""
        self._stopping = threading.Event()
        self._wake, self._waker = socket.socketpair()
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """From now on it beats, and the other side must."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the connection. Not from within ``lost``. May be called again."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._waker.send(b"x")
        if self._thread.ident is not None:
            self._thread.join(END_DEADLINE)
        for sock in (self._socket, self._wake, self._waker):
            sock.close()

    def _run(self) -> None:
        lib.pv_net_be_prompt()  # a beat takes microseconds; behind a vCPU's time slice it would be late
        reason = self._beat_until_lost()
        if not self._stopping.is_set():
            T.colo_heartbeat_lost.on and T.colo_heartbeat_lost(reason, self.counts.heard)
            self._lost(reason)

    def _beat_until_lost(self) -> str:
        """Why it ended; empty if it was stopped."""
        turn = time.monotonic()
        silent = 0.0
        while not self._stopping.is_set():
            with contextlib.suppress(InterruptedError):
                select.select([self._socket, self._wake], [], [], max(0.0, turn - time.monotonic()))
            now = time.monotonic()
            try:
                heard = self._hear()
                if now >= turn:
                    self._say()
            except _LineError as error:
                return str(error)
            if heard:
                silent = 0.0
            elif now >= turn:
                # A turn that came late is this side's own delay, not the other's silence.
                silent += self.interval
            self.counts.longest_silence = max(self.counts.longest_silence, silent)
            if silent >= self.interval * self.loss:
                return f"nothing was heard for {silent * 1000:.0f} ms"
            if now >= turn:
                turn = max(turn + self.interval, now)
        return ""

    def _say(self) -> None:
        if not self._unsent:
            self._unsent = BEAT.pack(MAGIC, 0, self._term, self.counts.sent)
            self.counts.sent += 1
        else:
            self.counts.not_sent += 1
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            raise _LineError(f"the heartbeat's connection broke: {error.strerror or error}") from None

    def _hear(self) -> int:
        """Read all that has come; how many beats it was."""
        beats = 0
        while True:
            try:
                came = self._socket.recv(READ_AT_ONCE)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return beats
            except OSError as error:
                raise _LineError(f"the heartbeat's connection broke: {error.strerror or error}") from None
            if not came:
                raise _LineError("the other side closed the heartbeat's connection")
            self._unread += came
            while len(self._unread) >= BEAT.size:
                self._judge(*BEAT.unpack_from(self._unread))
                self._unread = self._unread[BEAT.size :]
                beats += 1

    def _judge(self, magic: int, zero: int, term: int, count: int) -> None:
        if magic != MAGIC or zero:
            raise _LineError(f"what came on the heartbeat's connection is no beat ({magic:#x})")
        if term != self._term:
            raise _LineError(f"the other side lives in term {term}, this one in {self._term}")
        if count != self.counts.heard:
            raise _LineError(f"beat {count} came where {self.counts.heard} was due")
        self.counts.heard += 1


class _LineError(Exception):
    """The connection is of no use any more, and why."""
