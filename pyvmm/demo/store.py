"""The Linux guest of the demo: guests/linux/store.c behind HTTP, and clients that keep one TCP connection each.

Every request and its answer is kept; in the end the whole log is read, and demo/history.py says whether one store that
never failed could have answered so. A client never connects again: a connection that is lost is a connection lost.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from pyvmm.demo.history import APPEND, ENTRY, LENGTH, READ, WRITE, Operation, log_problem, register_problem
from pyvmm.demo.topology import CLIENT, GUEST, Topology
from pyvmm.demo.workload import LOST_AFTER, Exchange, Verdict
from pyvmm.errors import ChannelError, ConfigError, DeadlineError
from pyvmm.machine.tiny_linux import find_initramfs, find_kernel

PORT = 80
PAUSE = 0.02
"""Seconds between two requests of a client."""
MIX = (APPEND,) * 5 + (ENTRY,) * 2 + (LENGTH,) * 2 + (READ,) * 2 + (WRITE,)
AHEAD = 32
"""Requests sent ahead when the whole log is read."""
ANSWER_MAX = 8192
TRY = 1.0
"""Seconds for one look whether the guest answers."""


def can_be_shown() -> bool:
    """Whether a kernel and a root file system have been built."""
    with contextlib.suppress(ConfigError):
        return bool(find_kernel(None) and find_initramfs(None))
    return False


class StoreLink:
    """One connection. Deadlines are in seconds of time.monotonic(). ChannelError: it is lost; DeadlineError."""

    def __init__(self, topology: Topology, until: float) -> None:
        self._socket = topology.client_socket(socket.SOCK_STREAM)
        self._input = b""
        try:
            self._socket.settimeout(max(0.01, until - time.monotonic()))
            self._socket.connect((GUEST, PORT))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            self._socket.close()
            raise ChannelError(f"cannot connect: {error}") from None

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        """A request; several may be sent before :meth:`receive` is called for the first of them."""
        try:
            self._socket.sendall(b"%s %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (
                method.encode(), path.encode(), len(body), body))  # fmt: skip
        except OSError as error:
            raise ChannelError(f"the connection is lost: {error}") from None

    def receive(self, until: float) -> bytes:
        """The body of the next answer. ChannelError also if it says anything but 200."""
        while (end := self._input.find(b"\r\n\r\n")) < 0:
            self._more(until)
        head = self._input[:end].split(b"\r\n")
        sizes = [line.partition(b":")[2] for line in head if line.lower().startswith(b"content-length:")]
        if not head[0].startswith(b"HTTP/1.1 200 ") or len(sizes) != 1 or not sizes[0].strip().isdigit():
            raise ChannelError(f"the store answered {head[0][:60]!r}")
        end += 4 + int(sizes[0])
        while len(self._input) < end:
            self._more(until)
        body, self._input = self._input[end - int(sizes[0]) : end], self._input[end:]
        return body

    def _more(self, until: float) -> None:
        if len(self._input) > ANSWER_MAX:
            raise ChannelError("the store answers without end")
        try:
            self._socket.settimeout(max(0.01, until - time.monotonic()))
            piece = self._socket.recv(65536)
        except TimeoutError:
            raise DeadlineError("no answer in time") from None
        except OSError as error:
            raise ChannelError(f"the connection is lost: {error}") from None
        if not piece:
            raise ChannelError("the guest closed the connection")
        self._input += piece

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class StoreClient:
    """One of them, on a thread of its own from :meth:`start` to :meth:`stop`."""

    def __init__(self, number: int, topology: Topology) -> None:
        self.number = number
        self.operations: list[Operation] = []
        """All that were asked; the last one perhaps without an answer."""
        self.problem: str | None = None
        self._topology = topology
        self._random = random.Random(number)  # the same mix in every run
        self._known = 0
        """Entries that there are for sure."""
        self._until = float("inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"store client {number}")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        try:
            with contextlib.closing(StoreLink(self._topology, time.monotonic() + LOST_AFTER)) as link:
                number = 0
                while not self._stop.wait(PAUSE):
                    number += 1
                    self._ask(link, number)
        except (ChannelError, DeadlineError) as error:
            self.problem = f"client {self.number}: {error}"

    def _ask(self, link: StoreLink, number: int) -> None:
        kind = self._random.choice(MIX)
        kind = APPEND if kind == ENTRY and not self._known else kind
        place = self._random.randrange(self._known) if kind == ENTRY else None
        value = b"%d.%d" % (self.number, number) if kind in (APPEND, WRITE) else b""
        method, path = {
            APPEND: ("POST", "/append"), ENTRY: ("GET", f"/log/{place}"), LENGTH: ("GET", "/length"),
            READ: ("GET", "/register"), WRITE: ("PUT", "/register"),
        }[kind]  # fmt: skip
        asked = time.monotonic()
        try:
            link.send(method, path, value)
            while True:  # whoever stops this client may shorten the time for the answer that it waits for
                try:
                    got = link.receive(min(time.monotonic() + TRY, asked + LOST_AFTER, self._until))
                    break
                except DeadlineError:
                    if time.monotonic() >= min(asked + LOST_AFTER, self._until):
                        raise
        except (ChannelError, DeadlineError):
            self.operations.append(Operation(self.number, kind, asked, value=value))
            raise
        answered = time.monotonic()
        if kind in (APPEND, LENGTH):
            if not got.strip().isdigit():
                raise ChannelError(f"the store answered {kind} with {got[:60]!r}")
            place = int(got)
            self._known = max(self._known, place + (kind == APPEND))
        elif kind in (ENTRY, READ):
            value = got
        self.operations.append(Operation(self.number, kind, asked, answered, value, place))

    def stop(self, patience: float) -> None:
        """It ends with the request it is at, which has ``patience`` seconds left."""
        self._until = min(self._until, time.monotonic() + patience)
        self._stop.set()

    def join(self) -> None:
        """Wait for that."""
        if self._thread.ident is not None:
            self._thread.join(2 * LOST_AFTER)


class StoreWorkload:
    """See workload.Workload."""

    title = "Linux, a store behind HTTP"

    def __init__(self, topology: Topology) -> None:
        find_kernel(None)
        find_initramfs(None)
        self.words: tuple[str, ...] = ("linux", "--append", f"ip={GUEST}::{CLIENT}:255.255.255.0::eth0:off")
        self.first_words: tuple[str, ...] = ("--exec", f"/bin/store --port {PORT}")
        self._topology = topology
        self._clients: list[StoreClient] = []
        self._content: dict[int, bytes] = {}
        self._problem: str | None = None
        """Why the log could not be read in the end."""

    def wait_ready(self, seconds: float) -> None:
        """See Workload."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                with contextlib.closing(StoreLink(self._topology, time.monotonic() + TRY)) as link:
                    link.send("GET", "/length")
                    link.receive(time.monotonic() + TRY)
                    return
            except (ChannelError, DeadlineError):
                time.sleep(TRY / 4)  # it boots
        raise DeadlineError(f"the store does not answer within {seconds:g} s")

    def start(self, clients: int) -> None:
        """See Workload."""
        self._clients = [StoreClient(number, self._topology) for number in range(1, clients + 1)]
        for client in self._clients:
            client.start()

    def stop(self, patience: float = LOST_AFTER) -> None:
        """See Workload."""
        for client in self._clients:
            client.stop(patience)
        for client in self._clients:
            client.join()

    def read_all(self) -> None:
        """See Workload."""
        try:
            until = time.monotonic() + LOST_AFTER
            with contextlib.closing(StoreLink(self._topology, until)) as link:
                link.send("GET", "/length")
                length = int(link.receive(until))
                for begin in range(0, length, AHEAD):
                    places = range(begin, min(begin + AHEAD, length))
                    for place in places:
                        link.send("GET", f"/log/{place}")
                    for place in places:
                        self._content[place] = link.receive(time.monotonic() + LOST_AFTER)
        except (ChannelError, DeadlineError, ValueError) as error:
            self._problem = f"the log cannot be read in the end: {error}"

    def exchanges(self) -> list[Exchange]:
        """See Workload."""
        return [
            Exchange(client.number, number, one.asked, one.answered, one.kind)
            for client in self._clients
            for number, one in enumerate(list(client.operations), 1)
            if one.answered < float("inf")
        ]

    def verdict(self) -> Verdict:
        """See Workload."""
        operations = [one for client in self._clients for one in client.operations]
        problems = [client.problem for client in self._clients if client.problem is not None]
        return judge(operations, self._content, problems, self._problem)


def judge(
    operations: Sequence[Operation], content: Mapping[int, bytes], lost_connections: Sequence[str], problem: str | None
) -> Verdict:
    """``content``: the log as it was read in the end; ``problem``: why it could not be."""
    acknowledged = [one for one in operations if one.kind == APPEND and one.place is not None]
    lost = sum(content.get(one.place or 0) != one.value for one in acknowledged)
    wrong = problem or log_problem(operations, content) or register_problem(operations)
    if wrong is None and not acknowledged:
        wrong = "nothing was appended, so nothing could be lost"
    text = f"linearizable: {len(operations)} requests, {len(acknowledged)} appends, each there once"
    return Verdict(
        ok=wrong is None, text=wrong or text, connections_lost=len(lost_connections), writes_lost=lost,
        problems=[*lost_connections, *([wrong] if wrong else [])],
    )  # fmt: skip
