"""Where a machine's monitors listen: ``--qmp`` endpoints and the control socket that finds it by name."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from pyvmm.errors import ConfigError
from pyvmm.machine.unix_listener import listen_unix

BACKLOG = 4


class Endpoint:
    """A listening socket. ``clients``: how many it serves at once; further ones wait in the backlog.

    ``connected``: no listener, but the one client there will ever be, which may give the commands ``only`` and is not
    told the events ``untold``.
    """

    def __init__(
        self, label: str, listener: socket.socket, clients: int, remove: Callable[[], None], *,
        connected: bool = False, only: frozenset[str] | None = None, untold: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.label = label
        self.socket = listener
        self.clients = clients
        self.connected = connected
        self.only = only
        self.untold = untold
        self._remove = remove

    def close(self) -> None:
        """Stop listening, or hang up; a socket file is removed."""
        self._remove()
        self.socket.close()


def open_endpoint(option: str, name: str = "--qmp") -> Endpoint:
    """The endpoint for the option ``name``: ``unix:PATH`` or ``tcp:HOST:PORT`` (a host of IPv6 digits in brackets).

    QEMU's ``,server=on`` and ``,wait=off`` (or ``server``, ``nowait``) may follow and say what is so anyway. One
    client at a time, as in QEMU. Raises ConfigError.
    """
    what = f"{name} {option}"
    address, *words = option.split(",")
    for word in words:
        if word not in ("server", "server=on", "nowait", "wait=off"):
            raise ConfigError(f"{what}: {word!r} is not known; a monitor is a server that does not wait")
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        path = os.path.abspath(rest)
        listener = listen_unix(path, what, BACKLOG)
        return Endpoint(address, listener, 1, lambda: _unlink(path))
    host, colon, port = rest.rpartition(":")
    if kind != "tcp" or not colon or not host or not (port.isascii() and port.isdecimal() and int(port) < 65536):
        raise ConfigError(f"{what}: write unix:PATH or tcp:HOST:PORT")
    return Endpoint(address, _listen_tcp(host.strip("[]"), int(port), what), 1, lambda: None)


def _listen_tcp(host: str, port: int, what: str) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        listener = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{what}: {getattr(error, 'strerror', None) or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{what}: {error.strerror or error}") from None
    return listener


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
