"""A connection that carries frames: what a migration, and later a replication, talks over.

One frame::

    u32 kind | u32 sequence | u32 length | u32 CRC-32C of the first three words and the payload | payload

All words are little-endian. The sequence counts frames from 0 in each direction, so that one that is lost, doubled or
out of order is noticed; the checksum notices flipped bits, which TCP's lets through now and then. A length beyond what
the kind allows is refused before anything is allocated.

URIs, as QEMU writes them: ``tcp:HOST:PORT``, ``unix:PATH``, ``fd:NUMBER``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import Any

from pyvmm.errors import ChannelError, ConfigError
from pyvmm.machine.unix_listener import remove_stale_socket
from pyvmm.native import ffi, lib

HEAD = struct.Struct("<IIII")
_COVERED = 12
FRAME_MAX = 16 << 20
"""Bytes of the largest payload."""
JOINED = 64 << 10
"""Bytes below which a payload is sent together with its head."""
BACKLOG = 1
BACKLOG_SEVERAL = 8
POLL = 0.2
"""Seconds between looks at whether to go on waiting for a connection."""


class Channel:
    """One end of a connection; owns the socket. One thread sends, one receives (they may be the same).

    ``stall`` is the longest, in seconds, that the peer may leave a read or a write without any progress.
    """

    def __init__(self, sock: socket.socket, *, stall: float) -> None:
        self._socket = sock
        self._detached = False
        self._sent = self._received = 0
        self.bytes_sent = 0
        self.stall = stall
        sock.settimeout(stall)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each message is waited for
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, kind: int, payload: bytes | memoryview | Any = b"") -> None:
        """Send one frame; ChannelError if the peer is gone or does not take it."""
        if self._detached:
            raise ChannelError("the connection speaks another protocol by now")
        view = memoryview(payload)
        start = struct.pack("<III", kind, self._sent, view.nbytes)
        head = start + struct.pack("<I", _checksum(start, view))
        self._sent = self._sent + 1 & 0xFFFFFFFF
        try:
            # One call, and one wake-up of the peer, unless joining them would copy much.
            if view.nbytes < JOINED:
                self._socket.sendall(head + view)
            else:
                self._socket.sendall(head)
                self._socket.sendall(view)
        except TimeoutError:
            raise ChannelError(f"the peer took nothing for {self.stall:g} s") from None
        except OSError as error:
            raise ChannelError(f"the connection broke: {error.strerror or error}") from None
        self.bytes_sent += HEAD.size + view.nbytes

    def receive(self, *, stall: float | None = None) -> tuple[int, memoryview]:
        """The next frame: (kind, payload). ChannelError says why there is none; ``stall`` for this frame alone."""
        self._socket.settimeout(self.stall if stall is None else stall)
        try:
            head = self._read(HEAD.size)
            kind, sequence, length, checksum = HEAD.unpack(head)
            if length > FRAME_MAX:
                raise ChannelError(f"a frame of {length} bytes; {FRAME_MAX} is the most there can be")
            if sequence != self._received:
                raise ChannelError(f"frame {sequence} came where {self._received} was due")
            payload = self._read(length)
        finally:
            self._socket.settimeout(self.stall)
        if _checksum(head[:_COVERED], payload) != checksum:
            raise ChannelError(f"frame {sequence} was damaged on the way")
        self._received = self._received + 1 & 0xFFFFFFFF
        return kind, payload

    def _read(self, size: int) -> memoryview:
        buffer = memoryview(bytearray(size))
        done = 0
        try:
            while done < size:
                count = self._socket.recv_into(buffer[done:])
                if not count:
                    raise ChannelError("the peer closed the connection")
                done += count
        except TimeoutError:
            raise ChannelError(f"the peer sent nothing for {self._socket.gettimeout():g} s") from None
        except OSError as error:
            raise ChannelError(f"the connection broke: {error.strerror or error}") from None
        return buffer

    def detach(self) -> socket.socket:
        """The socket, for another protocol; the channel is of no use any more. Nothing may be under way on it."""
        self._detached = True
        return self._socket

    def abort(self) -> None:
        """From any thread: make whoever sends or receives fail at once."""
        if self._detached:
            return
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back, unless it was detached."""
        if not self._detached:
            self._socket.close()


def _checksum(head: bytes | memoryview, payload: memoryview) -> int:
    crc = lib.pv_crc32c(0, ffi.from_buffer(head), len(head))
    return int(lib.pv_crc32c(crc, ffi.from_buffer(payload), payload.nbytes)) if payload.nbytes else int(crc)


def connect(uri: str, *, timeout: float, stall: float, tls_creds: str = "", tls_hostname: str = "") -> Channel:
    """Connect to ``uri`` within ``timeout`` seconds. ConfigError: not a URI. ChannelError: nobody is there.

    ``tls_creds``: a folder of credentials (tls.py), empty for none; ``tls_hostname``: the name the other side's
    certificate must have, if not the URI's host.
    """
    sock = _connect(uri, timeout)
    sock.settimeout(stall)
    if tls_creds:
        from pyvmm.migration.tls import secure_client

        family, _, rest = uri.partition(":")
        host = rest.rpartition(":")[0].strip("[]") if family == "tcp" else None
        try:
            sock = secure_client(sock, tls_creds, tls_hostname or host)
        except BaseException:
            sock.close()
            raise
    return Channel(sock, stall=stall)


def _connect(uri: str, timeout: float) -> socket.socket:
    family, address = parse_uri(uri)
    if family == "fd":
        return _adopt(address)
    deadline = time.monotonic() + timeout
    problem: OSError | None = None
    for kind, target in _addresses(family, address):
        sock = socket.socket(kind, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.05, deadline - time.monotonic()))
            sock.connect(target)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    reason = "timed out" if isinstance(problem, TimeoutError) else problem and problem.strerror
    raise ChannelError(f"cannot connect to {uri}: {reason or 'no such address'}")


class Listener:
    """Waits for one connection at ``uri``, or for ``several``; owns its socket, and a unix socket's file."""

    def __init__(self, uri: str, *, several: bool = False) -> None:
        family, address = parse_uri(uri)
        self.uri = uri
        self._several = several
        self._path: str | None = None
        self._adopted: socket.socket | None = None
        self._socket: socket.socket | None = None
        if family == "fd":
            self._adopted = _adopt(address)
            return
        kind, target = _addresses(family, address)[0]
        self._socket = socket.socket(kind, socket.SOCK_STREAM)
        try:
            if family == "unix":
                _make_way(address)
            else:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(target)
            self._socket.listen(BACKLOG_SEVERAL if several else BACKLOG)
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"cannot listen at {uri}: {error.strerror}") from None
        if family == "unix":
            self._path = address

    @property
    def port(self) -> int:
        """The TCP port, which may have been chosen by the kernel (``tcp:HOST:0``)."""
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    def fileno(self) -> int:
        """Readable when somebody has connected."""
        sock = self._adopted or self._socket
        assert sock is not None
        return sock.fileno()

    def accept_when_somebody_comes(
        self, given_up: Callable[[], bool], *, stall: float, tls_creds: str = ""
    ) -> Channel | None:
        """Like :meth:`accept`, however long it takes; ``None`` once ``given_up()`` (asked every now and then)."""
        while not given_up():
            if select.select([self.fileno()], [], [], POLL)[0]:
                return self.accept(timeout=POLL, stall=stall, tls_creds=tls_creds)
        return None

    def accept(self, *, timeout: float, stall: float, tls_creds: str = "") -> Channel:
        """The next connection; after it nobody else is let in, unless several are. ChannelError if none comes in time,
        or it fails TLS.
        """
        sock = self._accept(timeout)
        sock.settimeout(stall)
        if tls_creds:
            from pyvmm.migration.tls import secure_server

            try:
                sock = secure_server(sock, tls_creds)
            except BaseException:
                sock.close()
                raise
        return Channel(sock, stall=stall)

    def _accept(self, timeout: float) -> socket.socket:
        if self._adopted is not None:
            sock, self._adopted = self._adopted, None
            return sock
        assert self._socket is not None
        self._socket.settimeout(timeout)
        try:
            sock, _ = self._socket.accept()
        except TimeoutError:
            raise ChannelError(f"nobody connected to {self.uri} for {timeout:g} s") from None
        if not self._several:
            self.close()  # a second one is refused by the kernel
        return sock

    def close(self) -> None:
        """Stop listening; harmless twice."""
        for sock in (self._socket, self._adopted):
            if sock is not None:
                sock.close()
        self._socket = self._adopted = None
        if self._path is not None:
            path, self._path = self._path, None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def parse_uri(uri: str) -> tuple[str, str]:
    """(``tcp``, ``unix`` or ``fd``, the rest); ConfigError if it is not one."""
    family, _, rest = uri.partition(":")
    if family == "tcp":
        host, colon, port = rest.rpartition(":")
        if colon and host and port.isascii() and port.isdigit() and int(port) < 65536:
            return family, rest
        raise ConfigError(f"{uri!r}: write tcp:HOST:PORT")
    if family == "unix" and rest:
        if len(os.fsencode(rest)) > 107:  # sun_path, with its final NUL
            raise ConfigError(f"{uri!r}: a unix socket's path has at most 107 bytes")
        return family, rest
    if family == "fd" and rest.isascii() and rest.isdigit() and int(rest) < 1 << 31:
        return family, rest
    raise ConfigError(f"{uri!r}: write tcp:HOST:PORT, unix:PATH or fd:NUMBER")


def _addresses(family: str, rest: str) -> list[tuple[int, Any]]:
    if family == "unix":
        return [(socket.AF_UNIX, rest)]
    host, _, port = rest.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"tcp:{rest}: {error.strerror}") from None
    return [(entry[0], entry[4]) for entry in found]


def _adopt(number: str) -> socket.socket:
    try:
        if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
            raise ConfigError(f"fd:{number} is not a socket")
        return socket.socket(fileno=int(number))
    except OSError as error:
        raise ConfigError(f"fd:{number}: {error.strerror}; hand it over open") from None


def _make_way(path: str) -> None:
    """A socket that nobody listens on is what a killed process left. ConfigError for anything else in the way."""
    if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        raise ConfigError(f"unix:{path}: exists and is not a socket")
    if remove_stale_socket(path):
        raise ConfigError(f"unix:{path}: somebody is listening there; choose another path")
