"""What two processes say to each other to move a machine from one to the other.

::

    source                                          destination (--incoming URI)

    hello    {version, description,      -------->  the same machine? nothing is changed if not
              cards}                                has the guest's places in networks, too, its taps down
                                         <--------  hello, or refused {reason}
    ram, ram, ...  pass {round}          -------->  written to memory; again for each round; meanwhile it does once
                                                    everything that it will have to do while nothing runs
    prepare                              -------->  has it done that?
                                         <--------  ready
      (pauses the guest)
    standstill                           -------->  sets its taps up: frames for the guest wait here from now on
    ram, ram, ...  state {sections}      -------->  all of it is decoded, then all of it is applied
      (flushes disks)
                                         <--------  loaded, or refused {reason}
    go       {running}                   -------->  takes the disks, lets the guest run if it ran, tells the network
                                         <--------  running
      (sets its taps down, gives up its
      places in networks)

Until it has sent ``go``, all of it, the source owns the guest: whatever fails before that, it goes on as if nothing had
happened, and the destination ends with an error. From then on it never runs the guest by itself: if the connection
breaks before ``running``, nobody can know from here whether the destination does, and two running copies would be worse
than none.

With the capability ``x-colo`` the two become a pair instead: in place of ``prepare`` comes ``colo``, and what follows
is the checkpoint protocol (pyvmm/colo), which carries what is still to be sent. It is not known here: who begins a
migration, or waits for one, is given what to call then.

Frames are those of channel.py. ``description`` and ``sections`` are made and judged by machine_state.py.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pyvmm.errors import ChannelError
from pyvmm.migration.channel import Channel
from pyvmm.net.cards import MovingCard

VERSION = 3


class Message(enum.IntEnum):
    """Kinds of frames."""

    HELLO = 1
    REFUSED = 2
    RAM = 3
    PASS = 4
    STATE = 5
    LOADED = 6
    GO = 7
    RUNNING = 8
    PREPARE = 9
    READY = 10
    STANDSTILL = 11
    COLO = 12


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first frame of either side. A later version may have other fields, so ``version`` is judged alone first."""

    version: int
    description: dict[str, Any] = {}
    cards: Annotated[tuple[MovingCard, ...], Meta(max_length=100)] = ()
    """The source's network cards, and their places in named networks."""


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the other side will not."""

    reason: str


class Go(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The guest is yours; whether it ``runs``, or was paused when it left."""

    running: bool


def send_struct(channel: Channel, kind: Message, value: msgspec.Struct) -> None:
    """Send ``value`` as MessagePack."""
    channel.send(kind, msgspec.msgpack.encode(value))


def expect(channel: Channel, *wanted: Message, stall: float | None = None) -> tuple[Message, memoryview]:
    """The next frame, which must be one of ``wanted``; else ChannelError, with the peer's reason if it gave one."""
    kind, payload = channel.receive(stall=stall)
    if kind in wanted:
        return Message(kind), payload
    if kind == Message.REFUSED:
        raise ChannelError(f"the other side refused: {decode(payload, Refused).reason[:500]}")
    names = " or ".join(message.name.lower() for message in wanted)
    what = Message(kind).name.lower() if kind in set(Message) else f"frame kind {kind}"
    raise ChannelError(f"{what} came where {names} was due")


def decode(payload: memoryview, kind: type[Any]) -> Any:
    """``payload`` as a ``kind``; ChannelError if it is none."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except msgspec.DecodeError as error:
        raise ChannelError(f"the other side sent a {kind.__name__.lower()} that makes no sense: {error}") from None


def check_version(payload: memoryview) -> Hello:
    """The peer's hello. ChannelError if it speaks another version."""
    try:
        version = msgspec.msgpack.decode(payload, type=dict[str, Any]).get("version")
    except msgspec.DecodeError:
        version = None
    if version != VERSION:
        raise ChannelError(f"the other side speaks version {version!r} of the protocol, this one {VERSION}")
    hello: Hello = decode(payload, Hello)
    return hello
