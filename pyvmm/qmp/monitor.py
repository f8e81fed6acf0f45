"""A machine's monitors: one thread for all of them, which sleeps until the first client comes.

The thread serves sockets and out-of-band commands, so that a client gets an answer even while the machine's loop is
stuck; every other command is carried out by the loop. What a client needs is imported when there is one.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pyvmm.errors import PyvmmError
from pyvmm.machine.ending import Ending
from pyvmm.machine.observer import MachineObserver
from pyvmm.qmp.endpoints import Endpoint

if TYPE_CHECKING:
    from pyvmm.colo.config import ColoConfig
    from pyvmm.colo.protection import Protection
    from pyvmm.colo.session import ExitReason, Role
    from pyvmm.machine.dirty_heat import DirtyHeat
    from pyvmm.machine.machine import Machine
    from pyvmm.migration.manager import MigrationManager
    from pyvmm.migration.parameters import MigrationStatus
    from pyvmm.qmp.debugging import GdbService
    from pyvmm.qmp.server import Server

END_DEADLINE = 3.0
DESCRIPTORS_MAX = 32
"""Named ones."""


class Monitor(MachineObserver):
    """Owns the thread, not the endpoints. A context manager; its end tells clients what there is to tell."""

    def __init__(self, machine: Machine, endpoints: list[Endpoint]) -> None:
        self.machine = machine
        self.endpoints = endpoints
        self._server: Server | None = None
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._migration: MigrationManager | None = None
        self._migration_lock = threading.Lock()
        self.protection: Protection | None = None
        """Of a machine that is set up for COLO."""
        self._descriptors: dict[str, int] = {}
        self._gdb: GdbService | None = None
        self._heat: DirtyHeat | None = None
        self._thread = threading.Thread(target=self._main, name="qmp", daemon=True)
        machine.observers.add(self)
        self._thread.start()

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """From any thread: send the event ``name`` (declared in events.py) to every client that has negotiated."""
        server = self._server
        if server is not None and not self._closing:
            server.emit(name, data)

    @property
    def migration(self) -> MigrationManager:
        """The machine's migrations, from any thread; what they need is imported when somebody asks for them."""
        with self._migration_lock:
            if self._migration is None:
                from pyvmm.migration.manager import MigrationManager

                self._migration = MigrationManager(self.machine, self._migration_status, self._migration_round)
            return self._migration

    def set_up_colo(self, config: ColoConfig) -> None:
        """The machine is to be protected, or to be a replica. ConfigError: it has what cannot be."""
        from pyvmm.colo.protection import Protection

        self.protection = Protection(self.machine, self.migration, config, self._colo_exit)

    def _colo_exit(self, role: Role, reason: ExitReason) -> None:
        self.emit("COLO_EXIT", {"mode": role, "reason": reason})

    def _migration_status(self, status: MigrationStatus) -> None:
        if self.migration.capabilities.events:
            self.emit("MIGRATION", {"status": status.value})

    def _migration_round(self, number: int) -> None:
        if self.migration.capabilities.events:
            self.emit("MIGRATION_PASS", {"pass": number})

    def set_gdb(self, service: GdbService | None) -> None:
        """In the loop's thread: the debugger's server from now on; the one before is closed."""
        old, self._gdb = self._gdb, service
        if old is not None:
            old.close()

    @property
    def heat(self) -> DirtyHeat:
        """In the loop's thread: what counts the pages that the guest writes, while somebody asks."""
        if self._heat is None:
            from pyvmm.machine.dirty_heat import DirtyHeat

            self._heat = DirtyHeat(self.machine.dirty, self.machine.loop, self.machine.memory.regions)
        return self._heat

    def ring(self) -> None:
        """From any thread: have the server look at what there is to do."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def keep_descriptor(self, name: str, fd: int) -> bool:
        """``fd`` can be named in a URI, ``fd:NAME``; one of that name is closed. False: there are too many."""
        with self._lock:
            old = self._descriptors.pop(name, None)
            if len(self._descriptors) >= DESCRIPTORS_MAX:
                return False
            self._descriptors[name] = fd
        if old is not None:
            os.close(old)
        return True

    def take_descriptor(self, name: str) -> int | None:
        """The descriptor that a client sent as ``name``; the caller's from now on."""
        with self._lock:
            return self._descriptors.pop(name, None)

    def close(self) -> None:
        """End migrations, send what waits, with a deadline, and end. Called in the thread that ran the loop."""
        self.set_gdb(None)
        if self._heat is not None:
            with contextlib.suppress(PyvmmError):  # of a machine that ends
                self._heat.close()
        if self._migration is not None:
            self._migration.close()
        if self.protection is not None:
            self.protection.release()
        self._closing = True
        self.ring()
        self._thread.join(END_DEADLINE)
        if self._thread.is_alive():  # an out-of-band command that hangs keeps the descriptor
            return
        with self._lock:
            os.close(self._wake)
            self._wake = -1
            for fd in self._descriptors.values():
                os.close(fd)
            self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _main(self) -> None:
        if not any(endpoint.connected for endpoint in self.endpoints):  # those wait to be greeted
            poll = select.poll()
            for endpoint in self.endpoints:
                poll.register(endpoint.socket, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            poll.poll()
        if self._closing:
            return
        from pyvmm.qmp.server import Server

        self._server = Server(self, self._wake)
        self._server.run()

    @property
    def closing(self) -> bool:
        """Whether the server is to end."""
        return self._closing

    # -- the machine's news, in the loop's thread -------------------------------------------------

    def stopped(self) -> None:
        """STOP."""
        self.emit("STOP")

    def resumed(self) -> None:
        """RESUME."""
        self.emit("RESUME")

    def was_reset(self, source: str, by_guest: bool) -> None:
        """RESET."""
        self.emit("RESET", {"guest": by_guest, "reason": "guest-reset" if by_guest else "host-qmp-system-reset"})

    def ended(self, ending: Ending) -> None:
        """GUEST_PANICKED if it did, SHUTDOWN."""
        if self._server is not None:
            from pyvmm.qmp.events import tell_ending

            tell_ending(self, ending)
