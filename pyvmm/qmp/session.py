"""One client of a monitor: what it says, in which order it is answered. No sockets here.

Protocol (QEMU's docs/interop/qmp-spec.txt): greeting; ``qmp_capabilities``; then commands, answered one after the
other in their order. With the capability ``oob`` a command may also come as ``exec-oob``: it overtakes those that
wait. At most ``WAITING_MAX`` commands wait; the client is not read from until one of them is answered, so a client
that keeps out-of-band commands working keeps fewer than that in flight (as QEMU's must).
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from pyvmm.qmp.commands import Command, find_command
from pyvmm.qmp.errors import ErrorClass, QmpError
from pyvmm.qmp.json_stream import JsonStream, StreamTooLong

WAITING_MAX = 8
UNSENT_MAX = 4 << 20
"""Bytes a client may leave unread before it is cut off."""
FDS_MAX = 4
"""Descriptors that may wait for a name."""
CAPABILITIES = ("oob",)


class Request(NamedTuple):
    """A command that waits for its turn, or the error that takes its place among the answers."""

    id: Any
    has_id: bool
    found: Command | None
    arguments: dict[str, Any]
    error: QmpError | None


class Session:
    """``start(session, request, oob)`` carries a command out and sees to it that :meth:`answered` is called.

    ``only``: the commands that this client may give, if those are not all.
    """

    def __init__(
        self, number: int, start: Callable[[Session, Request, bool], None], only: frozenset[str] | None = None
    ) -> None:
        self.number = number
        self.negotiated = False
        self.oob = False
        self.failed: str | None = None
        """Why the client must be cut off, if it must."""
        self._start = start
        self._only = only
        self._stream = JsonStream()
        self._waiting: deque[Request] = deque()
        self._busy = False
        self._unsent = bytearray()
        self._fds: deque[int] = deque()
        # Events and answers come from the loop's thread, too.
        self._lock = threading.Lock()

    # -- out ------------------------------------------------------------------------------------

    def send(self, document: dict[str, Any]) -> bytes:
        """Queue one line; from any thread. The line."""
        line = json.dumps(document).encode("ascii") + b"\r\n"
        self.send_line(line)
        return line

    def send_line(self, line: bytes) -> None:
        """Queue a line that is encoded already."""
        with self._lock:
            if self.failed is None:
                self._unsent += line
                if len(self._unsent) > UNSENT_MAX:
                    self._unsent.clear()
                    self.failed = "it does not read"

    def unsent(self) -> bytes:
        """The next bytes to send."""
        with self._lock:
            return bytes(self._unsent[:65536])

    def sent(self, count: int) -> None:
        """They are out."""
        with self._lock:
            del self._unsent[:count]

    # -- descriptors ----------------------------------------------------------------------------

    def receive_descriptors(self, fds: list[int]) -> None:
        """They came with SCM_RIGHTS and wait for ``getfd``; more than ``FDS_MAX`` are closed."""
        with self._lock:
            self._fds.extend(fds)
            surplus = [self._fds.pop() for _ in range(len(self._fds) - FDS_MAX)]
        for fd in surplus:
            os.close(fd)

    def take_received(self) -> int | None:
        """The oldest; the caller's from now on."""
        with self._lock:
            return self._fds.popleft() if self._fds else None

    def close_descriptors(self) -> None:
        """Nobody will ask for them any more."""
        while (fd := self.take_received()) is not None:
            os.close(fd)

    # -- in -------------------------------------------------------------------------------------

    @property
    def wants_input(self) -> bool:
        """Whether more may be read."""
        return self.failed is None and len(self._waiting) < WAITING_MAX

    def receive(self, data: bytes) -> None:
        """Take what the client sent."""
        self._stream.feed(data)
        self.proceed()

    def answered(self, request: Request, answer: dict[str, Any], oob: bool) -> bytes:
        """From any thread: ``request`` has its ``return`` or ``error``. The monitor's thread then calls proceed()."""
        line = self.send(answer | ({"id": request.id} if request.has_id else {}))
        if not oob:
            self._busy = False
        return line

    def proceed(self) -> None:
        """In the monitor's thread: look at what came, start what may start."""
        while True:
            self._start_next()
            if not self.wants_input or not self._take_message():
                return

    def _start_next(self) -> None:
        while self._waiting and not self._busy:
            request = self._in_its_mode(self._waiting.popleft())
            if request.error is not None:
                self.answered(request, {"error": request.error.document()}, oob=False)
            else:
                self._busy = True
                self._start(self, request, False)

    def _in_its_mode(self, request: Request) -> Request:
        """``request``, or the error it is before or after the negotiation of capabilities."""
        negotiates = request.found is not None and request.found.name == "qmp_capabilities"
        if request.error is not None and request.error.error_class is not ErrorClass.COMMAND_NOT_FOUND:
            return request
        if self.negotiated and negotiates:
            text = "Capabilities negotiation is already complete, command ignored"
        elif not self.negotiated and not negotiates:
            text = "Expecting capabilities negotiation with 'qmp_capabilities'"
        else:
            return request
        return request._replace(error=QmpError(text, ErrorClass.COMMAND_NOT_FOUND))

    def _take_message(self) -> bool:
        try:
            message = self._stream.take()
        except EOFError:
            return False
        except StreamTooLong as error:
            self.send({"error": error.document()})
            self.failed = str(error)
            return False
        except QmpError as error:
            self._waiting.append(Request(None, False, None, {}, error))
            return True
        request, oob = self._understand(message)
        if oob and request.error is None:
            self._start(self, request, True)
        elif oob:
            assert request.error is not None
            self.answered(request, {"error": request.error.document()}, oob=True)
        else:
            self._waiting.append(request)
        return True

    def _understand(self, message: Any) -> tuple[Request, bool]:
        has_id = isinstance(message, dict) and "id" in message
        id_ = message["id"] if has_id else None
        oob = isinstance(message, dict) and "exec-oob" in message and "execute" not in message and self.oob
        try:
            found, arguments = self._checked(message)
        except QmpError as error:
            return Request(id_, has_id, None, {}, error), oob
        return Request(id_, has_id, found, arguments, None), oob

    def _checked(self, message: Any) -> tuple[Command, dict[str, Any]]:
        """(command, arguments) of a message; its mistakes in QEMU's words."""
        if not isinstance(message, dict):
            raise QmpError("QMP input must be a JSON object")
        known = {"execute", "arguments", "id"} | ({"exec-oob"} if self.oob else set())
        for member in message:
            if member not in known:
                raise QmpError(f"QMP input member '{member}' is unexpected")
        if "execute" in message and "exec-oob" in message:
            raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
        how = "exec-oob" if "exec-oob" in message else "execute"
        if how not in message:
            raise QmpError("QMP input lacks member 'execute'")
        name = message[how]
        if not isinstance(name, str):
            raise QmpError(f"QMP input member '{how}' must be a string")
        arguments = message.get("arguments", {})
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if self._only is not None and name not in self._only:
            raise QmpError(f"The command {name} is not for this client", ErrorClass.COMMAND_NOT_FOUND)
        found = find_command(name)
        if how == "exec-oob" and not found.allow_oob:
            raise QmpError(f"The command {name} does not support OOB")
        return found, arguments
