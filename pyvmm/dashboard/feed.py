"""The side that faces the VMM: one thread, which asks for the machine's state while somebody looks, and never else."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pyvmm.dashboard.state import StateReader
from pyvmm.errors import DeadlineError, HostError, PyvmmError
from pyvmm.machine.event_loop import clear_eventfd
from pyvmm.qmp.client import CommandError, QmpClient

INTERVAL = 0.5
"""Seconds between two looks."""
TIMEOUT = 5.0
"""Seconds that a machine may take to answer."""
EVENTS_MAX = 50
"""The last ones; kept for who comes to look."""
ORDERS_MAX = 4


class Feed:
    """``publish`` is given each state, ``ended`` is called when the VMM has hung up; both on the feed's thread."""

    def __init__(
        self, link: socket.socket, publish: Callable[[dict[str, Any]], None], ended: Callable[[], None]
    ) -> None:
        self._link = link
        self._publish = publish
        self._ended = ended
        self._watched = False
        self._orders: deque[tuple[str, Future[None]]] = deque()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._main, name="feed", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def watch(self, watched: bool) -> None:
        """From any thread: whether somebody looks."""
        self._watched = watched
        os.eventfd_write(self._wake, 1)

    def order(self, command: str) -> Future[None]:
        """From any thread: have the machine carry ``command`` out. A PyvmmError comes of it, or nothing."""
        done: Future[None] = Future()
        if len(self._orders) >= ORDERS_MAX:
            done.set_exception(DeadlineError("the machine has not carried out what was asked of it before"))
        else:
            self._orders.append((command, done))
            os.eventfd_write(self._wake, 1)
        return done

    def _main(self) -> None:
        try:
            with QmpClient(self._link, "dashboard", TIMEOUT) as client:
                self._serve(client, StateReader(client))
        except PyvmmError:
            pass  # the VMM has ended, or has had enough of a dashboard that was stopped for long
        finally:
            self._ended()

    def _serve(self, client: QmpClient, reader: StateReader) -> None:
        due, poll = 0.0, select.poll()
        for fd in (self._link.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        while True:
            left = max(0.0, due - time.monotonic()) * 1000 if self._watched else None
            ready = {fd for fd, _ in poll.poll(left)}
            if self._wake in ready:
                clear_eventfd(self._wake)
            if self._link.fileno() in ready:
                while (event := client.next_event(0.0)) is not None:
                    self._note(event)
            while self._orders:
                self._carry_out(client, *self._orders.popleft())
                due = 0.0
            if self._watched and time.monotonic() >= due:
                due = time.monotonic() + INTERVAL
                self._look(client, reader)

    def _look(self, client: QmpClient, reader: StateReader) -> None:
        try:
            state = reader.read()
        except (DeadlineError, CommandError) as error:
            state = {"problem": str(error)}
        while client.events:
            self._note(client.events.pop(0))
        self._publish({**state, "events": list(self._events)})

    def _note(self, event: dict[str, Any]) -> None:
        if "event" not in event:  # the answer to something that was given up
            return
        stamp = event.get("timestamp", {})
        at = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        self._events.append({"at": at, "name": event["event"], "data": event.get("data", {})})

    @staticmethod
    def _carry_out(client: QmpClient, command: str, done: Future[None]) -> None:
        try:
            client.execute(command, oob=True)
        except HostError as error:
            done.set_exception(error)
            raise
        except PyvmmError as error:
            done.set_exception(error)
        else:
            done.set_result(None)
