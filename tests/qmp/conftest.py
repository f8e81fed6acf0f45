"""Machines with a QMP socket, run as users run them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.qmp.client import QmpClient, open_client
from tests.framework.processes import Running
from tests.framework.real_mode import image


class QmpMachine:
    """A running ``pyvmm`` and the path of its monitor."""

    def __init__(self, running: Running, path: Path) -> None:
        self.running = running
        self.path = path

    def client(self, timeout: float = 20) -> QmpClient:
        return open_client(f"unix:{self.path}", timeout)

    def wait_for(self, client: QmpClient, status: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while (now := client.execute("query-status")["status"]) != status:
            assert time.monotonic() < deadline, f"{now}, not {status}"
            time.sleep(0.02)


def _listens(path: Path) -> bool:
    """Not only bound; also a client that comes and goes at once."""
    with socket.socket(socket.AF_UNIX) as link:
        return link.connect_ex(str(path)) == 0


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[Callable[..., QmpMachine]]:
    """A factory: real-mode code, or a guest's folder, and options -> a machine that runs and listens."""
    made: list[Running] = []

    def start(code: bytes | Path, *options: str, name: str = "guest") -> QmpMachine:
        path = folder / f"{name}.qmp"
        guest = image(folder, code, f"{name}.bin") if isinstance(code, bytes) else str(code)
        running = Running("run", guest, "--qmp", f"unix:{path}", "--timeout", "100", *options)
        made.append(running)
        deadline = time.monotonic() + 20
        while not _listens(path):
            assert running.process.poll() is None, running.finish()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        machine = QmpMachine(running, path)
        if "-S" not in options:  # whoever comes before it runs gets a RESUME
            with machine.client() as client:
                while client.execute("query-status")["status"] == "prelaunch":
                    time.sleep(0.01)
        return machine

    try:
        yield start
    finally:
        for running in made:
            running.__exit__()


@pytest.fixture
def machine_with_qmp(tmp_path: Path) -> Iterator[Callable[..., QmpMachine]]:
    """Machines of one test."""
    with machines(tmp_path) as start:
        yield start
