"""A client of guests/net-echo: UDP, which is lost while a guest stands still, and sent again."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from tests.framework.topology import Namespace

GUEST, MAC = "10.91.0.2", "52:54:00:00:00:07"
"""Of the guest, which has the first place in the network "demo"."""
PORT = 7


@contextlib.contextmanager
def echo_client(host: Namespace, timeout: float) -> Iterator[socket.socket]:
    """A socket in ``host`` that is connected to the guest; ``timeout``: seconds until a datagram is taken for lost."""
    with host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as made:
        made.settimeout(timeout)
        made.connect((GUEST, PORT))
        yield made


def echoed(client: socket.socket, word: bytes, seconds: float = 10) -> None:
    """Send ``word`` until it comes back, which it must within ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            client.send(word)
            while client.recv(2000) != word:
                pass
            return
        except (TimeoutError, ConnectionRefusedError):
            continue
    raise AssertionError(f"{word!r} does not come back within {seconds} s")
