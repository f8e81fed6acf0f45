"""The destination's side of a migration (protocol.py): wait for one source, take its guest over, let it run.

Nothing is half done: a guest runs here only after all of it has arrived, was decoded, was applied, and the source has
said that it lets go. Whatever fails before is a ChannelError or SectionError, and the machine ends with it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from pyvmm.errors import ChannelError, DeadlineError, PyvmmError
from pyvmm.memory.guest_memory import GuestMemory
from pyvmm.migration.channel import Channel, Listener
from pyvmm.migration.loop_call import begin_on_loop, call_on_loop
from pyvmm.migration.parameters import MigrationStatus, Parameters
from pyvmm.migration.protocol import VERSION, Go, Hello, Message, Refused, check_version, decode, expect, send_struct
from pyvmm.migration.ram import RamReceiver
from pyvmm.migration.standstill import without_collections
from pyvmm.net.cards import MovingCard
from pyvmm.trace import trace_group

T = trace_group("migration")

R = TypeVar("R")
Colo = Callable[[Channel, memoryview, Listener, Callable[[], None]], None]
"""(channel, the primary's offer, where further connections come, what to call when it is a pair): is the secondary
until the guest is this side's; PyvmmError if it never will be.
"""

LINGER = 10.0
"""Seconds that closing waits for the thread."""


class Target(Protocol):
    """What an incoming migration needs of a machine that has not run yet; all but ``memory`` is called on its loop."""

    memory: GuestMemory

    def describe(self) -> dict[str, Any]:
        """What it is like."""

    def differences(self, description: dict[str, Any]) -> str | None:
        """Where the source is different in a way that matters."""

    def expect_cards(self, cards: tuple[MovingCard, ...]) -> None:
        """Have the places in networks that the source's guest has. ConfigError, HostError: that cannot be."""

    def rehearse(self) -> None:
        """Do what the end will need, with this machine's own state, so that it is quick when a guest waits for it."""

    def source_stands_still(self) -> None:
        """What the network sends to the guest from now on is for it here."""

    def load(self, state: memoryview) -> None:
        """Check saved state (SectionError) and apply it."""

    def take_over(self, running: bool) -> None:
        """Claim the disks, let the guest run if it ran at the source, and tell the network."""


class IncomingMigration:
    """Waits at ``listener``, which it owns, on a thread of its own. ``fail(reason)`` is called on the loop."""

    def __init__(
        self,
        listener: Listener,
        target: Target,
        parameters: Parameters,
        *,
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[str], None],
        observe: Callable[[MigrationStatus], None] = lambda status: None,
        colo: Colo | None = None,
    ) -> None:
        self.status = MigrationStatus.SETUP
        self.problem: str | None = None
        self._listener = listener
        self._target = target
        self._parameters = parameters
        self._post = post
        self._fail = fail
        self._observe = observe
        self._colo = colo
        self._channel: Channel | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="migration-incoming", daemon=True)

    def start(self) -> None:
        """Begin to wait; returns at once."""
        self._observe(self.status)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait until it is over. DeadlineError if that takes longer."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise DeadlineError(f"the incoming migration did not end within {timeout:g} s")

    @property
    def alive(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread.is_alive()

    def give_up(self) -> None:
        """Wait no more; a migration that is under way fails, and its guest will not run here."""
        self._closing = True
        self._listener.close()
        if self._channel is not None:
            self._channel.abort()

    def close(self) -> None:
        """The same, and wait for the thread's end."""
        self.give_up()
        self._thread.join(LINGER)

    def _main(self) -> None:
        try:
            channel = self._listener.accept_when_somebody_comes(
                lambda: self._closing, stall=self._parameters.x_stall_timeout / 1000,
                tls_creds=self._parameters.tls_creds,
            )  # fmt: skip
            if channel is None:
                return
            self._channel = channel
            self._change(MigrationStatus.ACTIVE)
            try:
                self._receive(channel)
            finally:
                channel.close()
            self._change(MigrationStatus.COMPLETED)
        except PyvmmError as error:
            reason = str(error)
        except Exception as error:
            reason = f"internal error: {type(error).__name__}: {error}"
        else:
            return
        finally:
            self._listener.close()
        self.problem = reason
        T.migration_incoming.on and T.migration_incoming(f"failed: {reason}")
        self._change(MigrationStatus.FAILED)
        if not self._closing:
            self._post(lambda: self._fail(reason))

    def _change(self, status: MigrationStatus) -> None:
        self.status = status
        T.migration_status.on and T.migration_status(status.value)
        self._observe(status)

    def _on_loop(self, call: Callable[[], R]) -> R:
        return call_on_loop(self._post, call)

    def _receive(self, channel: Channel) -> None:
        try:
            self._take(channel)
        except PyvmmError as error:
            # The source learns why, if it is still there to hear it.
            with contextlib.suppress(ChannelError):
                send_struct(channel, Message.REFUSED, Refused(str(error)))
            raise

    def _take(self, channel: Channel) -> None:
        target = self._target
        hello = check_version(expect(channel, Message.HELLO)[1])
        difference = self._on_loop(lambda: target.differences(hello.description))
        if difference is not None:
            raise ChannelError(f"the source's machine is another one: {difference}")
        self._on_loop(lambda: target.expect_cards(hello.cards))
        send_struct(channel, Message.HELLO, Hello(VERSION, self._on_loop(target.describe)))
        rehearsed = begin_on_loop(self._post, target.rehearse)  # while memory comes
        receiver = RamReceiver(target.memory)
        kind, payload = receive_ram(channel, receiver, Message.PREPARE, Message.COLO)
        rehearsed()
        if kind is Message.COLO:
            if self._colo is None:
                raise ChannelError("this pyvmm was not started with --colo secondary")
            self._colo(channel, payload, self._listener, lambda: self._change(MigrationStatus.COLO))
            return
        with without_collections():
            channel.send(Message.READY)
            receive_ram(channel, receiver, Message.STANDSTILL)
            self._on_loop(target.source_stands_still)
            state = receive_ram(channel, receiver, Message.STATE)[1]
            self._take_state(channel, receiver, state)

    def _take_state(self, channel: Channel, receiver: RamReceiver, payload: memoryview) -> None:
        T.migration_incoming.on and T.migration_incoming(f"{receiver.pages} pages, {len(payload)} bytes of state")
        self._on_loop(lambda: self._target.load(payload))
        channel.send(Message.LOADED)  # whatever could fail has been done: read back, too
        go: Go = decode(expect(channel, Message.GO)[1], Go)
        self._on_loop(lambda: self._take_over(go.running))
        with contextlib.suppress(ChannelError):  # the guest is ours; that the source does not hear it changes nothing
            channel.send(Message.RUNNING)

    def _take_over(self, running: bool) -> None:
        if self._closing:
            raise ChannelError("this machine is ending")
        self._target.take_over(running)


def receive_ram(channel: Channel, receiver: RamReceiver, *until: Message) -> tuple[Message, memoryview]:
    """Put memory in place until one of the frames ``until`` comes; which, and its payload. ChannelError."""
    while True:
        kind, payload = expect(channel, Message.RAM, Message.PASS, *until)
        if kind in until:
            return kind, payload
        if kind is Message.RAM:
            receiver.take(payload)
