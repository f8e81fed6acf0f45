"""Listening unix sockets with a path, which outlive a VMM that was killed and must not be in the next one's way."""

from __future__ import annotations

import os
import socket
import stat

from pyvmm.errors import ConfigError


def listen_unix(path: str, option: str, backlog: int = 1) -> socket.socket:
    """A non-blocking listener at ``path``. ConfigError names ``option`` and why it cannot be (somebody listens)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        remove_stale_socket(path)
        listener.bind(path)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{option}: {error.strerror or error}") from None
    return listener


def remove_stale_socket(path: str) -> bool:
    """Remove a socket file nobody listens on, left over from a VMM that was killed; True if one is in use."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    # Non-blocking: a VMM that lives but does not accept just now is in the way, not a reason to wait.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except BlockingIOError:
            pass
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            os.unlink(path)
            return False
    return True
