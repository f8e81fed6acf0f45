"""The destination's side of a migration (protocol.py): wait for one source, take its guest over, let it run.

Nothing is half done: a guest runs here only after all of it has arrived, was decoded, was applied, and the source has
said that it lets go. Whatever fails before is a ChannelError or SectionError, and this process ends with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from pyvmm.errors import ChannelError, PyvmmError
from pyvmm.memory.guest_memory import GuestMemory
from pyvmm.migration.channel import Channel
from pyvmm.migration.protocol import VERSION, Hello, Message, Refused, check_version, expect, send_struct
from pyvmm.migration.ram import RamReceiver
from pyvmm.trace import trace_group

T = trace_group("migration")


class Target(Protocol):
    """What an incoming migration needs of a machine that has not run yet."""

    memory: GuestMemory

    def describe(self) -> dict[str, Any]:
        """What it is like."""

    def differences(self, description: dict[str, Any]) -> list[str]:
        """Where the source is different in a way that matters; one phrase each."""

    def prepare(self, state: memoryview) -> Callable[[], None]:
        """Decode and check saved state (SectionError); what applies it."""

    def take_disks(self) -> None:
        """Open disks for writing: the source has let go of them."""

    def resume(self) -> None:
        """Let the guest run, if it ran at the source."""


def receive_guest(channel: Channel, target: Target) -> None:
    """Take over one guest; it runs when this returns.

    Called where the machine may be changed: on its loop's thread, before the loop runs.
    """
    try:
        _receive(channel, target)
    except PyvmmError as error:
        T.migration_incoming.on and T.migration_incoming(f"refused: {error}")
        # The source learns why, if it is still there to hear it.
        with contextlib.suppress(ChannelError):
            send_struct(channel, Message.REFUSED, Refused(str(error)))
        raise


def _receive(channel: Channel, target: Target) -> None:
    hello = check_version(expect(channel, Message.HELLO)[1])
    differences = target.differences(hello.description)
    if differences:
        raise ChannelError(f"the source's machine is another one: {'; '.join(differences)}")
    send_struct(channel, Message.HELLO, Hello(VERSION, target.describe()))
    receiver = RamReceiver(target.memory)
    while True:
        kind, payload = expect(channel, Message.RAM, Message.PASS, Message.STATE)
        if kind is Message.RAM:
            receiver.take(payload)
        elif kind is Message.STATE:
            break
    T.migration_incoming.on and T.migration_incoming(f"{receiver.pages} pages, {len(payload)} bytes of state")
    target.prepare(payload)()
    channel.send(Message.LOADED)
    expect(channel, Message.GO)
    target.take_disks()
    target.resume()
    with contextlib.suppress(ChannelError):  # the guest is ours; that the source does not hear of it changes nothing
        channel.send(Message.RUNNING)
