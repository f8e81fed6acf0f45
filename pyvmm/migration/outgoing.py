"""The source's side of a migration: rounds while the guest runs, a short standstill, the hand-over (protocol.py).

One thread per migration. It never touches the machine itself but asks the machine's loop to (``on_loop``), so that a
pause cannot fall between two things the loop does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from pyvmm.errors import ChannelError, DeadlineError, PyvmmError
from pyvmm.machine.dirty_tracker import DirtyTracker, PageSet
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory
from pyvmm.migration.channel import Channel, connect
from pyvmm.migration.loop_call import LOOP_DEADLINE, call_on_loop
from pyvmm.migration.parameters import Capabilities, MigrationStatus, Parameters
from pyvmm.migration.protocol import VERSION, Go, Hello, Message, check_version, expect, send_struct
from pyvmm.migration.ram import RamCounters, RamSender
from pyvmm.migration.standstill import without_collections
from pyvmm.migration.throttle import Throttle
from pyvmm.net.cards import MovingCard
from pyvmm.trace import trace_group

T = trace_group("migration")

CONNECT_DEADLINE = 10.0
SMALL = 64
"""Pages: so few are not worth a further round, however slow the link."""
FURTHER_ROUNDS = 4
"""Rounds at most that only make the standstill shorter."""

R = TypeVar("R")
Colo = Callable[[Channel, str, Callable[[], None]], None]
"""(channel, URI, what to call when the other side has agreed): makes a pair and returns when it is over and the guest
is this side's; PyvmmError if there never was one, or the guest is the other side's.
"""


class Source(Protocol):
    """What a migration needs of the machine; everything but ``memory`` and ``dirty`` is called on its loop."""

    memory: GuestMemory
    dirty: DirtyTracker

    def describe(self) -> dict[str, Any]:
        """What the destination must be like."""

    def cards(self) -> tuple[MovingCard, ...]:
        """Its network cards, and their places in networks."""

    def is_running(self) -> bool:
        """Whether the guest runs (a paused one is moved, too, and stays paused)."""

    def pause(self) -> None:
        """Stop the guest and finish what devices have under way."""

    def resume(self) -> None:
        """Let the guest run again."""

    def save(self) -> bytes | None:
        """All state but RAM; the guest is paused. ``None``: before that, the loop has to see to what it asked for."""

    def release(self) -> None:
        """Let go of disks, flushed, so that another process may write to them."""

    def reclaim(self) -> None:
        """Take them back: the other side did not get as far."""

    def handed_over(self) -> None:
        """The guest runs elsewhere, and its places in networks are there."""

    def hold_vcpus(self, held: bool) -> None:
        """Park vCPUs for a moment, or let them go on; the run state does not change."""


class OutgoingMigration:
    """One migration to ``uri``, from :meth:`start` to a status that is not ``under_way`` any more.

    ``observe(status)`` is called on the migration's thread with every new status; ``post`` runs a callback on the
    machine's loop soon. :meth:`set_parameters` counts at once.
    """

    def __init__(
        self,
        source: Source,
        uri: str,
        parameters: Parameters,
        capabilities: Capabilities,
        *,
        post: Callable[[Callable[[], None]], None],
        observe: Callable[[MigrationStatus], None] = lambda status: None,
        observe_round: Callable[[int], None] = lambda number: None,
        colo: Colo | None = None,
    ) -> None:
        self.uri = uri
        self.status = MigrationStatus.NONE
        self.problem: str | None = None
        """Why it failed."""
        self.counters = RamCounters()
        self.remaining_pages = 0
        """At the begin of this round."""
        self.standing_still = False
        """Whether the guest is about to be handed over: nobody but the migration may let it run."""
        self._pages_before = 0
        self.dirty_rate = 0.0
        """Pages a second, as the last round saw it."""
        self.bandwidth = 0.0
        """Bytes a second, likewise."""
        self.downtime_bytes = 0
        """Sent while the guest stood still."""
        self.downtime: float | None = None
        """Seconds the guest stood still here; ``None`` until it is over."""
        self.started_at = self.active_at = self.ended_at = 0.0
        self.capabilities = capabilities
        self._parameters = parameters
        self._source = source
        self._post = post
        self._observe = observe
        self._observe_round = observe_round
        self._colo = colo if capabilities.x_colo else None
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="migration", daemon=True)
        self._throttle = Throttle(lambda held: self._post(lambda: source.hold_vcpus(held)))
        self._paused_here = False
        self._handed_over = False

    # -- for others, from any thread ------------------------------------------------------------

    def start(self) -> None:
        """Begin; returns at once."""
        self.started_at = time.monotonic()
        self._change(MigrationStatus.SETUP)
        self._thread.start()

    def cancel(self) -> None:
        """Give up soon; the guest goes on here. Nothing happens once it was handed over, or is protected."""
        with self._lock:
            if not self.status.under_way or self.status is MigrationStatus.COLO or self._handed_over:
                return
            self.status = MigrationStatus.CANCELLING
            channel = self._channel
        self._observe(MigrationStatus.CANCELLING)
        if channel is not None:
            channel.abort()

    def set_parameters(self, parameters: Parameters) -> None:
        """Change limits on the way."""
        self._parameters = parameters

    def join(self, timeout: float) -> None:
        """Wait for the thread's end. DeadlineError if it does not come."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise DeadlineError(f"the migration did not end within {timeout:g} s")

    @property
    def alive(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread.is_alive()

    @property
    def remaining_bytes(self) -> int:
        """Of RAM, still to be sent, as far as is known."""
        return max(0, self.remaining_pages - (self.counters.pages - self._pages_before)) * PAGE_SIZE

    @property
    def parameters(self) -> Parameters:
        """The limits that count now."""
        return self._parameters

    @property
    def throttle_percentage(self) -> int:
        """How much the guest is slowed down now."""
        return self._throttle.percentage

    # -- the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._migrate()
        except PyvmmError as error:
            self._fail(str(error))
        except Exception as error:
            # A defect, but the guest is not to pay for it.
            self._fail(f"internal error: {type(error).__name__}: {error}")

    def _change(self, status: MigrationStatus) -> None:
        with self._lock:
            if self.status is MigrationStatus.CANCELLING and status.under_way:
                raise ChannelError("cancelled")
            self.status = status
            if not status.under_way:
                self.ended_at = time.monotonic()
        T.migration_status.on and T.migration_status(status.value)
        self._observe(status)

    def _on_loop(self, call: Callable[[], R]) -> R:
        return call_on_loop(self._post, call)

    def _migrate(self) -> None:
        source = self._source
        parameters = self._parameters
        channel = connect(
            self.uri, timeout=CONNECT_DEADLINE, stall=parameters.x_stall_timeout / 1000,
            tls_creds=parameters.tls_creds, tls_hostname=parameters.tls_hostname,
        )  # fmt: skip
        try:
            with self._lock:
                self._channel = channel
            hello = Hello(VERSION, self._on_loop(source.describe), self._on_loop(source.cards))
            send_struct(channel, Message.HELLO, hello)
            check_version(expect(channel, Message.HELLO)[1])
            self.active_at = time.monotonic()
            self._change(MigrationStatus.ACTIVE)
            sender = RamSender(
                channel, self.counters, lambda: self._parameters.max_bandwidth, compress=self.capabilities.compress
            )
            try:
                self._send_rounds(sender)
                if self._colo is not None:
                    self._throttle.stop()
                    self._colo(channel, self.uri, lambda: self._change(MigrationStatus.COLO))
                    self._change(MigrationStatus.COMPLETED)
                    return
                with without_collections():
                    self._finish(channel, sender)
            finally:
                self._throttle.stop()
                self._on_loop(source.dirty.stop)
        finally:
            channel.close()

    def _send_rounds(self, sender: RamSender) -> None:
        """Until what is left can be sent within the downtime allowed."""
        source = self._source
        self._on_loop(source.dirty.start)
        self.remaining_pages = sum(count for region in source.memory.regions for _, count in region.present())
        began, sent = time.monotonic(), self.counters.bytes
        sender.send_present(source.memory)
        further: list[int] = []
        while True:
            sender.end_round()
            self._observe_round(self.counters.rounds)
            seconds = max(time.monotonic() - began, 1e-6)
            sets = source.dirty.harvest()
            pages = sum(page_set.count for page_set in sets)
            self.bandwidth, self.dirty_rate = (self.counters.bytes - sent) / seconds, pages / seconds
            self.remaining_pages, self._pages_before = pages, self.counters.pages
            T.migration_pass.on and T.migration_pass(self.counters.rounds, pages, int(self.bandwidth))
            if self._fits(pages):
                further.append(pages)
                if not self._worth_a_round(further):
                    _give_back(sets)
                    return
            self._slow_down(pages, self.counters.bytes - sent)
            began, sent = time.monotonic(), self.counters.bytes
            try:
                sender.send_dirty(sets)
            except BaseException:
                _give_back(sets)
                raise

    def _fits(self, pages: int) -> bool:
        if pages <= SMALL or self.capabilities.x_colo:
            return True
        limit = self._parameters.max_bandwidth
        bandwidth = min(self.bandwidth, limit) if limit else self.bandwidth
        return pages * PAGE_SIZE <= bandwidth * self._parameters.downtime_limit / 1000

    def _worth_a_round(self, further: Sequence[int]) -> bool:
        """Whether the standstill, which may begin now, is put off: ``further`` is the pages left each time it could.

        Only while each round leaves less than half, and all of them take no longer than the standstill may.
        """
        if further[-1] <= SMALL or self.capabilities.x_colo or len(further) > FURTHER_ROUNDS:
            return False
        if sum(further) * PAGE_SIZE > self.bandwidth * self._parameters.downtime_limit / 1000:
            return False
        return len(further) < 2 or further[-1] * 2 < further[-2]

    def _slow_down(self, pages: int, sent: int) -> None:
        """Auto-converge: a guest that dirties as fast as is sent is given less and less time to."""
        if not self.capabilities.auto_converge:
            return
        parameters = self._parameters
        if pages * PAGE_SIZE * 100 < max(sent, PAGE_SIZE) * parameters.throttle_trigger_threshold:
            return
        now = self._throttle.percentage
        wanted = now + parameters.cpu_throttle_increment if now else parameters.cpu_throttle_initial
        self._throttle.set(min(wanted, parameters.max_cpu_throttle))
        T.migration_throttle.on and T.migration_throttle(self._throttle.percentage)

    def _finish(self, channel: Channel, sender: RamSender) -> None:
        source = self._source
        self._throttle.stop()
        channel.send(Message.PREPARE)
        expect(channel, Message.READY)
        self.standing_still = True
        self._change(MigrationStatus.DEVICE)
        paused_at = time.monotonic()
        state = self._on_loop(lambda: self._stand_still(channel))
        while state is None:  # a turn of the loop later: what the guest had asked for is done
            if time.monotonic() > paused_at + LOOP_DEADLINE:
                raise DeadlineError(f"the machine's loop did not do what the guest asked for in {LOOP_DEADLINE:g} s")
            state = self._on_loop(source.save)
        sets, before = source.dirty.harvest(), self.counters.bytes
        try:
            sender.send_dirty(sets)
        except BaseException:
            _give_back(sets)
            raise
        self.downtime_bytes = self.counters.bytes - before
        self.remaining_pages, self._pages_before = 0, self.counters.pages
        channel.send(Message.STATE, state)
        self.downtime_bytes += len(state)
        self._on_loop(source.release)  # while the other side loads; it takes them only at `go`
        expect(channel, Message.LOADED)
        with self._lock:
            if self.status is MigrationStatus.CANCELLING:
                raise ChannelError("cancelled")
            self._handed_over = True
        try:
            send_struct(channel, Message.GO, Go(self._paused_here))
        except ChannelError:
            # What was not sent as a whole cannot have been received: the guest is this side's still.
            with self._lock:
                self._handed_over = False
            raise
        try:
            expect(channel, Message.RUNNING)
        except ChannelError as error:
            raise ChannelError(
                f"{error}; the guest was handed over, so it stays paused here: look whether the destination runs it"
            ) from None
        self.downtime = time.monotonic() - paused_at
        self._on_loop(source.handed_over)
        self.standing_still = False
        self._change(MigrationStatus.COMPLETED)

    def _stand_still(self, channel: Channel) -> bytes | None:
        if self._source.is_running():
            self._source.pause()
            self._paused_here = True
        channel.send(Message.STANDSTILL)
        return self._source.save()

    def _fail(self, reason: str) -> None:
        """The guest goes on as before, unless it was handed over."""
        with self._lock:
            cancelled = self.status is MigrationStatus.CANCELLING
        if not self._handed_over:
            try:
                self._on_loop(self._go_on)
            except PyvmmError as error:
                reason = f"{reason}; and the guest cannot go on: {error}"
        self.standing_still = False
        self.problem = None if cancelled else reason
        T.migration_failed.on and T.migration_failed(reason)
        self._change(MigrationStatus.CANCELLED if cancelled else MigrationStatus.FAILED)

    def _go_on(self) -> None:
        self._source.reclaim()
        if self._paused_here:
            self._paused_here = False
            self._source.resume()


def _give_back(sets: Sequence[PageSet]) -> None:
    for page_set in sets:
        page_set.give_back()
