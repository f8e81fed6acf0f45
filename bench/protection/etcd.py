"""An etcd of one member on loopback, for as long as it is measured with."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vmms import DEADLINE, Vmm

from pyvmm.errors import HostError


@contextlib.contextmanager
def etcd_server(folder: Path) -> Iterator[str]:
    """``--arbiter`` for it. It answers, and syncs what it stores as it does in earnest."""
    port, peer = _free_ports()
    client, between = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
    argv = ["etcd", "--data-dir", str(folder / "etcd"), "--name", "one", "--log-level", "error",
            "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", between,
            "--initial-advertise-peer-urls", between, "--initial-cluster", f"one={between}"]  # fmt: skip
    server = Vmm("etcd", argv, folder / "etcd.err")
    try:
        deadline = time.monotonic() + DEADLINE
        while not _healthy(port):
            server.check()
            if time.monotonic() > deadline:
                raise HostError("not measured: etcd does not answer")
            time.sleep(0.05)
        yield f"etcd:127.0.0.1:{port}"
    finally:
        server.end()


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", "/health")
        return b"true" in connection.getresponse().read()
    return False


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]
