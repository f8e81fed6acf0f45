"""A machine as either side of a live migration sees it (outgoing.Source, incoming.Target)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

from pyvmm.devices.state import decode_fields
from pyvmm.errors import HostError, SectionError, StateError
from pyvmm.machine.device_config import has_card
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.migration.announcer import Announcer
from pyvmm.migration.machine_state import (
    DESCRIPTION,
    Description,
    StateReader,
    check_description,
    describe,
    save_machine,
)
from pyvmm.migration.parameters import Parameters
from pyvmm.migration.sections import encode_sections
from pyvmm.net.cards import MovingCard
from pyvmm.trace import trace_group

T = trace_group("migration")

REHEARSALS = 2
"""The first makes what is made once; the second finds it."""


class LiveMachine:
    """Everything here runs on the machine's loop, but for the attributes."""

    def __init__(self, machine: Machine, parameters: Callable[[], Parameters] = Parameters) -> None:
        self.memory = machine.memory
        self.dirty = machine.dirty
        self._machine = machine
        self._reader = StateReader(machine)
        self._released = False
        self._announcer = Announcer(machine, parameters)

    def describe(self) -> dict[str, Any]:
        """What the other side must have, too; decoded by :meth:`differences`."""
        # A vCPU's ioctls wait until it leaves KVM_RUN, which a guest that polls memory never does by itself.
        with self._machine.standing_still():
            return msgspec.structs.asdict(describe(self._machine))

    def cards(self) -> tuple[MovingCard, ...]:
        """For :meth:`expect_cards` of the other side."""
        if not has_card(self._machine.config.devices):  # what is about networks need not be imported
            return ()
        from pyvmm.machine.network_leases import cards_of

        return cards_of(self._machine)

    # -- as a source ----------------------------------------------------------------------------

    def is_running(self) -> bool:
        """Whether the guest runs. StateError if it has ended: there is nothing to move."""
        self._check_alive()
        return self._machine.run_state is RunState.RUNNING

    def _check_alive(self) -> None:
        if self._machine.ending is not None:
            raise StateError(f"the guest has ended ({self._machine.ending.kind})")

    def pause(self) -> None:
        """Park vCPUs, finish what devices have under way."""
        self._machine.pause()

    def resume(self) -> None:
        """Go on here. The network may have been told otherwise already."""
        self._machine.resume()
        self._announcer.start()

    def save(self) -> bytes | None:
        """All state but RAM. StateError if the guest has ended meanwhile; ``None`` if it wants to, or a reset, which is
        in no state: ask again after the loop has seen to it.
        """
        self._check_alive()
        return None if self._machine.requests_pending else self._saved()

    def _saved(self) -> bytes:
        return encode_sections(save_machine(self._machine))

    def release(self) -> None:
        """Disks to the other side, everything written to them durable."""
        self._released = True
        try:
            for device in self._machine.devices:
                device.release()
        except OSError as error:
            raise HostError(f"a disk cannot be flushed: {error}") from None

    def reclaim(self) -> None:
        """Disks back. HostError if the other side has them: then the guest is not ours."""
        if self._released:
            for device in self._machine.devices:
                device.claim()
            self._released = False

    def take_back(self) -> None:
        """The guest is to run here although it was handed over. HostError: it runs elsewhere, as far as can be seen."""
        if self._released:
            for lease in self._machine.leases.values():
                lease.take_back()
            self.reclaim()
            self._announcer.start()

    def handed_over(self) -> None:
        """This machine is a shell now."""
        self._machine.pause(RunState.POSTMIGRATE)
        for device in self._machine.devices:
            device.left()
        for lease in self._machine.leases.values():
            with contextlib.suppress(HostError):  # then it is given up when this process ends
                lease.leave()

    def hold_vcpus(self, held: bool) -> None:
        """Slow the guest down."""
        self._machine.hold_vcpus(held)

    # -- as a target ----------------------------------------------------------------------------

    def differences(self, description: dict[str, Any]) -> str | None:
        """What of the source's machine does not fit this one, in one line."""
        try:
            with self._machine.standing_still():
                ours = describe(self._machine)
            check_description(decode_fields(DESCRIPTION, Description, description), ours)
        except SectionError as error:
            return str(error)
        return None

    def expect_cards(self, cards: tuple[MovingCard, ...]) -> None:
        """Have the leases of a guest with these cards. ConfigError, HostError."""
        if cards or has_card(self._machine.config.devices):
            from pyvmm.machine.network_leases import expect_cards

            expect_cards(self._machine, cards)

    def rehearse(self) -> None:
        """Save, decode and apply this machine's own state: the guest still runs at the source, and what is made when it
        is first used (milliseconds), or has cooled down in caches, is ready when it stands still. SectionError.
        """
        with self._machine.standing_still():
            for _ in range(REHEARSALS):
                self.load(memoryview(self._saved()))

    def source_stands_still(self) -> None:
        """Networks may send here."""
        for device in self._machine.devices:
            device.arriving()

    def load(self, state: memoryview) -> None:
        """Check all sections (SectionError) and apply them."""
        for mismatch in self._reader.prepare(self._reader.decode(state))():
            T.migration_incoming.on and T.migration_incoming(f"the host did not take {mismatch}")

    def take_over(self, running: bool) -> None:
        """The guest is ours."""
        for device in self._machine.devices:
            device.claim()
        if running and not self._machine.config.start_paused:
            self._machine.resume()
        else:
            self._machine.pause()
        self._announcer.start()
