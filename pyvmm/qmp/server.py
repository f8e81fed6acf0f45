"""The monitors' server: sockets, sessions, and the way of a command to the machine's loop and back.

::

    client --- socket ---> monitor thread: Session ---- exec-oob ----> carried out here
                               |    ^
                               |    | answer, event (queued under the session's lock, an eventfd wakes)
                               v    |
                            machine's loop: every other command

A client that does not read is cut off when ``UNSENT_MAX`` bytes wait for it; nobody ever waits for a client.
"""

from __future__ import annotations

import functools
import itertools
import selectors
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from pyvmm.machine.event_loop import clear_eventfd
from pyvmm.qmp.commands import Command, CommandContext, Place, carry_out
from pyvmm.qmp.endpoints import Endpoint
from pyvmm.qmp.errors import QmpError
from pyvmm.qmp.events import event_document
from pyvmm.qmp.session import CAPABILITIES, FDS_MAX, Request, Session
from pyvmm.qmp.version import version_document
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.qmp.monitor import Monitor

T = trace_group("qmp")

LAST_WORDS = 1.0
"""Seconds in which clients may read what waits when the machine has ended."""
_PIECE = 65536


class _Link:
    """A client's socket and its session."""

    def __init__(self, client: socket.socket, endpoint: Endpoint, session: Session) -> None:
        self.client = client
        self.endpoint = endpoint
        self.session = session
        self.watched = 0


class Server:
    """Runs in the monitor's thread; :meth:`emit` and a command's end come from others."""

    def __init__(self, monitor: Monitor, wake: int) -> None:
        self._monitor = monitor
        self._wake = wake
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake, selectors.EVENT_READ)
        self._links: list[_Link] = []
        self._numbers = itertools.count(1)
        for endpoint in monitor.endpoints:
            if endpoint.connected:
                self._greet(endpoint.socket, endpoint)
            else:
                self._selector.register(endpoint.socket, selectors.EVENT_READ, endpoint)

    def run(self) -> None:
        """Serve until the monitor closes."""
        try:
            for link in list(self._links):  # those that were connected from the start wait to be greeted
                self._attend(link)
            while not self._monitor.closing:
                self._serve(None)
            deadline = time.monotonic() + LAST_WORDS
            while any(link.session.unsent() for link in self._links) and time.monotonic() < deadline:
                self._serve(deadline - time.monotonic())
        finally:
            for link in list(self._links):
                self._drop(link, "the machine has ended")
            self._selector.close()

    def emit(self, name: str, data: dict[str, Any] | None) -> None:
        """From any thread."""
        document = event_document(name, data)
        for link in list(self._links):
            if link.session.negotiated and name not in link.endpoint.untold:
                line = link.session.send(document)
                T.qmp_event.on and T.qmp_event(line.decode().rstrip())
        self._monitor.ring()

    def _serve(self, seconds: float | None) -> None:
        for key, events in self._selector.select(seconds):
            if key.fd == self._wake:
                clear_eventfd(self._wake)
            elif isinstance(key.data, Endpoint):
                self._accept(key.data)
            elif key.data in self._links and events & selectors.EVENT_READ:
                self._read(key.data)
        for link in list(self._links):
            self._attend(link)

    # -- clients --------------------------------------------------------------------------------

    def _accept(self, endpoint: Endpoint) -> None:
        try:
            client, _ = endpoint.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            time.sleep(0.05)  # no descriptors: the client waits in the backlog, and asking again at once would spin
            return
        self._greet(client, endpoint)
        if sum(other.endpoint is endpoint for other in self._links) >= endpoint.clients:
            self._selector.unregister(endpoint.socket)

    def _greet(self, client: socket.socket, endpoint: Endpoint) -> None:
        client.setblocking(False)
        session = Session(next(self._numbers), self._start, endpoint.only)
        link = _Link(client, endpoint, session)
        self._links.append(link)
        T.qmp_connect.on and T.qmp_connect(endpoint.label, session.number)
        session.send({"QMP": {"version": version_document(), "capabilities": list(CAPABILITIES)}})

    def _read(self, link: _Link) -> None:
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(link.client, _PIECE, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        link.session.receive_descriptors(fds)
        if data:
            link.session.receive(data)
        else:
            self._drop(link, "it hung up")

    def _attend(self, link: _Link) -> None:
        """Go on with what became possible, send what can be sent, watch for what the session waits for."""
        session = link.session
        if not self._monitor.closing:
            session.proceed()
        try:
            while piece := session.unsent():
                session.sent(link.client.send(piece, socket.MSG_NOSIGNAL))
        except BlockingIOError:
            pass
        except OSError:
            self._drop(link, "it hung up")
            return
        if session.failed is not None:
            self._drop(link, session.failed)
            return
        wanted = selectors.EVENT_READ if session.wants_input else 0
        if session.unsent():
            wanted |= selectors.EVENT_WRITE
        if wanted != link.watched:
            if not wanted:
                self._selector.unregister(link.client)
            elif link.watched:
                self._selector.modify(link.client, wanted, link)
            else:
                self._selector.register(link.client, wanted, link)
            link.watched = wanted

    def _drop(self, link: _Link, why: str) -> None:
        T.qmp_disconnect.on and T.qmp_disconnect(link.endpoint.label, link.session.number, why)
        link.session.failed = why
        if link.watched:
            self._selector.unregister(link.client)
        link.client.close()
        link.session.close_descriptors()
        full = sum(other.endpoint is link.endpoint for other in self._links) >= link.endpoint.clients
        self._links.remove(link)
        if full and not link.endpoint.connected and not self._monitor.closing:
            self._selector.register(link.endpoint.socket, selectors.EVENT_READ, link.endpoint)

    # -- commands -------------------------------------------------------------------------------

    def _start(self, session: Session, request: Request, oob: bool) -> None:
        """Carry ``request`` out here or have the loop do it."""
        assert request.found is not None
        T.qmp_command.on and T.qmp_command(session.number, request.found.name, oob)
        work = functools.partial(self._work, session, request, request.found, oob)
        if oob or request.found.place is Place.MONITOR:
            work()
        else:
            self._monitor.machine.loop.post(work)

    def _work(self, session: Session, request: Request, found: Command, oob: bool) -> None:
        context = CommandContext(self._monitor.machine, self._monitor, session)
        answer: dict[str, Any]
        try:
            answer = {"return": carry_out(found, context, request.arguments)}
        except QmpError as error:
            answer = {"error": error.document()}
        except Exception as error:
            # A defect, told to both sides; a monitor's mistake is no reason to end the guest.
            text = f"internal error in {found.name}: {type(error).__name__}: {error}"
            print(f"pyvmm: QMP: {text}", file=sys.stderr, flush=True)
            answer = {"error": QmpError(text).document()}
        line = session.answered(request, answer, oob)
        T.qmp_answer.on and T.qmp_answer(session.number, line[:1000].decode().rstrip())
        self._monitor.ring()
