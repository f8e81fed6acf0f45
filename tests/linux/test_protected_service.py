"""A TCP connection to a Linux guest lives on when the guest's primary is killed."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from tests.framework.net_commands import demo_host
from tests.framework.pairs import PATIENT, colo_stats, pairs, wait_alone, wait_protected

pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(300)]
GUEST, PORT = "10.91.0.2", 7
SERVER = f"nc -ll -p {PORT} -e cat & sleep 1; echo serv''ing\n"
MODES = {"periodic": "100", "hybrid": "2000"}
GAP = 3.0
"""Seconds, on a busy host; what clients see on a quiet one is for bench/."""


class Talker:
    """Sends a numbered line over one connection, waits for it to come back, and so on, until told to stop."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.times: list[tuple[float, float]] = []
        self.problem: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                line = b"line %d\n" % len(self.times)
                began = time.monotonic()
                self.connection.sendall(line)
                got = b""
                while len(got) < len(line):
                    piece = self.connection.recv(len(line) - len(got))
                    assert piece, "the connection was closed"
                    got += piece
                assert got == line
                self.times.append((began, time.monotonic()))
                time.sleep(0.005)
        except BaseException as error:
            self.problem = error

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.problem is not None:
            raise self.problem


@pytest.mark.parametrize("mode", MODES)
def test_a_connection_lives_on(tmp_path: Path, mode: str) -> None:
    with demo_host() as host, pairs(tmp_path, ("--net", "demo")) as pair:
        secondary = pair.secondary(*PATIENT, command="linux", inside=host)
        primary = pair.primary(
            None, "--colo-mode", mode, "--checkpoint-delay", MODES[mode], command="linux", inside=host
        )
        primary.wait_for_text(b"# ", 200)
        assert primary.process.stdin is not None
        primary.process.stdin.write(SERVER.encode())
        primary.process.stdin.flush()
        primary.wait_for_text(b"serving\r\n", 60)
        primary.qmp.execute("x-colo-protect", {"uri": pair.uri_of(secondary.name)})
        wait_protected(primary)
        with host.call(lambda: socket.create_connection((GUEST, PORT), timeout=20)) as connection:
            talker = Talker(connection)
            time.sleep(3)
            stats = colo_stats(primary)
            primary.kill()
            killed = time.monotonic()
            wait_alone(secondary)
            time.sleep(3)
            talker.stop()
        (card,) = stats["cards"]
        assert card["released" if mode == "hybrid" else "committed"] >= len(talker.times) / 4, stats
        before = sum(end < killed for _, end in talker.times)
        gap = min(end for _, end in talker.times if end > killed) - killed
        assert gap < GAP
        assert len(talker.times) > before + 10
        secondary.quit()
