"""One stream between a port of the guest's and a unix socket of the host's (virtio 1.2, 5.10.6).

Each direction ends by itself: a host program that has sent all (EOF) is SHUTDOWN with NO_SEND for the guest, one that
takes no more (EPIPE) is NO_RECEIVE, and the guest's flags become shutdown(2) on the host's socket. Only the guest
knows when it has closed: it says RST, or SHUTDOWN with both flags, which is answered with RST.

What waits is bounded: towards the host by the credit given (BUFFER), towards the guest by READ_MAX, for nothing more
is read from the socket before that has gone.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from collections.abc import Callable
from typing import Protocol

from pyvmm.virtio.vsock_packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST_CID,
    NO_RECEIVE,
    NO_SEND,
    NOTHING_MORE,
    REQUEST,
    RESPONSE,
    RW,
    SHUTDOWN,
    STREAM,
    Credit,
    Header,
)

READ_MAX = 32 << 10


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Do not call after all."""


class HostLoop(Protocol):
    """The part of the machine's event loop that host-side sockets need; callbacks come on its thread."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever ``fd`` is readable."""

    def remove_reader(self, fd: int) -> None:
        """Do not; harmless if nobody asked."""

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever ``fd`` is writable."""

    def remove_writer(self, fd: int) -> None:
        """Do not; harmless if nobody asked."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back once."""

    def post(self, callback: Callable[[], None]) -> None:
        """From any thread: call back soon."""


class Stage(enum.Enum):
    """How far a connection is."""

    CONNECTING = "the guest has asked, the host's program has not accepted yet"
    REQUESTED = "a host program has asked, the guest has not answered yet"
    ESTABLISHED = "data may flow"
    DRAINING = "the guest knows it no more; what it sent before still goes to the host's program"
    CLOSED = "the socket is closed"


class Owner(Protocol):
    """What a connection asks of its device, whose lock it holds then."""

    def enter(self) -> contextlib.AbstractContextManager[object]:
        """The device's lock."""

    def has_packet(self, connection: Connection) -> None:
        """``connection`` may have something for the guest."""

    def drained(self, connection: Connection) -> None:
        """``connection`` is CLOSED."""


class Connection:
    """``host`` is a non-blocking socket, owned. Used on the loop's thread with the device's lock held."""

    def __init__(
        self, owner: Owner, loop: HostLoop, host: socket.socket, guest_cid: int, guest_port: int, host_port: int,
        stage: Stage, to_guest: bytes = b"",
    ) -> None:  # fmt: skip
        self.guest_port = guest_port
        self.host_port = host_port
        self.host = host
        self.stage = stage
        self.credit = Credit()
        self.queued = False
        """For the device: it is in line for the receive queue."""
        self.timer: Timer | None = None
        """The device's: what becomes of it if nothing happens."""
        self.requested = stage is not Stage.REQUESTED
        """The guest knows of it."""
        self._answered = stage is Stage.REQUESTED
        self._owner = owner
        self._loop = loop
        self._guest_cid = guest_cid
        self._to_guest = to_guest
        self._to_host = bytearray()
        self._reading = self._writing = False
        self._guest_said = self._said = self._own = 0  # SHUTDOWN flags: the guest's, ours as told, ours as they are
        self._update_wanted = self._credit_asked = False

    @property
    def key(self) -> tuple[int, int]:
        """What tells connections apart: (host's port, guest's port)."""
        return self.host_port, self.guest_port

    @property
    def said_nothing_more(self) -> bool:
        """SHUTDOWN with both flags went to the guest, who should answer with RST."""
        return self._said == NOTHING_MORE

    # -- from the guest -------------------------------------------------------------------------

    def establish(self) -> None:
        """Both sides have agreed."""
        self.stage = Stage.ESTABLISHED
        self._watch()
        self._owner.has_packet(self)

    def heard(self, header: Header) -> None:
        """The credit of any packet."""
        self.credit.heard(header.buf_alloc, header.fwd_cnt)
        if self.credit.room:
            self._credit_asked = False
        self._owner.has_packet(self)

    def credit_wanted(self) -> None:
        """CREDIT_REQUEST."""
        self._update_wanted = True
        self._owner.has_packet(self)

    def may_bring(self, size: int) -> bool:
        """Whether the guest may send ``size`` bytes now: it has the credit, and did not say that it was done."""
        return not self._guest_said & NO_SEND and self.credit.covers(size)

    def to_host(self, data: bytes) -> None:
        """Payload for the host's program, which :meth:`may_bring` allowed."""
        self.credit.receive(len(data))
        if self._own & NO_RECEIVE:
            self.credit.forward(len(data))  # nobody reads it
        else:
            self._to_host += data
            if not self._writing:
                self._write()
        self._news()

    def guest_shuts_down(self, flags: int) -> bool:
        """SHUTDOWN; ``True`` once both of the guest's directions have ended."""
        self._guest_said |= flags & NOTHING_MORE
        if self._guest_said & NO_RECEIVE:
            self._to_guest = b""
            self._stop_reading()
            with contextlib.suppress(OSError):
                self.host.shutdown(socket.SHUT_RD)
        self._end_of_output()
        return self._guest_said == NOTHING_MORE

    # -- to the guest ---------------------------------------------------------------------------

    def next_operation(self) -> int | None:
        """What the next packet to the guest would be."""
        if self.stage is Stage.REQUESTED:
            return None if self.requested else REQUEST
        if self.stage is not Stage.ESTABLISHED:
            return None
        if not self._answered:
            return RESPONSE
        if self._to_guest and self.credit.room:
            return RW
        if self._to_guest and not self._credit_asked:
            return CREDIT_REQUEST
        if self._update_wanted:
            return CREDIT_UPDATE
        return SHUTDOWN if self._shutdown_flags() != self._said else None

    def packet(self, room: int) -> bytes:
        """The packet that :meth:`next_operation` announced, with at most ``room`` (1 or more) bytes of payload."""
        operation = self.next_operation()
        assert operation is not None
        payload, flags = b"", 0
        if operation == REQUEST:
            self.requested = True
        elif operation == RESPONSE:
            self._answered = True
        elif operation == RW:
            size = min(room, self.credit.room)
            payload, self._to_guest = self._to_guest[:size], self._to_guest[size:]
            self.credit.send(len(payload))
        elif operation == CREDIT_REQUEST:
            self._credit_asked = True
        elif operation == SHUTDOWN:
            flags = self._said = self._shutdown_flags()
        self._update_wanted = False  # every packet is one
        header = Header(
            HOST_CID, self._guest_cid, self.host_port, self.guest_port, len(payload), STREAM, operation, flags,
            *self.credit.tell(),
        )  # fmt: skip
        self._watch()
        return header.encode() + payload

    def _shutdown_flags(self) -> int:
        """Our flags by now; data goes before the word that there is no more."""
        return self._said | self._own & (NO_RECEIVE if self._to_guest else NOTHING_MORE)

    # -- the host's program ---------------------------------------------------------------------

    def greet(self, text: bytes) -> bool:
        """Write a first line to a socket that nothing was written to yet; ``False`` if that cannot be."""
        try:
            return self.host.send(text) == len(text)
        except OSError:
            return False

    def _watch(self) -> None:
        """Read from the socket when all that was read has gone: credit or not, to know that some is wanted."""
        ended = self._guest_said & NO_RECEIVE or self._own & NO_SEND
        if self.stage is not Stage.ESTABLISHED or ended or self._to_guest:
            self._stop_reading()
        elif not self._reading:
            self._reading = True
            self._loop.add_reader(self.host.fileno(), self._readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.host.fileno())

    def _readable(self) -> None:
        with self._owner.enter():
            if not self._reading or self.stage is not Stage.ESTABLISHED:
                return
            try:
                data = self.host.recv(READ_MAX)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._to_guest = data
            else:
                self._own |= NO_SEND
                self._probe()
                self._nothing_flows()
            self._watch()
            self._owner.has_packet(self)

    def _probe(self) -> None:
        """After EOF: whether the program has closed altogether, which a socket only tells writers."""
        try:
            self.host.send(b"")
        except BlockingIOError:
            pass
        except OSError:
            self._host_takes_no_more()

    def _write(self) -> None:
        """Give the program what it takes now, and wait for room if that is not all."""
        try:
            while self._to_host:
                count = self.host.send(self._to_host)
                del self._to_host[:count]
                self.credit.forward(count)
        except BlockingIOError:
            pass
        except OSError:
            self._host_takes_no_more()
        if bool(self._to_host) != self._writing:
            self._writing = not self._writing
            if self._writing:
                self._loop.add_writer(self.host.fileno(), self._writable)
            else:
                self._loop.remove_writer(self.host.fileno())
        self._end_of_output()

    def _writable(self) -> None:
        with self._owner.enter():
            if not self._writing:
                return
            self._write()
            if self.stage is Stage.DRAINING and not self._to_host:
                self.close()
                self._owner.drained(self)
            else:
                self._news()

    def _news(self) -> None:
        if self.credit.is_news:
            self._update_wanted = True
        self._owner.has_packet(self)

    def _host_takes_no_more(self) -> None:
        """EPIPE: what the guest sent counts as taken, so that it comes to hear of the end."""
        self._own |= NO_RECEIVE
        self.credit.forward(len(self._to_host))
        self._to_host.clear()
        self._nothing_flows()

    def _end_of_output(self) -> None:
        """The guest has sent all, and the program got all: EOF for it."""
        if self._guest_said & NO_SEND and not self._to_host:
            with contextlib.suppress(OSError):
                self.host.shutdown(socket.SHUT_WR)
            self._nothing_flows()

    def _nothing_flows(self) -> None:
        """Once no direction is left the guest has to hear of both ends, or its answer would never come."""
        to_guest_ended = self._own & NO_SEND or self._guest_said & NO_RECEIVE
        to_host_ended = self._own & NO_RECEIVE or (self._guest_said & NO_SEND and not self._to_host)
        if to_guest_ended and to_host_ended:
            self._own = NOTHING_MORE

    # -- the end --------------------------------------------------------------------------------

    def leave(self, *, drain: bool) -> None:
        """The guest knows it no more. With ``drain`` what it sent before still goes to the host's program."""
        self._cancel_timer()
        self._stop_reading()
        self._to_guest = b""
        self.stage = Stage.DRAINING
        if not (drain and self._to_host):
            self.close()

    def close(self) -> None:
        """Close the socket."""
        self._cancel_timer()
        self._stop_reading()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self.host.fileno())
        self.stage = Stage.CLOSED
        self.host.close()

    def _cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
