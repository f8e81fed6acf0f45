"""Two TCP stacks of the kernel's as the guests of a pair, a third as the client, and the proxy between their taps.

::

    client's tap  -- mirrored -->  primary's tap           what the primary's stack sends waits in the comparison
                  -- rewriter -->  secondary's tap         until the secondary's, through the rewriter, is the same

There is no machine in it, so there is no checkpoint either: the answers must agree, or they wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Iterator

from pyvmm.net.compare import Compare, CompareTunables, Mode, Policy
from pyvmm.net.filter import Direction, Frame
from pyvmm.net.rewriter import Rewriter
from pyvmm.net.tap import HEADER_SIZE, OFFLOAD_CSUM, OFFLOAD_TSO4, Tap
from tests.framework.topology import Namespace, Topology

GUEST, CLIENT = "10.9.0.1", "10.9.0.2"
_MACS = {GUEST: "52:54:00:00:00:01", CLIENT: "52:54:00:00:00:02"}
LARGEST = 70000

SERVICE = """
import hashlib, socket, sys, threading
def pattern(n):
    return (b"0123456789abcdefghijklmnopqrstuvwxyz-" * (n // 37 + 1))[:n]
def call():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("10.9.0.1", 5555))
    s.connect(("10.9.0.2", 9000))
    with s, s.makefile("rb") as lines:
        for line in lines:
            s.sendall(b"pong " + line)
def serve(s):
    with s, s.makefile("rb") as lines:
        for line in lines:
            word, _, number = line.decode().partition(" ")
            if word == "GET":
                s.sendall(pattern(int(number)))
            elif word == "PUT":
                s.sendall(hashlib.sha256(lines.read(int(number))).hexdigest().encode() + b"\\n")
            elif word == "CALL\\n":
                threading.Thread(target=call, daemon=True).start()
                s.sendall(b"calling\\n")
with socket.create_server(("10.9.0.1", 80), backlog=100) as listener:
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


def _ms() -> int:
    return int(time.monotonic() * 1000)


def _end(space: Namespace, address: str, timestamps: int) -> Tap:
    """A tap whose other end is the stack of ``space``."""

    def inside() -> Tap:
        from pyroute2 import IPRoute

        tap = Tap("eth0")
        tap.set_offload(OFFLOAD_CSUM | OFFLOAD_TSO4)
        with IPRoute() as route:
            index = route.link_lookup(ifname="eth0")[0]
            route.link("set", index=index, address=_MACS[address])
            route.addr("add", index=index, address=address, prefixlen=24)
            route.link("set", index=index, state="up")
            other = CLIENT if address == GUEST else GUEST
            route.neigh("add", dst=other, lladdr=_MACS[other], ifindex=index, state=0x80)  # NUD_PERMANENT
        with open("/proc/sys/net/ipv4/tcp_timestamps", "w", encoding="ascii") as option:
            option.write(str(timestamps))
        return tap

    return space.call(inside)


class Proxy:
    """Moves frames between the three taps on a thread. ``lose`` drops one of so many, before it is mirrored and after
    it was released; ``lag`` is by how many ms the secondary hears of things later.
    """

    def __init__(self, client: Tap, primary: Tap, secondary: Tap, lose: int, lag: int) -> None:
        self.compare = Compare(CompareTunables(policy={"arp": Policy.RELEASE, "ip": Policy.RELEASE}))
        self.rewriter = Rewriter()
        self.error: BaseException | None = None
        self.lost = self.offloaded = 0
        self.secondary_misses = 0
        """So many of the next large frames only the primary gets."""
        self._taps = client, primary, secondary
        self._lose, self._lag = lose, lag
        self._frames = 0
        self._late: list[tuple[int, Frame]] = []
        self.alone = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self.compare.set_mode(Mode.HYBRID, 1, _ms())
        self._thread.start()

    def fail_over(self) -> None:
        """The primary is no more: nothing of it goes out from now on, and the secondary speaks for itself."""
        self.alone = True

    def close(self) -> None:
        self._ending.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for tap in self._taps:
            tap.close()

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                ready, _, _ = select.select(self._taps, [], [], 0.002 if self._late else 0.05)
                for tap in ready:
                    for _ in range(64):
                        frame = self._read(tap)
                        if frame is None:
                            break
                        self._move(tap, frame)
                self._deliver_late()
                self.compare.scan(_ms())
        except BaseException as error:
            self.error = error

    def _read(self, tap: Tap) -> Frame | None:
        try:
            data = os.read(tap.fd, LARGEST)
        except BlockingIOError:
            return None
        return Frame(data[:HEADER_SIZE], data[HEADER_SIZE:])

    def _write(self, tap: Tap, frame: Frame) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(tap.fd, frame.header + frame.data)

    def _is_lost(self, frame: Frame) -> bool:
        self._frames += 1
        self.offloaded += frame.header[0] & 1
        lost = bool(self._lose) and self._frames % self._lose == 0
        self.lost += lost
        return lost

    def _move(self, tap: Tap, frame: Frame) -> None:
        client, primary, secondary = self._taps
        if tap is client:
            if self._is_lost(frame):
                return
            if not self.alone:
                self._write(primary, frame)
            self._late.append((_ms() + (0 if self.alone else self._lag), frame))
        elif tap is primary and not self.alone:
            assert self.compare.primary(frame, _ms())
            self._send_out(self.compare.release())
        elif tap is secondary:
            rewritten = self.rewriter.rewrite(Direction.TX, frame, _ms())
            if self.alone:
                self._send_out([rewritten])
            else:
                self.compare.secondary(rewritten, 1, _ms())
                self._send_out(self.compare.release())

    def _send_out(self, frames: list[Frame]) -> None:
        for frame in frames:
            if not self._is_lost(frame):
                self._write(self._taps[0], frame)

    def _deliver_late(self) -> None:
        now = _ms()
        while self._late and self._late[0][0] <= now:
            _, frame = self._late.pop(0)
            if self.secondary_misses and len(frame.data) > 1000 and not self.alone:
                self.secondary_misses -= 1
                continue
            self._write(self._taps[2], self.rewriter.rewrite(Direction.RX, frame, now))


@contextlib.contextmanager
def two_guests(lose: int = 0, lag: int = 5) -> Iterator[tuple[Namespace, Proxy]]:
    """The client's namespace, and the proxy; the service listens on port 80 of both guests."""
    with Topology() as topology, contextlib.ExitStack() as ending:
        spaces = [topology.namespace(name) for name in ("client", "primary", "secondary")]
        # 2: without an offset of the connection's own, so that the two guests' clocks are far apart.
        ends = zip(spaces, (CLIENT, GUEST, GUEST), (1, 1, 2), strict=True)
        taps = [_end(space, address, timestamps) for space, address, timestamps in ends]
        for space in spaces[1:]:
            child = space.start(sys.executable, "-c", SERVICE)
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        proxy = Proxy(taps[0], taps[1], taps[2], lose, lag)
        ending.callback(proxy.close)
        yield spaces[0], proxy
