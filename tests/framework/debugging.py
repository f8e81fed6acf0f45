"""A ``pyvmm`` that listens for a debugger, Debian's gdb on it, and a client in Python for what gdb never sends."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pyvmm.gdb.packets import escape, expand_runs, unescape
from tests.framework.processes import REPOSITORY, Running

GUESTS = REPOSITORY / "guests"
GDB_SECONDS = 100
START = 90.0
"""Seconds; the first start on an emulated host measures that host."""


def symbols(guest: str, suffix: str = "elf64") -> Path:
    """A guest's file for gdb; see guests/Makefile."""
    return GUESTS / "build" / guest / f"{guest}.{suffix}"


class Debugged:
    """``running`` listens at the unix socket ``path``."""

    def __init__(self, running: Running, path: Path) -> None:
        self.running = running
        self.path = path

    def gdb(self, file: Path | None, *commands: str) -> str:
        """What Debian's gdb prints when it connects and carries ``commands`` out."""
        words = ["gdb", "-nx", "-batch", "-iex", "set confirm off", *([str(file)] if file else [])]
        for command in (f"target remote {self.path}", *commands):
            words += ["-ex", command]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=GDB_SECONDS, check=False,
        )  # fmt: skip
        return done.stdout

    def client(self) -> Client:
        return Client(self.path)


@contextlib.contextmanager
def debugged(folder: Path, *words: str) -> Iterator[Debugged]:
    """``pyvmm *words --gdb ...``, listening."""
    path = folder / "gdb.sock"
    with Running(*words, "--gdb", f"unix:{path}") as running:
        deadline = time.monotonic() + START
        while not listens(path):  # connecting to see would stop the guest
            assert running.process.poll() is None, running.finish()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Debugged(running, path)


def listens(path: Path) -> bool:
    """Not only bound: the fourth word is __SO_ACCEPTCON (Documentation/filesystems/proc.rst, net/unix)."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(words[3] == "00010000" and words[-1] == str(path) for words in lines)


class Client:
    """Sends what it is told to. A context manager."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))  # waits while others are in the queue, as it would not with a timeout
        self.socket.settimeout(60)
        self._received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, payload: bytes) -> None:
        raw = escape(payload)
        self.socket.sendall(b"$%s#%02x" % (raw, sum(raw) & 0xFF))

    def receive(self) -> bytes:
        """The next packet; ConnectionError if there is none to come. Acknowledgements are passed over."""
        while True:
            start = self._received.find(b"$")
            end = self._received.find(b"#", start)
            if 0 <= start < end and len(self._received) >= end + 3:
                frame, self._received = self._received[start + 1 : end], self._received[end + 3 :]
                raw = expand_runs(frame)
                assert raw is not None
                payload = unescape(raw)
                assert payload is not None
                return payload
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError
            self._received += data

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.receive()


