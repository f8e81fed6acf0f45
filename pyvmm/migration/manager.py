"""What a machine has to do with migrations: the one that is under way, or was the last; limits and capabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from pyvmm.devices.device import Device
from pyvmm.errors import ConfigError, DeadlineError, StateError
from pyvmm.machine.ending import Ending
from pyvmm.machine.machine import Machine
from pyvmm.machine.observer import MachineObserver
from pyvmm.machine.run_state import RunState
from pyvmm.migration.announcer import Announcer
from pyvmm.migration.channel import Channel, Listener, parse_uri
from pyvmm.migration.dirty_rate import DirtyRateMeter
from pyvmm.migration.incoming import IncomingMigration
from pyvmm.migration.live_machine import LiveMachine
from pyvmm.migration.outgoing import OutgoingMigration
from pyvmm.migration.parameters import Capabilities, MigrationStatus, Parameters

CLOSE_DEADLINE = 12.0
ENDED_DEADLINE = 5.0
"""Seconds for telling a secondary that the guest has ended."""
_TURN = 0.05
INCOMING_FAILED = "incoming-failed"
EXIT_INCOMING = 125
ENDS_THE_PROCESS = frozenset({"quit", "vcpu-error", "colo-lost", INCOMING_FAILED})
"""Endings that are not the guest's: protected, it lives on elsewhere."""


class ColoHooks(Protocol):
    """What COLO does for a machine that has it; given to the manager by who sets a machine up for it."""

    def primary(self, channel: Channel, uri: str, entered: Callable[[], None]) -> None:
        """See outgoing.Colo."""

    def secondary(
        self, channel: Channel, payload: memoryview, listener: Listener, entered: Callable[[], None]
    ) -> None:
        """See incoming.Colo."""

    def give_up(self) -> None:
        """From the loop: the guest is not to be protected any more."""

    def guest_ended(self) -> None:
        """From the loop: it ended by its own doing."""

    @property
    def busy(self) -> bool:
        """Whether the other side is still to be told that the guest has ended."""

    def close(self) -> None:
        """From the loop: this process ends, and the guest may live on elsewhere."""


class MigrationManager(MachineObserver):
    """Owned by the machine's monitor. Everything is called in the loop's thread, but for what says otherwise.

    ``tell_status`` and ``tell_round`` are called on the migration's thread.
    """

    def __init__(
        self,
        machine: Machine,
        tell_status: Callable[[MigrationStatus], None] = lambda status: None,
        tell_round: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.parameters = Parameters()
        self.capabilities = Capabilities()
        self.outgoing: OutgoingMigration | None = None
        self.incoming: IncomingMigration | None = None
        self.colo: ColoHooks | None = None
        self.dirty_rate = DirtyRateMeter(machine.dirty, machine.loop)
        self._machine = machine
        self._live: LiveMachine | None = None
        self._announcer: Announcer | None = None
        self._tell_status = tell_status
        self._tell_round = tell_round
        machine.observers.add(self)

    # -- for anybody, from any thread -------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether the machine's memory is being sent or received."""
        if self.outgoing is not None and self.outgoing.status.under_way:
            return True
        return self.incoming is not None and self.incoming.status.under_way

    @property
    def status(self) -> MigrationStatus:
        """Of the migration that is or was."""
        either = self.outgoing or self.incoming
        return either.status if either is not None else MigrationStatus.NONE

    def refuse_while_under_way(self) -> None:
        """StateError for what cannot be done meanwhile: a snapshot, another migration."""
        if self.under_way:
            raise StateError("There's a migration process in progress")

    # -- as the source ----------------------------------------------------------------------------

    def migrate(self, uri: str) -> None:
        """Begin to move the guest to ``uri``. ConfigError: no URI. StateError: there is nothing that could be moved."""
        parse_uri(uri)
        self.refuse_while_under_way()
        machine = self._machine
        if machine.run_state is RunState.INMIGRATE:
            raise StateError("Guest is waiting for an incoming migration")
        if machine.run_state is RunState.POSTMIGRATE:
            raise StateError("Can't migrate the vm that was paused due to previous migration")
        if machine.ending is not None:
            raise StateError(f"the guest has ended ({machine.ending.kind}); there is nothing to migrate")
        if machine.run_state is RunState.PRELAUNCH:
            machine.pause()  # an untouched guest is moved like a paused one
        self.dirty_rate.give_up()
        self._live = self._live or self._make_live()
        self.outgoing = OutgoingMigration(
            self._live, uri, self.parameters, self.capabilities, post=machine.loop.post,
            observe=self._tell_status, observe_round=self._tell_round,
            colo=self.colo.primary if self.colo is not None else None,
        )  # fmt: skip
        self.outgoing.start()

    def cancel(self) -> None:
        """End the outgoing migration, or the protection, if there is one that can be."""
        if self.colo is not None and self.status is MigrationStatus.COLO:
            self.colo.give_up()
        elif self.outgoing is not None:
            self.outgoing.cancel()

    def set_parameters(self, parameters: Parameters) -> None:
        """What counts from now on, also for a migration under way."""
        self.parameters = parameters
        if self.outgoing is not None:
            self.outgoing.set_parameters(parameters)

    def set_capabilities(self, capabilities: Capabilities) -> None:
        """What the next migration has. StateError while there is one, or for what this machine is not set up for."""
        self.refuse_while_under_way()
        if capabilities.x_colo and self.colo is None:
            raise StateError("COLO is not configured: start the machine with --colo primary --arbiter A")
        self.capabilities = capabilities

    def announce(self, parameters: Parameters, wanted: Callable[[Device], bool]) -> None:
        """Tell the network where the guest is, by these devices, as often as ``parameters`` say. It takes the place of
        an announcement by hand that is under way. StateError: the guest is not here.
        """
        if self._machine.run_state is not RunState.RUNNING:
            raise StateError(f"nobody to announce: the guest does not run here ({self._machine.run_state.value})")
        if self._announcer is not None:
            self._announcer.stop()
        self._announcer = Announcer(self._machine, lambda: parameters, wanted)
        self._announcer.start()

    def before_resume(self) -> None:
        """The guest is about to be let run by hand. StateError, HostError: it is not this machine's to run."""
        if self._machine.run_state is RunState.INMIGRATE:
            raise StateError("Guest is waiting for an incoming migration")
        if self._machine.run_state is RunState.COLO:
            raise StateError("Guest is a replica: it runs when its primary is gone")
        if self.standing_still:
            raise StateError("the migration is about to hand the guest over; cancel it first (migrate_cancel)")
        if self._live is not None:
            self._live.take_back()  # its disks, if they were let go

    @property
    def standing_still(self) -> bool:
        """Whether the guest is between two machines now: all that may happen is that it is handed over, or not."""
        return self.outgoing is not None and self.outgoing.standing_still

    # -- as the destination -----------------------------------------------------------------------

    def listen(self, uri: str) -> None:
        """Wait for a guest at ``uri``; ConfigError if that cannot be. If it does not arrive whole the machine ends."""
        machine = self._machine
        if self.incoming is not None:
            raise StateError("The incoming migration has already been started")
        if not machine.config.incoming:
            raise StateError("'-incoming' was not specified on the command line")
        listener = Listener(uri, several=self.colo is not None)
        self.incoming = IncomingMigration(
            listener, self._make_live(), self.parameters, post=machine.loop.post, fail=self._incoming_failed,
            observe=self._tell_status, colo=self.colo.secondary if self.colo is not None else None,
        )  # fmt: skip
        self.incoming.start()

    def _make_live(self) -> LiveMachine:
        return LiveMachine(self._machine, lambda: self.parameters)

    def _incoming_failed(self, reason: str) -> None:
        self._machine.request_end(Ending(
            kind=INCOMING_FAILED, status=EXIT_INCOMING, reason=f"incoming migration failed: {reason}"
        ))  # fmt: skip

    # -- the machine's news -----------------------------------------------------------------------

    def ended(self, ending: Ending) -> None:
        """There is nothing left to move."""
        self.dirty_rate.give_up()
        if self.colo is None or self.status is not MigrationStatus.COLO:
            self.cancel()
        elif ending.kind in ENDS_THE_PROCESS:
            self.colo.close()
        else:
            self.colo.guest_ended()

    def close(self) -> None:
        """End what is under way, in the thread that ran the loop: what migrations ask of the loop is done here.

        DeadlineError if that does not work.
        """
        self.dirty_rate.give_up()
        if self.colo is not None:
            deadline = time.monotonic() + ENDED_DEADLINE
            while self.colo.busy and time.monotonic() < deadline:
                self._machine.loop.run_once(_TURN)
            self.colo.close()
        self.cancel()
        if self.incoming is not None:
            self.incoming.give_up()
        deadline = time.monotonic() + CLOSE_DEADLINE
        for side in (self.outgoing, self.incoming):
            while side is not None and side.alive:
                if time.monotonic() > deadline:
                    raise DeadlineError(f"the migration did not end within {CLOSE_DEADLINE:g} s")
                self._machine.loop.run_once(_TURN)


def check_incoming(uri: str) -> None:
    """ConfigError unless ``--incoming`` can be that."""
    if uri != "defer":
        try:
            parse_uri(uri)
        except ConfigError as error:
            raise ConfigError(f"--incoming {error}, or defer") from None
