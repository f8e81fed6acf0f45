"""A ``pyvmm run`` with a dashboard, and asking it things as browsers and attackers do."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import time
from typing import Any

import psutil

from tests.framework.processes import Running

START_DEADLINE = 20.0


def read_line(process: Running, seconds: float = START_DEADLINE) -> str:
    """The next line on standard error."""
    stream = process.process.stderr
    assert stream is not None
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0, deadline - time.monotonic()))
        piece = os.read(stream.fileno(), 1) if ready else b""
        assert piece, line
        line += piece
    return line.decode().rstrip()


class Dashboard:
    """Of ``process``, found by what it printed."""

    def __init__(self, process: Running) -> None:
        line = read_line(process)
        found = re.fullmatch(r"pyvmm: dashboard at (http://(\S+):(\d+)/)(?: \(token .*: (\S+)\))?", line)
        assert found is not None, line
        self.process = process
        self.url, self.host, self.port, self.token = found[1], found[2], int(found[3]), found[4] or ""

    def connection(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """(status, text) of the answer."""
        link = self.connection()
        try:
            link.request(method, path, headers=headers or {})
            answer = link.getresponse()
            return answer.status, answer.read().decode()
        finally:
            link.close()

    def state(self) -> dict[str, Any]:
        status, text = self.ask("GET", "/state")
        assert status == 200, text
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    def child(self) -> psutil.Process:
        """Its process."""
        (child,) = psutil.Process(self.process.process.pid).children()
        return child


def wait_gone(process: psutil.Process, seconds: float = 5.0) -> None:
    """Until it has ended, whoever collects it."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
