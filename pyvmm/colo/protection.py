"""A machine set up for COLO: what its migrations call when they become a pair (migration/manager.py, ColoHooks)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from pyvmm.colo.cards import PrimaryCards, SecondaryCards
from pyvmm.colo.config import ColoConfig, check_plaintext
from pyvmm.colo.disks import PrimaryDisks, SecondaryDisks
from pyvmm.colo.metrics import serve_metrics
from pyvmm.colo.primary import Primary
from pyvmm.colo.replicated_machine import ReplicatedMachine, check_devices
from pyvmm.colo.secondary import Secondary
from pyvmm.colo.session import ColoSession, ExitReason, Role
from pyvmm.errors import StateError
from pyvmm.machine.machine import Machine
from pyvmm.machine.observer import MachineObserver
from pyvmm.migration.channel import Channel, Listener
from pyvmm.migration.manager import MigrationManager


class Protection(MachineObserver):
    """Owned by the machine's monitor. ``tell_exit`` is called on the thread that owned the replication."""

    def __init__(
        self,
        machine: Machine,
        manager: MigrationManager,
        config: ColoConfig,
        tell_exit: Callable[[Role, ExitReason], None] = lambda role, reason: None,
    ) -> None:
        check_devices(machine.config.devices)
        self.session = ColoSession(config, machine.config.name)
        self.session.on_exit = tell_exit
        self._end_metrics = serve_metrics(config.metrics, self.session) if config.metrics is not None else lambda: None
        self._machine = machine
        self.cards: PrimaryCards | None = None
        """Of this side, if it is or was a primary."""
        self._manager = manager
        manager.colo = self
        machine.observers.add(self)

    def resumed(self) -> None:
        """By hand, after it was stopped by hand: the secondary is to know."""
        session = self.session
        if session.role == "primary" and not session.runs:
            session.ask_checkpoint("resumed")

    def protect(self, uri: str) -> None:
        """Begin to make a pair with the secondary that waits at ``uri``. ConfigError, StateError: that cannot be."""
        manager = self._manager
        check_plaintext(uri, manager.parameters.tls_creds, self.session.config)
        if self.session.role != "none":
            raise StateError(f"this VM is protected already, as the {self.session.role}")
        manager.set_capabilities(msgspec.structs.replace(manager.capabilities, x_colo=True))
        manager.migrate(uri)

    def release(self) -> None:
        """Give everything back; nobody waits any more."""
        self._end_metrics()
        self.session.release()

    # -- ColoHooks ------------------------------------------------------------------------------

    def primary(self, channel: Channel, uri: str, entered: Callable[[], None]) -> None:
        """On the migration's thread."""
        self.cards = PrimaryCards(self._machine, self.session, self.session.config.compare)
        Primary(
            self.session, ReplicatedMachine(self._machine), lambda: self._manager.parameters, self._machine.loop.post,
            self.cards, PrimaryDisks(self._machine, self.session),
        ).run(channel, uri, entered)  # fmt: skip

    def secondary(
        self, channel: Channel, payload: memoryview, listener: Listener, entered: Callable[[], None]
    ) -> None:
        """On the incoming migration's thread."""
        Secondary(
            self.session, ReplicatedMachine(self._machine), lambda: self._manager.parameters, self._machine.loop.post,
            listener, SecondaryCards(self._machine, self.session), SecondaryDisks(self._machine, self.session),
        ).run(channel, payload, entered)  # fmt: skip

    def give_up(self) -> None:
        """The pair is to be over; the arbiter says to whom the guest belongs then."""
        with contextlib.suppress(StateError):  # it is under way
            self.session.lost_heartbeat()

    def guest_ended(self) -> None:
        """The secondary is told."""
        self.session.ended()

    @property
    def busy(self) -> bool:
        """Whether the secondary is still to hear of the guest's end."""
        return self.session.guest_ended and self.session.role == "primary" and not self.session.failover_wanted

    def close(self) -> None:
        """What was not let out is not: the other side goes on from before."""
        if self._machine.backend.hold.mode == "hold":
            self._machine.backend.hold.set("discard")
        self.session.close()
