"""A real etcd server on loopback, or on a host in a namespace, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.migrating import free_port
from tests.framework.topology import Namespace

START = 30.0
"""Seconds until it answers."""


class Etcd:
    """One member; ``address`` is HOST:PORT. ``host`` is an address of the namespace ``inside``, if that is given."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", inside: Namespace | None = None) -> None:
        program = shutil.which("etcd")
        if program is None:
            pytest.fail("etcd is not installed: apt-get install etcd-server", pytrace=False)
        self.port, peer = free_port(), free_port()
        self.address = f"{host}:{self.port}"
        self._inside = inside
        client, between = f"http://{self.address}", f"http://127.0.0.1:{peer}"
        command = ["setpriv", "--pdeathsig", "KILL", program, "--data-dir", str(folder / "etcd"), "--name", "one"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", between, "--initial-advertise-peer-urls", between]
        command += ["--initial-cluster", f"one={between}", "--log-level", "error", "--unsafe-no-fsync"]
        if inside is not None:
            command = inside.command(*command)
        with (folder / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait_until_it_answers(self) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until and self.process.poll() is None:
            if self._is_healthy() if self._inside is None else self._inside.call(self._is_healthy):
                return
            time.sleep(0.1)
        pytest.fail("etcd did not start", pytrace=False)

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(self.address, timeout=1.0)
            try:
                connection.request("GET", "/health")
                return b"true" in connection.getresponse().read()
            finally:
                connection.close()
        return False

    def stop(self) -> None:
        """As if its machine hung: connections are taken, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def etcd_server(folder: Path, host: str = "127.0.0.1", inside: Namespace | None = None) -> Iterator[Etcd]:
    """Answers when it is given, gone afterwards."""
    server = Etcd(folder, host, inside)
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.end()
