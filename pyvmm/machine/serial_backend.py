"""The host's end of the serial line: stdio, a file, a unix socket, or nothing."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Callable
from typing import Protocol

from pyvmm.errors import ConfigError
from pyvmm.machine.console_output import FLUSH_DEADLINE, ConsoleOutput, OutputGate
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.output_hold import OutputHold
from pyvmm.machine.unix_listener import listen_unix

_READ = 4096
_PENDING_MAX = 65536  # typed at a guest that does not listen: what is beyond is dropped


class InputTaker(Protocol):
    """What input goes to: a serial port or its like."""

    on_room: Callable[[], None] | None
    """To be called when :meth:`receive` would take something again."""

    def receive(self, data: bytes) -> int:
        """Take the first bytes of ``data``; how many."""


class SerialBackend:
    """Output goes to a :class:`ConsoleOutput`; input is read only as fast as the guest takes it."""

    def __init__(self, loop: EventLoop, fd: int | None, *, own_fd: bool = False) -> None:
        self.gate = OutputGate()
        """Where vCPUs wait while output is full."""
        self.hold = OutputHold(self._let_out)
        """What is put before the world: not all of it at once, for a guest that is protected."""
        self._loop = loop
        self._output = None if fd is None else ConsoleOutput(fd, self.gate, own_fd=own_fd)
        self._serial: InputTaker | None = None
        self._input = -1
        self._file = -1
        self._pending = b""
        self.observe: Callable[[bytes], None] | None = None
        """Sees all output as well; must be quick."""
        self.interactive = False
        """Input is read at once, whatever the guest takes: escape keys must work when it takes nothing."""
        self.filter_input: Callable[[bytes], bytes] = lambda data: data
        """Sees all input first; the interactive console takes its escape keys out here."""

    def output(self, data: bytes) -> None:
        """What the guest sends."""
        self.hold.put(data)

    def _let_out(self, data: bytes) -> None:
        if self.observe is not None:
            self.observe(data)
        output = self._output  # the loop's thread may take it away meanwhile (a client that disconnects)
        if output is not None:
            output(data)

    def attach(self, serial: InputTaker) -> None:
        """Connect the device; from now on input flows."""
        self._serial = serial
        serial.on_room = lambda: self._loop.post(self._feed)
        self._feed()

    def read_from(self, fd: int) -> None:
        """Take input from ``fd`` until it ends. What is no stream at all (/dev/null, a folder) is at its end."""
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            return
        if stat.S_ISREG(mode):
            # Always readable, so epoll refuses it: read whenever the guest has taken what there was.
            self._file = fd
            self._feed()
        elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd):
            self._input = fd
            self._loop.add_reader(fd, self._readable)

    def flush(self, seconds: float = FLUSH_DEADLINE) -> bool:
        """Wait until all output is out, as :meth:`ConsoleOutput.flush` does."""
        if not self.hold.wait_empty(seconds):
            return False
        output = self._output
        return output is None or output.flush(seconds)

    @property
    def problem(self) -> str | None:
        """Why output is missing by now, if it is."""
        output = self._output
        return None if output is None else output.problem

    def close(self) -> None:
        """Flush and give everything back."""
        self._stop_reading()
        if self._output is not None:
            self._output.close()

    def _readable(self) -> None:
        try:
            data = os.read(self._input, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended()
            return
        data = self.filter_input(data)
        if len(self._pending) < _PENDING_MAX:
            self._pending += data
        self._feed()

    def _ended(self) -> None:
        """End of input; the guest goes on without."""
        self._stop_reading()

    def _feed(self) -> None:
        if self._serial is None:
            return
        while True:
            if not self._pending and self._file >= 0:
                self._pending = self._read_file()
            if not self._pending:
                break
            taken = self._serial.receive(self._pending)
            if not taken:
                break
            self._pending = self._pending[taken:]
        # Not reading while input is pending leaves the rest in the kernel's buffer: flow control for free.
        if self._input >= 0 and not self.interactive:
            self._loop.remove_reader(self._input)
            if not self._pending:
                self._loop.add_reader(self._input, self._readable)

    def _read_file(self) -> bytes:
        try:
            data = os.read(self._file, _READ)
        except OSError:  # not open for reading
            data = b""
        if not data:
            self._file = -1
        return data

    def _stop_reading(self) -> None:
        self._file = -1
        if self._input >= 0:
            self._loop.remove_reader(self._input)
            self._input = -1


class SocketSerialBackend(SerialBackend):
    """A listening unix socket; one client at a time, output without a client is lost as on a real line.

    ConfigError, which starts with ``option``, says why ``path`` cannot be used.
    """

    def __init__(self, loop: EventLoop, path: str, option: str = "--serial") -> None:
        super().__init__(loop, None)
        self._path = path
        self._client: socket.socket | None = None
        self._listener = listen_unix(path, f"{option} unix:{path}")
        loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Disconnect once the client has read all, stop listening, remove the socket file."""
        self.flush()
        self._drop_client()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if self._client is not None and _hung_up(self._client):
            self._drop_client()  # the loop would have come to it next; a client that comes back at once is not too many
        if self._client is not None:
            client.close()
            return
        self._client = client
        self._output = ConsoleOutput(client.fileno(), self.gate)
        self.read_from(client.fileno())

    def _ended(self) -> None:
        """The client has nothing more to send. It may have shut only that direction and read on (``nc -N``).

        Then nothing tells when it goes away altogether, and nothing has to: writing to it fails quietly, and whoever
        connects next takes its place.
        """
        if self._client is not None and not _hung_up(self._client):
            self._stop_reading()
        else:
            self._drop_client()

    def _drop_client(self) -> None:
        self._stop_reading()
        if self._client is not None:
            # shutdown() first: it ends a writer that is stuck in write() on this socket.
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)
            output, self._output = self._output, None
            if output is not None:
                output.close()
            self._client.close()
            self._client = None


def _hung_up(client: socket.socket) -> bool:
    """Whether the other end is closed, not only its sending half."""
    poll = select.poll()
    poll.register(client, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def open_serial(spec: str, loop: EventLoop) -> SerialBackend:
    """The backend for ``--serial SPEC``; ConfigError names the path that cannot be used."""
    kind, _, path = spec.partition(":")
    if kind == "null":
        return SerialBackend(loop, None)
    if kind == "file":
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"--serial {spec}: {error.strerror}") from None
        return SerialBackend(loop, fd, own_fd=True)
    if kind == "unix":
        return SocketSerialBackend(loop, path)
    if kind == "stderr":
        return SerialBackend(loop, 2)
    backend = SerialBackend(loop, 1)
    backend.read_from(0)
    return backend
