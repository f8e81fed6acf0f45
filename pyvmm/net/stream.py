"""The rootless backend: frames over a stream socket, each led by its length, a big-endian u32.

What ``passt`` and QEMU's ``-netdev stream`` speak. There is no virtio header on the wire, so no offloads. A length of 0
or of more than 64 KiB and headers is no frame: the native pump then gives the link up, as when the peer is gone.
"""

from __future__ import annotations

import re
import socket

from pyvmm.errors import ConfigError, HostError
from pyvmm.trace import trace_group

T = trace_group("net")

CONNECT_DEADLINE = 5.0
"""Seconds in which the peer must have taken the connection."""
_TCP = re.compile(r"(\[[^\]]+\]|[^:\[\]]+):([0-9]{1,5})")


def parse_target(target: str) -> str | tuple[str, int]:
    """The path in ``unix:PATH``, or (host, port) in ``tcp:HOST:PORT`` (IPv6 in brackets); ConfigError."""
    kind, _, rest = target.partition(":")
    if kind == "unix" and rest:
        return rest
    match = _TCP.fullmatch(rest)
    if kind == "tcp" and match is not None and 1 <= int(match[2]) <= 65535:
        return match[1].strip("[]"), int(match[2])
    raise ConfigError(f"--net stream {target!r}: write unix:PATH or tcp:HOST:PORT")


class Stream:
    """A connection to ``target`` (see :func:`parse_target`). ConfigError, or HostError if nobody answers there."""

    carries_header = False
    mtu = None

    def __init__(self, target: str) -> None:
        self.name = target
        address = parse_target(target)
        try:
            if isinstance(address, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    self._socket.settimeout(CONNECT_DEADLINE)
                    self._socket.connect(address)
                except BaseException:
                    self._socket.close()
                    raise
            else:
                self._socket = socket.create_connection(address, CONNECT_DEADLINE)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            why = error.strerror or str(error)
            raise HostError(f"{target}: {why}; start the other side first (passt --socket PATH, for one)") from None
        self._socket.setblocking(False)
        T.stream_open.on and T.stream_open(target)

    @property
    def fd(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        return self._socket.fileno()

    def set_offload(self, flags: int) -> None:
        """Nothing to pass on: a driver that was offered no offloads has none."""

    def release(self) -> None:
        """The connection is this process's own: whoever is at its other end sees who speaks."""

    def claim(self) -> None:
        """Likewise."""

    def announce(self, frame: bytes) -> None:
        """Likewise."""

    def close(self) -> None:
        """Close the connection. Harmless twice."""
        self._socket.close()
