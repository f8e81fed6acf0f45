"""The bare-metal guest (guests/net-echo) and its clients: numbered datagrams, each of which has to come back as it was.

UDP loses datagrams, so a client sends one again if it hears nothing; that is counted. The guest keeps nothing that a
client could miss: what is checked is that every request is answered, with its own answer.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from pathlib import Path

from pyvmm.demo.topology import GUEST, Topology
from pyvmm.demo.workload import LOST_AFTER, Exchange, Verdict
from pyvmm.errors import ConfigError, DeadlineError

ECHO_PORT = 7
AGAIN = 0.1
"""Seconds after which a datagram is sent again."""
PAUSE = 0.01
"""Seconds between two requests of a client."""
LIFETIME = "86400"
"""Seconds; guests.toml has 20, for one that waits for nobody."""
IMAGE = Path(__file__).resolve().parents[2] / "guests" / "net-echo"


class EchoClient:
    """One of them, on a thread of its own from :meth:`start` to :meth:`stop`."""

    def __init__(self, number: int, link: socket.socket) -> None:
        self.number = number
        self.exchanges: list[Exchange] = []
        self.repeated = 0
        self.problem: str | None = None
        self._link = link
        self._stop = threading.Event()
        self._until = math.inf
        self._thread = threading.Thread(target=self._run, name=f"echo client {number}")

    def start(self) -> None:
        """Begin."""
        self._link.settimeout(AGAIN)
        self._link.connect((GUEST, ECHO_PORT))
        self._thread.start()

    def ask(self, word: bytes, seconds: float) -> None:
        """Send ``word`` until it comes back. DeadlineError; ValueError: something else came."""
        until, tries = time.monotonic() + seconds, 0
        while time.monotonic() < min(until, self._until):
            self.repeated += tries > 0
            tries += 1
            try:
                self._link.send(word)
                while (answer := self._link.recv(2048)) != word:
                    if not answer.startswith(b"%d " % self.number):
                        raise ValueError(f"client {self.number} was told {answer[:60]!r}, not {word!r}")
                return  # others are late answers to what was sent again
            except (TimeoutError, ConnectionRefusedError):
                continue
            except OSError:  # nobody answers to the guest's address at the moment
                time.sleep(AGAIN)
        raise DeadlineError(f"client {self.number}: no answer within {seconds:g} s")

    def _run(self) -> None:
        number = 0
        try:
            while not self._stop.wait(PAUSE):
                number += 1
                began = time.monotonic()
                self.ask(b"%d %d" % (self.number, number), LOST_AFTER)
                self.exchanges.append(Exchange(self.number, number, began, time.monotonic(), "echo"))
        except (DeadlineError, ValueError) as error:
            self.problem = str(error)

    def stop(self, patience: float) -> None:
        """It ends with the request it is at, which has ``patience`` seconds left."""
        self._until = time.monotonic() + patience
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(2 * LOST_AFTER)
        self._link.close()


class EchoWorkload:
    """See workload.Workload."""

    title = "guests/net-echo (bare metal, UDP echo)"

    def __init__(self, topology: Topology) -> None:
        if not (IMAGE / "net-echo.elf").exists():
            raise ConfigError(f"{IMAGE}/net-echo.elf is missing: make guests builds it")
        self.words: tuple[str, ...] = ("run", str(IMAGE), "--append", f"ip={GUEST}", "--timeout", LIFETIME)
        self.first_words: tuple[str, ...] = ()
        self._topology = topology
        self._clients: list[EchoClient] = []

    def wait_ready(self, seconds: float) -> None:
        """See Workload."""
        link = self._topology.client_socket(socket.SOCK_DGRAM)
        with link:
            link.settimeout(AGAIN)
            link.connect((GUEST, ECHO_PORT))
            EchoClient(0, link).ask(b"0 ready", seconds)

    def start(self, clients: int) -> None:
        """See Workload."""
        for number in range(1, clients + 1):
            client = EchoClient(number, self._topology.client_socket(socket.SOCK_DGRAM))
            self._clients.append(client)
            client.start()

    def stop(self, patience: float = LOST_AFTER) -> None:
        """See Workload."""
        for client in self._clients:
            client.stop(patience)

    def read_all(self) -> None:
        """It keeps nothing."""

    def exchanges(self) -> list[Exchange]:
        """See Workload."""
        return [one for client in self._clients for one in list(client.exchanges)]

    def verdict(self) -> Verdict:
        """See Workload."""
        problems = [client.problem for client in self._clients if client.problem is not None]
        wrong = [text for text in problems if "was told" in text]
        answered = sum(len(client.exchanges) for client in self._clients)
        ok = not wrong and bool(answered) and all(client.exchanges for client in self._clients)
        text = f"{answered} answers, each that of its own request" if ok else "an answer was not its request's"
        return Verdict(
            ok=ok, text=text,
            connections_lost=len(problems) - len(wrong), problems=problems,
            repeated=sum(client.repeated for client in self._clients),
        )  # fmt: skip
