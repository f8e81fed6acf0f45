"""A small QMP client: what ``pyvmm``'s own commands speak to a running machine with."""

from __future__ import annotations

import json
import socket
import time
from types import TracebackType
from typing import Any, Self

from pyvmm.errors import ConfigError, DeadlineError, HostError, PyvmmError
from pyvmm.qmp.control import connect

TIMEOUT = 10.0
_LINE_MAX = 16 << 20


class CommandError(PyvmmError):
    """The machine refused a command; ``str()`` is its description."""

    def __init__(self, error_class: str, description: str) -> None:
        self.error_class = error_class
        super().__init__(description)


class QmpClient:
    """A negotiated connection; a context manager. Waits at most ``timeout`` seconds for an answer."""

    def __init__(self, link: socket.socket, label: str, timeout: float = TIMEOUT) -> None:
        self.label = label
        self.events: list[dict[str, Any]] = []
        """Those that came while an answer was awaited, oldest first."""
        self._link = link
        self._timeout = timeout
        self._buffer = bytearray()
        self._number = 0
        try:
            self.greeting: dict[str, Any] = self._line(time.monotonic() + timeout)
            if "QMP" not in self.greeting:
                raise HostError(f"{label}: does not speak QMP")
            self.execute("qmp_capabilities", {"enable": ["oob"]})
        except BaseException:
            link.close()
            raise

    def execute_with_descriptor(self, name: str, arguments: dict[str, Any], fd: int) -> Any:
        """The same, with a descriptor of the caller's that goes along; unix sockets only (HostError)."""
        if self._link.family != socket.AF_UNIX:
            raise HostError(f"{self.label}: a descriptor can be sent over a unix socket only")
        return self.execute(name, arguments, fd=fd)

    def execute(
        self, name: str, arguments: dict[str, Any] | None = None, *, oob: bool = False, fd: int | None = None
    ) -> Any:
        """The ``return`` member. CommandError if it is refused, DeadlineError, HostError if the machine is gone."""
        self._number += 1
        message: dict[str, Any] = {"exec-oob" if oob else "execute": name, "id": self._number}
        if arguments:
            message["arguments"] = arguments
        deadline = time.monotonic() + self._timeout
        try:
            self._link.settimeout(self._timeout)
            line = json.dumps(message).encode() + b"\n"
            if fd is not None:
                line = line[socket.send_fds(self._link, [line], [fd]) :]
            self._link.sendall(line)
        except TimeoutError:
            raise DeadlineError(f"{self.label}: takes no command within {self._timeout:g} s") from None
        except OSError as error:
            raise HostError(f"{self.label}: {error.strerror or error}; it has ended") from None
        while True:
            answer = self._line(deadline)
            if "event" in answer:
                self.events.append(answer)
            elif answer.get("id") == self._number:
                if "error" in answer:
                    raise CommandError(answer["error"]["class"], answer["error"]["desc"])
                return answer["return"]

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """The oldest event not yet taken; ``None`` if none comes in time. HostError if the machine is gone."""
        if self.events:
            return self.events.pop(0)
        try:
            return self._line(time.monotonic() + seconds)
        except DeadlineError:
            return None

    def wait_for_end(self, seconds: float) -> None:
        """Until the machine hangs up: its process is about to end. DeadlineError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._line(deadline)
            except HostError:
                return

    def close(self) -> None:
        """Hang up."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def peer_pid(self) -> int | None:
        """Process at the other end of a unix socket."""
        if self._link.family != socket.AF_UNIX:
            return None
        return int.from_bytes(self._link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")

    def _line(self, deadline: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _LINE_MAX:
                raise HostError(f"{self.label}: sends a line without end")
            try:
                self._link.settimeout(max(0.001, deadline - time.monotonic()))
                data = self._link.recv(65536)
            except TimeoutError:
                raise DeadlineError(f"{self.label}: no answer within its time; the machine may be stuck") from None
            except OSError as error:
                raise HostError(f"{self.label}: {error.strerror or error}; it has ended") from None
            if not data:
                raise HostError(f"{self.label}: hung up; it has ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            document = json.loads(line)
        except ValueError:
            raise HostError(f"{self.label}: does not speak QMP") from None
        if not isinstance(document, dict):
            raise HostError(f"{self.label}: does not speak QMP")
        return document


def open_client(machine: str, timeout: float = TIMEOUT) -> QmpClient:
    """A client of the running machine called ``machine``, or of the monitor at ``unix:PATH`` or ``tcp:HOST:PORT``."""
    kind, colon, rest = machine.partition(":")
    if not colon:
        return QmpClient(connect(machine, timeout), f"machine {machine}", timeout)
    try:
        if kind == "unix":
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.settimeout(timeout)
                link.connect(rest)
            except BaseException:
                link.close()
                raise
        elif kind == "tcp" and rest.rpartition(":")[2].isdecimal():
            host, _, port = rest.rpartition(":")
            link = socket.create_connection((host.strip("[]"), int(port)), timeout)
        else:
            raise ConfigError(f"{machine}: write a machine's name, unix:PATH or tcp:HOST:PORT")
    except (OSError, OverflowError) as error:
        raise HostError(f"{machine}: {getattr(error, 'strerror', None) or error}") from None
    return QmpClient(link, machine, timeout)
