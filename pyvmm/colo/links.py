"""The connections of a pair. The first is the migration's; each further one opens with a hello that proves it belongs.

The primary connects to where the secondary listens. In the hello stands a token that the two agreed on over the first
connection, which was judged by TLS if it is TCP: whoever does not know it is refused.
"""

from __future__ import annotations

import hmac
import socket
import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pyvmm.errors import ChannelError
from pyvmm.migration.channel import Channel, Listener, connect
from pyvmm.migration.protocol import Refused
from pyvmm.trace import trace_group

T = trace_group("colo")

VERSION = 5
"""Of the protocol between the two, this and messages.py's."""
TOKEN = 16
"""Bytes."""
LinkKind = Literal["heartbeat", "network", "disks"]
"""``network``: frames, if there are cards and the replica runs (cards.py); ``disks``: if there are some (disks.py)."""
HELLO, WELCOME, REFUSED = 100, 101, 102
"""Kinds of frames; apart from the migration's, so that neither takes the other's first frame for its own."""


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a primary says when the memory is there: from now on this is a pair. Judged by the secondary."""

    version: int
    role: Literal["primary"]
    pair: Annotated[str, Meta(max_length=63)]
    term: Annotated[int, Meta(ge=1)]
    mode: Literal["hybrid", "periodic"]
    timeout: Annotated[float, Meta(gt=0, le=3600)]
    """Seconds for each wait within a checkpoint."""
    token: Annotated[bytes, Meta(min_length=TOKEN, max_length=TOKEN)]
    heartbeat: float
    loss: int
    owner: Annotated[str, Meta(max_length=63)]
    disks: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=64)] = ()
    """Bytes of each that the guest can write."""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The secondary agrees."""

    version: int
    role: Literal["secondary"]
    owner: Annotated[str, Meta(max_length=63)]


class LinkHello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame of a further connection."""

    version: int
    pair: str
    term: int
    link: LinkKind
    token: bytes


def hello_of(offer: Offer, link: LinkKind) -> LinkHello:
    """What opens ``link``."""
    return LinkHello(VERSION, offer.pair, offer.term, link, offer.token)


def open_link(uri: str, hello: LinkHello, *, timeout: float, tls_creds: str, tls_hostname: str) -> socket.socket:
    """Connect, as the primary. ChannelError if the secondary does not want us, or is not there."""
    channel = connect(uri, timeout=timeout, stall=timeout, tls_creds=tls_creds, tls_hostname=tls_hostname)
    try:
        channel.send(HELLO, msgspec.msgpack.encode(hello))
        kind, payload = channel.receive()
        if kind != WELCOME:
            raise ChannelError(f"the secondary refused the {hello.link}'s connection: {_reason(payload)}")
        return channel.detach()
    except BaseException:
        channel.close()
        raise


def accept_link(listener: Listener, wanted: LinkHello, *, timeout: float, tls_creds: str) -> socket.socket:
    """Wait, as the secondary, for the connection that says ``wanted``. ChannelError if it does not come in time.

    Others are refused and waited no longer for than it takes to say so: nobody keeps the primary out by being there.
    """
    until = time.monotonic() + timeout
    while (left := until - time.monotonic()) > 0:
        try:
            channel = listener.accept(timeout=left, stall=min(left, 1.0), tls_creds=tls_creds)
        except ChannelError as error:  # TLS that failed; or nobody came
            T.colo_link_refused.on and T.colo_link_refused(str(error))
            continue
        try:
            problem = _judge(channel, wanted)
            if problem is None:
                channel.send(WELCOME)
                return channel.detach()
            T.colo_link_refused.on and T.colo_link_refused(problem)
            channel.send(REFUSED, msgspec.msgpack.encode(Refused(problem)))
        except ChannelError as error:
            T.colo_link_refused.on and T.colo_link_refused(str(error))
        channel.close()
    raise ChannelError(f"the primary did not open the {wanted.link}'s connection within {timeout:g} s")


def _judge(channel: Channel, wanted: LinkHello) -> str | None:
    kind, payload = channel.receive()
    if kind != HELLO:
        return "this pyvmm has a primary already"
    try:
        hello = msgspec.msgpack.decode(payload, type=LinkHello)
    except msgspec.DecodeError:
        return "its hello makes no sense"
    if not hmac.compare_digest(hello.token, wanted.token):
        return "it does not belong to this pair"
    if hello != wanted:
        return f"{hello.link} of term {hello.term}, version {hello.version}, came where {wanted} was due"
    return None


def _reason(payload: memoryview) -> str:
    try:
        return msgspec.msgpack.decode(payload, type=Refused).reason[:500]
    except msgspec.DecodeError:
        return "it does not say why"
