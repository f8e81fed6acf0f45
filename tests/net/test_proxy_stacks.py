"""The proxy between real TCP stacks: answers are found equal however they were cut, and a failover breaks nothing."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable

import pytest

from tests.framework.topology import Namespace
from tests.framework.two_guests import CLIENT, GUEST, Proxy, two_guests

DEADLINE = 60.0


def pattern(size: int) -> bytes:
    return (b"0123456789abcdefghijklmnopqrstuvwxyz-" * (size // 37 + 1))[:size]


class Client:
    """One connection to the service."""

    def __init__(self, space: Namespace) -> None:
        self.socket = space.call(lambda: socket.create_connection((GUEST, 80), DEADLINE))
        self.lines = self.socket.makefile("rb")

    def get(self, size: int) -> None:
        self.socket.sendall(b"GET %d\n" % size)
        assert self.lines.read(size) == pattern(size)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # who reads on another thread finds out
        self.lines.close()
        self.socket.close()


class Transfer(threading.Thread):
    """A large answer or a large request, on a thread; ``done`` bytes so far."""

    def __init__(self, space: Namespace, word: str, size: int) -> None:
        super().__init__(name=word)
        self.client = Client(space)
        self.word, self.size, self.done, self.right = word, size, 0, False
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            self.client.socket.sendall(f"{self.word} {self.size}\n".encode())
            data = pattern(self.size)
            if self.word == "PUT":
                while self.done < self.size:
                    self.client.socket.sendall(data[self.done : self.done + 8192])
                    self.done += 8192
                self.right = self.client.lines.readline().decode().strip() == hashlib.sha256(data).hexdigest()
                return
            got = b""
            while piece := self.client.lines.read1(min(65536, self.size - len(got))):
                got += piece
                self.done = len(got)
            self.right = got == data

    def end(self) -> None:
        self.client.close()
        self.join(DEADLINE)


class Churn(threading.Thread):
    """Short connections, one after the other: some are in every state at any moment. ``wrong`` should stay empty."""

    def __init__(self, space: Namespace) -> None:
        super().__init__(name="churn")
        self.space = space
        self.wrong: list[str] = []
        self.count = 0
        self.ending = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ending.is_set():
            try:
                client = Client(self.space)
                with contextlib.closing(client):
                    client.get(self.count * 997 % 30_000)
                    if self.count % 2:  # the client closes first, or both at once
                        client.socket.shutdown(socket.SHUT_WR)
                        assert client.lines.read() == b""
                self.count += 1
            except (OSError, AssertionError) as error:
                self.wrong.append(f"{self.count}: {error!r}")
                return

    def close(self) -> None:
        self.ending.set()
        self.join(DEADLINE)


def wait(proxy: Proxy, until: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not until():
        due = None if proxy.alone else proxy.compare.checkpoint_due  # there is no more primary to have one with
        assert time.monotonic() < end and proxy.error is None and due is None, (proxy.error, due)
        time.sleep(0.002)


@pytest.mark.timeout(180)
def test_what_only_the_secondary_has_lost_the_client_sends_again() -> None:
    """Long before ``compare_timeout``, though the primary has acknowledged it."""
    with two_guests() as (space, proxy), contextlib.ExitStack() as ending:
        upload = Transfer(space, "PUT", 8_000_000)
        ending.callback(upload.end)
        for part in range(1, 5):
            wait(proxy, lambda part=part: upload.done > part * 1_000_000)  # type: ignore[misc]
            proxy.secondary_misses = 6
        upload.join(DEADLINE)
        assert upload.right and proxy.secondary_misses == 0
        assert proxy.compare.checkpoint_due is None and proxy.error is None
        assert proxy.compare.counters()["acknowledged"] > 5


@pytest.mark.timeout(180)
@pytest.mark.parametrize("lose", [0, 30])
def test_connections_go_on_after_a_failover(lose: int) -> None:
    with two_guests(lose) as (space, proxy), contextlib.ExitStack() as ending:
        long = Client(space)
        ending.callback(long.close)
        for size in (1, 100, 5000, 200_000):
            long.get(size)

        listener = space.call(lambda: socket.create_server((CLIENT, 9000)))
        ending.callback(listener.close)
        listener.settimeout(DEADLINE)
        long.socket.sendall(b"CALL\n")
        assert long.lines.readline() == b"calling\n"
        called = listener.accept()[0]
        ending.callback(called.close)
        called.settimeout(DEADLINE)
        answers = called.makefile("rb")
        ending.callback(answers.close)

        def ping(number: int) -> None:
            called.sendall(b"ping %d\n" % number)
            assert answers.readline() == b"pong ping %d\n" % number

        for number in range(5):
            ping(number)

        transfers = [Transfer(space, "GET", 4_000_000), Transfer(space, "PUT", 2_000_000)]
        for each in transfers:
            ending.callback(each.end)
        half_closed = Client(space)
        ending.callback(half_closed.close)
        half_closed.socket.sendall(b"GET 3000000\n")
        half_closed.socket.shutdown(socket.SHUT_WR)
        churn = [Churn(space) for _ in range(3)]
        for one in churn:
            ending.callback(one.close)
        wait(proxy, lambda: all(each.done > each.size / 3 for each in transfers))
        assert proxy.compare.checkpoint_due is None
        before = proxy.compare.counters()["equal_bytes"]
        proxy.fail_over()
        for each in transfers:
            each.join(DEADLINE)
            assert each.right, (each.word, each.done)
        assert half_closed.lines.read() == pattern(3_000_000)
        for number in range(5, 10):
            ping(number)
        long.get(100_000)
        new = Client(space)
        ending.callback(new.close)
        new.get(1000)

        so_far = sum(one.count for one in churn)
        wait(proxy, lambda: sum(one.count for one in churn) > so_far + 20 or any(one.wrong for one in churn))
        for one in churn:
            one.close()
        assert [one.wrong for one in churn] == [[]] * 3

        assert proxy.error is None and before > 1_000_000
        counters = proxy.rewriter.counters()
        assert counters["learned"] >= 4 and counters["rewritten"] > 100
        assert proxy.offloaded > 50, "frames without a complete checksum went through"
        assert (proxy.lost > 10) == bool(lose)
