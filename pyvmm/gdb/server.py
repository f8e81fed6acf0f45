"""Where a debugger connects. Everything happens in the machine's loop, but what vCPU threads notice.

::

    gdb --- socket --- GdbServer: Session -------------------> Debugger ------ pause, resume, KVM_SET_GUEST_DEBUG
                         packets.py   |   registers.py            ^  breakpoints.py
                                      |   linear_memory.py        |
                                      +-- monitor ...             | "stop": a vCPU's breakpoint, watchpoint, step
                                                               vCPU threads (machine/exit_handler.py, debug_hook.py)

One debugger at a time: a second one is told so and let go. One that vanishes, or does not read what it is sent, leaves
no breakpoint behind, and the guest goes on. While nobody is connected nothing here costs a vCPU anything.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from typing import TYPE_CHECKING

from pyvmm.arch.x86.control_registers import long_mode
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.gdb.debugger import Debugger
from pyvmm.gdb.packets import PACKET_MAX, encode
from pyvmm.gdb.session import MonitorCommand, Session, SessionEnd
from pyvmm.gdb.stops import Exited, Stop
from pyvmm.gdb.target_description import ARCHITECTURES, TargetDescription
from pyvmm.host.debug_facilities import debug_facilities
from pyvmm.machine.run_state import RunState
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine

T = trace_group("gdb")

UNSENT_MAX = 1 << 20
"""Bytes that may wait for a client that does not read, before it is let go."""
REFUSED_MAX = 4
REFUSED_SECONDS = 2.0
_PIECE = 4096
"""Bytes taken at once: a client that asks for much at once does not keep the loop from the others."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def parse_option(option: str) -> tuple[str, str | None]:
    """(address, architecture or ``None``) of ``tcp:HOST:PORT[,arch=NAME]``; ConfigError."""
    address, _, rest = option.partition(",")
    if not rest:
        return address, None
    name, _, value = rest.partition("=")
    if name != "arch" or value not in ARCHITECTURES:
        raise ConfigError(f"--gdb {option}: only ,arch= may follow, one of {', '.join(ARCHITECTURES)}")
    return address, value


class GdbServer:
    """Owns the client's socket, not the listener. ``label`` is where it listens; ``architecture``: see parse_option."""

    def __init__(
        self,
        machine: Machine,
        listener: socket.socket,
        label: str,
        monitor: MonitorCommand,
        architecture: str | None = None,
    ) -> None:
        self._machine = machine
        self._listener = listener
        self.label = label
        self._monitor = monitor
        self._architecture = architecture
        self._client: socket.socket | None = None
        self._debugger: Debugger | None = None
        self._session: Session | None = None
        self._unsent = bytearray()
        self._writing = False
        self._refused: set[socket.socket] = set()
        debug_facilities()  # measured now, not while the first debugger waits
        machine.loop.add_reader(listener.fileno(), self._accept)

    def close(self) -> None:
        """Let everybody go. In the loop's thread, or after it."""
        self._machine.loop.remove_reader(self._listener.fileno())
        self._drop("the server ends")
        for client in list(self._refused):
            self._end_refusal(client)

    # -- clients --------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # gone again; or no descriptors, then it is tried with the next event
        client.setblocking(False)
        if client.family in (socket.AF_INET, socket.AF_INET6):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                client.setsockopt(socket.IPPROTO_TCP, option, value)
        for _ in range(PACKET_MAX // _PIECE + 1):  # it may have hung up, and the news of both come together
            if self._client is None or not self._read():
                break
        if self._client is not None:
            self._refuse(client, "another debugger is connected")
            return
        debugger = Debugger(self._machine, self._tell)
        try:
            debugger.attach()
        except PyvmmError as error:
            self._refuse(client, str(error))
            return
        T.gdb_connect.on and T.gdb_connect(self.label)
        description = TargetDescription(self._architecture or self._architecture_now())
        self._client, self._debugger = client, debugger
        self._session = Session(self._machine, debugger, description, self._send, self._monitor)
        self._machine.loop.add_reader(client.fileno(), self._readable)

    def _architecture_now(self) -> str:
        """Asked for once a connection. A kernel that has not run yet is taken for one that will be in 64-bit mode."""
        machine = self._machine
        with machine.standing_still():
            sregs = machine.vcpus[0].get_sregs()
        kind = machine.image.kind if machine.image is not None else ""
        to_come = machine.run_state is RunState.PRELAUNCH and kind not in ("", "flat")
        if long_mode(sregs) or to_come or kind in ("vmlinux", "bzImage"):
            return "x86-64"
        return "i386" if sregs.cr0 & 1 else "i8086"

    def _tell(self, stop: Stop | Exited) -> None:
        if self._session is not None:
            try:
                self._session.told(stop)
            except SessionEnd as end:
                self._machine.loop.post(functools.partial(self._drop, str(end)))

    def _readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        """Serve what has arrived, if anything has."""
        assert self._client is not None and self._session is not None
        try:
            data = self._client.recv(_PIECE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._drop("it hung up")
            return True
        try:
            self._session.receive(data)
        except SessionEnd as end:
            self._drop(str(end))
        return True

    def _send(self, data: bytes) -> None:
        """Now, or when the client reads; SessionEnd: too much waits for it already."""
        self._unsent += data
        self._flush()
        if len(self._unsent) > UNSENT_MAX:
            raise SessionEnd("it does not read")

    def _flush(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            while self._unsent:
                del self._unsent[: client.send(self._unsent, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # the reader notices that it hung up
        if bool(self._unsent) != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._machine.loop.add_writer(client.fileno(), self._flush)
            else:
                self._machine.loop.remove_writer(client.fileno())

    def _drop(self, why: str) -> None:
        client, debugger = self._client, self._debugger
        if client is None or debugger is None:
            return
        T.gdb_disconnect.on and T.gdb_disconnect(self.label, why)
        self._client = self._debugger = self._session = None
        self._unsent.clear()
        self._writing = False
        self._machine.loop.remove_reader(client.fileno())
        self._machine.loop.remove_writer(client.fileno())
        client.close()
        debugger.detach()

    # -- those who come too late ------------------------------------------------------------------

    def _refuse(self, client: socket.socket, why: str) -> None:
        """GDB shows an error only as the answer to its first packet: wait for that, not for long."""
        T.gdb_refuse.on and T.gdb_refuse(self.label)
        if len(self._refused) >= REFUSED_MAX:
            client.close()
            return
        self._refused.add(client)
        loop = self._machine.loop

        def answer() -> None:
            with contextlib.suppress(OSError):
                if client.recv(_PIECE):
                    client.send(b"+" + encode(b"E." + why.encode()), socket.MSG_NOSIGNAL)
            self._end_refusal(client)

        loop.add_reader(client.fileno(), answer)
        loop.call_later(REFUSED_SECONDS, functools.partial(self._end_refusal, client))

    def _end_refusal(self, client: socket.socket) -> None:
        if client in self._refused:
            self._refused.remove(client)
            self._machine.loop.remove_reader(client.fileno())
            client.close()
