"""Where host programs ask for a stream to a port of the guest's: a unix socket with one line each way.

A program connects and writes ``CONNECT <port>`` and a newline; once the guest has accepted, it reads ``OK <host port>``
and a newline, and from then on the socket is the stream. A refusal is the end of the stream before that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
from collections.abc import Callable

from pyvmm.virtio.vsock_connection import HostLoop, Timer

LINE_MAX = 32
HELLO_DEADLINE = 5.0
"""Seconds a program has for its line."""
WAITING_MAX = 64
"""Programs that have not sent theirs; more are turned away."""
ACCEPT_AGAIN = 0.5
_HELLO = re.compile(rb"CONNECT ([0-9]{1,10})")
_ANY_PORT = 0xFFFFFFFF


class VsockListener:
    """Owns ``listener``, a listening non-blocking unix socket, and its file ``path``.

    ``connect(program, port, rest)`` gets the socket of a program that asked for ``port``, and what it sent behind its
    line. All on the loop's thread.
    """

    def __init__(
        self, loop: HostLoop, listener: socket.socket, path: str, connect: Callable[[socket.socket, int, bytes], None]
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._path = path
        self._connect = connect
        self._waiting: dict[socket.socket, tuple[bytes, Timer]] = {}
        self._rest: Timer | None = None
        self._listen()

    def _listen(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening, turn away who waits, remove the file."""
        if self._rest is not None:
            self._rest.cancel()
        for program in list(self._waiting):
            self._turn_away(program)
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        try:
            program, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # No descriptor left: the program stays in the backlog, and asking again at once would only keep us busy.
            self._loop.remove_reader(self._listener.fileno())
            self._rest = self._loop.call_later(ACCEPT_AGAIN, self._listen)
            return
        if len(self._waiting) >= WAITING_MAX:
            program.close()
            return
        program.setblocking(False)
        timer = self._loop.call_later(HELLO_DEADLINE, functools.partial(self._turn_away, program))
        self._waiting[program] = b"", timer
        self._loop.add_reader(program.fileno(), functools.partial(self._readable, program))

    def _readable(self, program: socket.socket) -> None:
        said, timer = self._waiting[program]
        try:
            data = program.recv(LINE_MAX - len(said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said += data
        line, newline, rest = said.partition(b"\n")
        if not newline and data and len(said) < LINE_MAX:
            self._waiting[program] = said, timer
            return
        match = _HELLO.fullmatch(line)
        port = int(match[1]) if match and newline else _ANY_PORT
        if port >= _ANY_PORT:
            self._turn_away(program)
            return
        self._forget(program)
        self._connect(program, port, rest)

    def _turn_away(self, program: socket.socket) -> None:
        self._forget(program)
        program.close()

    def _forget(self, program: socket.socket) -> None:
        _, timer = self._waiting.pop(program)
        timer.cancel()
        self._loop.remove_reader(program.fileno())
