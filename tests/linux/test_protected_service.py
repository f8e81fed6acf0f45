"""A TCP connection to a Linux guest lives on when the guest's primary is killed, and when the next one is; and answers
that are not alike.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.framework.migrating import Side
from tests.framework.net_commands import demo_host
from tests.framework.pairs import PATIENT, Pair, colo_stats, pairs, wait_alone, wait_protected
from tests.framework.topology import Namespace

pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(300)]
GUEST, PORT, STORE = "10.91.0.2", 7, 80
SERVER = f"nc -ll -p {PORT} -e cat & store --port {STORE} & sleep 1; echo serv''ing\n"
MODES = {"hybrid": 2000, "periodic": 100}
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


def ask(host: Namespace, path: str) -> bytes:
    """A request on a connection of its own."""

    def inside() -> bytes:
        connection = http.client.HTTPConnection(GUEST, STORE, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read()
        finally:
            connection.close()

    return host.call(inside)


def check_that_answers_may_differ(host: Namespace, side: Side) -> None:
    """A client gets one of the two, after a checkpoint that makes it the only one; and people are told why."""
    assert ask(host, "/length") == b"0\n"
    for _ in range(3):
        assert len(ask(host, "/random")) == 33
    stats = colo_stats(side)
    reasons = {one["reason"]: one["count"] for one in stats["reasons"]}
    assert reasons.get("payload", 0) >= 2, stats  # the third may be under way yet
    assert any(f"{GUEST}:{STORE}" in one["what"] and "the bytes differ" in one["what"] for one in stats["differences"])


def protect(pair: Pair, side: Side, host: Namespace, mode: str) -> Side:
    """A new secondary for ``side``."""
    secondary = pair.secondary(*PATIENT, command="linux", inside=host)
    parameters = {"x-colo-mode": mode, "x-checkpoint-delay": MODES[mode]}
    side.qmp.execute("migrate-set-parameters", parameters)
    side.qmp.execute("x-colo-protect", {"uri": pair.uri_of(secondary.name)})
    wait_protected(side)
    return secondary


def test_a_connection_lives_on_twice(tmp_path: Path) -> None:
    """The same one: the second pair's proxy goes on with what the first failover left of differences."""
    with demo_host() as host, pairs(tmp_path, ("--net", "demo")) as pair:
        side = pair.primary(None, command="linux", inside=host)
        side.wait_for_text(b"# ", 200)
        assert side.process.stdin is not None
        side.process.stdin.write(SERVER.encode())
        side.process.stdin.flush()
        side.wait_for_text(b"serving\r\n", 60)
        with host.call(lambda: socket.create_connection((GUEST, PORT), timeout=20)) as connection:
            talker = Talker(connection)
            for mode in MODES:
                secondary = protect(pair, side, host, mode)
                said = len(talker.times)
                time.sleep(2)
                (card,) = colo_stats(side)["cards"]
                assert card["released" if mode == "hybrid" else "committed"] >= (len(talker.times) - said) / 4, card
                if mode == "hybrid":
                    check_that_answers_may_differ(host, side)
                side.kill()
                killed = time.monotonic()
                wait_alone(secondary)
                time.sleep(2)
                gap = min(end for _, end in talker.times if end > killed) - killed
                assert gap < GAP, mode
                side = secondary
            said = len(talker.times)
            time.sleep(1)
            assert len(talker.times) > said + 5
            talker.stop()
        side.quit()
