"""A machine as either side of a protected pair sees it. Everything here runs on the machine's loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyvmm.colo.cards import PrimaryCards, SecondaryCards
from pyvmm.colo.disks import PrimaryDisks, SecondaryDisks
from pyvmm.colo.staging import Staging
from pyvmm.errors import ConfigError
from pyvmm.machine.device_config import DeviceConfig, DiskConfig, NetConfig, RngConfig
from pyvmm.machine.ending import Ending
from pyvmm.machine.machine import Machine
from pyvmm.machine.output_hold import Mode as OutputMode
from pyvmm.machine.run_state import RunState
from pyvmm.migration.machine_state import StateReader, save_machine
from pyvmm.migration.sections import encode_sections

LOST = "colo-lost"
"""Kind of the ending of a machine whose guest the other side owns."""
EXIT_LOST = 125


class Copied(NamedTuple):
    """What the primary holds of a moment of its guest; the pages are in the staging buffer."""

    state: bytes
    running: bool
    """Whether the guest ran, and goes on."""
    save: float
    copy: float
    """Seconds."""


class ReplicatedMachine:
    """Of a primary or a secondary."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._paused_here = False
        self._reader = StateReader(machine)
        self._put_off: Callable[[], None] | None = None
        """What the replica would have done, had it been the guest."""

    # -- as the primary -------------------------------------------------------------------------

    def pause(self) -> None:
        """Let the guest stand still, if it runs."""
        if self.machine.ending is None and self.machine.run_state is RunState.RUNNING:
            self.machine.pause(RunState.COLO)
            self._paused_here = True

    def copy(self, staging: Staging, cards: PrimaryCards, disks: PrimaryDisks, epoch: int) -> Copied | None:
        """A moment of the guest, which stands still from here on: ``epoch`` begins. ``None``: it wants something that
        is in no state yet (its end, a reset); ask again after the loop has seen to it.
        """
        self.pause()
        if self.machine.requests_pending:
            return None
        self.machine.end_if_halted()
        began = time.perf_counter()
        state = encode_sections([*save_machine(self.machine), *cards.sections()])
        saved = time.perf_counter()
        sets = self.machine.dirty.harvest()
        try:
            staging.stage(sets)
        except BaseException:
            for pages in sets:
                pages.give_back()
            raise
        # Up to here is what the other side will know of.
        self.machine.backend.hold.mark()
        cards.begin_epoch(epoch)
        disks.mark(epoch)
        runs = self._paused_here and self.machine.run_state is RunState.COLO  # else it was stopped by hand meanwhile
        return Copied(state, runs, saved - began, time.perf_counter() - saved)

    def go_on(self) -> None:
        """The guest may run again, if it was this that held it."""
        if self._paused_here:
            self._paused_here = False
            if self.machine.ending is None and self.machine.run_state is RunState.COLO:
                self.machine.resume()

    def output(self, mode: OutputMode) -> None:
        """What becomes of what the guest says."""
        self.machine.backend.hold.set(mode)

    # -- as the secondary -----------------------------------------------------------------------

    def become_shadow(self) -> None:
        """What the guest does here is neither heard nor counts."""
        self.output("discard")
        self.machine.shadow = self._note_put_off
        if self.machine.run_state is not RunState.COLO:
            self.machine.pause(RunState.COLO)

    def _note_put_off(self, what: Callable[[], None]) -> None:
        self._put_off = what

    def suspend(self) -> None:
        """Let the replica stand still."""
        self.pause()

    def prepare(
        self, state: memoryview, cards: SecondaryCards, disks: SecondaryDisks, epoch: int
    ) -> Callable[[], None]:
        """Check saved state; SectionError. What applies it, with the memory in place."""
        sections = self._reader.decode(state)
        records = cards.decode(sections)
        apply = self._reader.prepare(sections)

        def carry_out() -> None:
            disks.commit(epoch)
            apply()
            cards.load(epoch, records)

        return carry_out

    def load(self, apply: Callable[[], None]) -> None:
        """Carry out what :meth:`prepare` gave. Whatever the replica had done is undone by it."""
        self.machine.collector.drain_ring()  # what the replica said goes where all it said went, not behind this
        apply()
        self._put_off = None

    def run_replica(self) -> None:
        """Let it run, hybrid: from a checkpoint on it does what the guest does, for as long as both answer alike."""
        self.machine.resume()
        self._paused_here = False

    def emerge(self, *, running: bool) -> None:
        """This is the guest now: ``running`` if it ran."""
        self.machine.shadow = None
        self.output("pass")
        put_off, self._put_off = self._put_off, None
        if put_off is not None:
            put_off()  # nothing runs meanwhile: it stands where it asked for that
        elif running and self.machine.run_state is not RunState.RUNNING:
            self.machine.resume()
        elif not running and self.machine.run_state is RunState.COLO:
            self.machine.pause(RunState.PAUSED)
        self._paused_here = False

    # -- either ---------------------------------------------------------------------------------

    def lose(self, reason: str) -> None:
        """The guest is the other side's: nothing of it runs or is heard here any more."""
        self.end(Ending(kind=LOST, status=EXIT_LOST, reason=reason, problem=reason))

    def end(self, ending: Ending) -> None:
        """From any thread: this machine is over, whatever becomes of the guest."""
        self.output("discard")
        self.machine.shadow = None
        self.machine.request_end(ending)


def check_devices(devices: Sequence[DeviceConfig]) -> None:
    """ConfigError names a device that would let out what is not committed, or whose state lies outside the guest."""
    for device in devices:
        if isinstance(device, NetConfig) and device.backend == "stream":
            raise ConfigError(f"--colo: --net {device.target}: a stream's peer cannot be shared by two; use a tap")
        if not isinstance(device, RngConfig | NetConfig | DiskConfig):
            kind = type(device).__name__.removesuffix("Config").lower()
            raise ConfigError(f"--colo: a machine with {kind} cannot be protected by this version; leave it out")
