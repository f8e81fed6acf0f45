"""Looks at the machines while they run: each checkpoint that was made, and how many frames wait for one."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from pyvmm.demo.machines import Vm
from pyvmm.errors import PyvmmError
from pyvmm.qmp.client import QmpClient

EVERY = 0.1
"""Seconds between two looks."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``at`` as time.monotonic() says it, ``pause`` and ``received`` milliseconds, ``size`` bytes."""

    machine: str
    epoch: int
    at: float
    pause: float
    received: float
    pages: int
    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """Frames that the primary kept from its clients at that moment."""

    at: float
    frames: int


class Watch:
    """A thread, from the first :meth:`add` to :meth:`stop`; a machine that does not answer is watched no more."""

    def __init__(self) -> None:
        self.checkpoints: list[Checkpoint] = []
        self.held: list[Held] = []
        self.differences: dict[str, list[str]] = {}
        self._offset = time.time() - time.monotonic()
        self._clients: dict[str, QmpClient] = {}
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo watch")

    def add(self, vm: Vm) -> None:
        """Look at this one from now on."""
        client = vm.connect()
        with self._lock:
            self._clients[vm.name] = client
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """A last look, and the end. Harmless twice, and without a start."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(EVERY)
            with self._lock:
                clients = list(self._clients.items())
            waiting = 0
            for name, client in clients:
                try:
                    waiting += self._look(name, client)
                except PyvmmError:
                    client.close()
                    with self._lock:
                        del self._clients[name]
            self.held.append(Held(time.monotonic(), waiting))

    def _look(self, name: str, client: QmpClient) -> int:
        """How many frames wait there."""
        since = self._since.get(name, 0.0)
        for one in client.execute("query-colo-checkpoints", {"since": since}, oob=True):
            self._since[name] = max(self._since.get(name, 0.0), one["time"])
            self.checkpoints.append(Checkpoint(
                name, one["epoch"], one["time"] - self._offset, one["pause"], one["received"], one["pages"],
                one["size"], one["reason"],
            ))  # fmt: skip
        stats = client.execute("query-colo-stats", oob=True)
        self.differences[name] = [each["what"] for each in stats["differences"]]
        left = ("released", "committed", "refused")
        waiting = [int(card["primary-frames"]) - sum(int(card[each]) for each in left) for card in stats["cards"]]
        return max(0, sum(waiting))
