"""The checkpoint protocol: its messages, whose turn each is, and the wire.

::

            Primary                                  Secondary
 once                         <---- checkpoint-ready
 each       checkpoint-request ------------------->
                              <---- checkpoint-reply        (hybrid: its guest stands still)
            vmstate-send + state ----------------->         both payloads: checkpoint.py
            vmstate-size + pages ----------------->
                              <---- vmstate-received        (all of it is held, and was checked)
                              <---- vmstate-loaded
 at the end guest-ended, instead of a request ---->
                              <---- guest-ended

A message is one big-endian u32; behind vmstate-send and vmstate-size come a big-endian u64 and so many bytes.
guest-ended is this program's own: a guest that powers off is over on both sides, and must not live on in the secondary.

:class:`Turns` knows the order and nothing else, so that a recorded conversation is judged by the same rules.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from pyvmm.errors import ChannelError
from pyvmm.trace import trace_group

T = trace_group("colo")

ID = struct.Struct(">I")
SIZE = struct.Struct(">Q")
PIECE = 1 << 20
"""Bytes received at one go."""

Side = Literal["primary", "secondary"]


class Message(enum.IntEnum):
    """Ids on the wire; 0 to 6 are QEMU's COLOMessage (qapi/migration.json), in its order."""

    CHECKPOINT_READY = 0
    CHECKPOINT_REQUEST = 1
    CHECKPOINT_REPLY = 2
    VMSTATE_SEND = 3
    VMSTATE_SIZE = 4
    VMSTATE_RECEIVED = 5
    VMSTATE_LOADED = 6
    GUEST_ENDED = 7

    @property
    def label(self) -> str:
        """As QEMU writes it."""
        return self.name.lower().replace("_", "-")


WITH_PAYLOAD = frozenset({Message.VMSTATE_SEND, Message.VMSTATE_SIZE})

_NEXT: dict[Message | None, tuple[Side, tuple[Message, ...]]] = {
    None: ("secondary", (Message.CHECKPOINT_READY,)),
    Message.CHECKPOINT_READY: ("primary", (Message.CHECKPOINT_REQUEST, Message.GUEST_ENDED)),
    Message.CHECKPOINT_REQUEST: ("secondary", (Message.CHECKPOINT_REPLY,)),
    Message.CHECKPOINT_REPLY: ("primary", (Message.VMSTATE_SEND,)),
    Message.VMSTATE_SEND: ("primary", (Message.VMSTATE_SIZE,)),
    Message.VMSTATE_SIZE: ("secondary", (Message.VMSTATE_RECEIVED,)),
    Message.VMSTATE_RECEIVED: ("secondary", (Message.VMSTATE_LOADED,)),
    Message.VMSTATE_LOADED: ("primary", (Message.CHECKPOINT_REQUEST, Message.GUEST_ENDED)),
    Message.GUEST_ENDED: ("secondary", (Message.GUEST_ENDED,)),
}


class Turns:
    """Where a conversation is. ChannelError for whatever comes out of turn; nothing is changed then."""

    def __init__(self) -> None:
        self.last: Message | None = None
        self.checkpoints = 0
        """Begun so far."""
        self._over = False

    def take(self, side: Side, message: Message) -> None:
        """``side`` says ``message``."""
        due_from, due = _NEXT[self.last]
        if self._over or side != due_from or message not in due:
            wanted = "nothing more" if self._over else " or ".join(m.label for m in due) + f" of the {due_from}"
            raise ChannelError(f"{message.label} of the {side} came where {wanted} was due")
        self._over = self.last is Message.GUEST_ENDED
        self.last = message
        self.checkpoints += message is Message.CHECKPOINT_REQUEST


class Recorder(Protocol):
    """Who keeps a conversation (recording.py)."""

    def note(self, side: Side, message: Message, size: int) -> None:
        """``side`` said ``message``; ``size`` of the payload behind it, else 0."""


class Conversation:
    """One side's end of the replication connection; owns ``sock``. One thread talks; any may :meth:`abort` or
    :meth:`fall_silent`.

    ``timeout``: seconds that each wait within a checkpoint may take. ChannelError ends a conversation for good.
    """

    def __init__(self, sock: socket.socket, side: Side, timeout: float, recorder: Recorder | None = None) -> None:
        self.side: Side = side
        self.other: Side = "primary" if side == "secondary" else "secondary"
        self.timeout = timeout
        self.turns = Turns()
        self.bytes_sent = self.bytes_received = 0
        self._socket = sock
        sock.setblocking(False)
        self._wake, self._waker = socket.socketpair()
        self._recorder = recorder

    def fileno(self) -> int:
        """Readable when the other side says something, or is gone."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Say ``message``, which is this side's turn."""
        self.turns.take(self.side, message)
        T.colo_send_message.on and T.colo_send_message(message.label)
        self._note(self.side, message)
        self._write([ID.pack(message)])

    def send_with(self, message: Message, pieces: Iterable[bytes | memoryview], size: int) -> None:
        """``message`` and its payload, ``size`` bytes in all."""
        self.turns.take(self.side, message)
        T.colo_send_message.on and T.colo_send_message(f"{message.label} {size}")
        self._note(self.side, message, size)
        self._write([ID.pack(message) + SIZE.pack(size)])
        self._write(pieces)

    def expect(self, *wanted: Message, idle: bool = False) -> Message:
        """The next message, one of ``wanted``. ``idle``: however long it takes; who waits so is ended by abort()."""
        number = ID.unpack(self._read(bytearray(ID.size), ID.size, None if idle else self.timeout))[0]
        if number not in Message.__members__.values():
            raise ChannelError(f"{number:#x} is no message of the checkpoint protocol")
        message = Message(number)
        self.turns.take(self.other, message)
        T.colo_receive_message.on and T.colo_receive_message(message.label)
        if message not in wanted:
            raise ChannelError(f"{message.label} came where {' or '.join(m.label for m in wanted)} was due")
        if message not in WITH_PAYLOAD:
            self._note(self.other, message)
        return message

    def expect_with(self, message: Message, buffer: memoryview) -> memoryview:
        """``message`` and its payload, put into ``buffer``; ChannelError, and nothing taken, if it is larger."""
        self.expect(message)
        size = SIZE.unpack(self._read(bytearray(SIZE.size), SIZE.size, self.timeout))[0]
        if size > len(buffer):
            raise ChannelError(f"{message.label} with {size} bytes; {len(buffer)} is the most there can be")
        self._note(self.other, message, size)
        for at in range(0, size, PIECE):
            # A deadline for each piece: a slow line may take its time, one that trickles may not.
            self._read(buffer[at:], min(PIECE, size - at), self.timeout)
        return buffer[:size]

    def abort(self) -> None:
        """From any thread: whoever waits here fails at once, and so does the other side."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def fall_silent(self) -> None:
        """From any thread: whoever waits here fails at once. The other side sees nothing of it until :meth:`close`."""
        with contextlib.suppress(OSError):  # it is closed already
            self._waker.send(b"x")

    def close(self) -> None:
        """Give the sockets back."""
        for sock in (self._socket, self._wake, self._waker):
            sock.close()

    def _note(self, side: Side, message: Message, size: int = 0) -> None:
        if self._recorder is not None:
            self._recorder.note(side, message, size)

    def _write(self, pieces: Iterable[bytes | memoryview]) -> None:
        with self._line_errors():
            for piece in pieces:
                view, until = memoryview(piece), time.monotonic() + self.timeout
                while view:
                    try:
                        count = self._socket.send(view)
                    except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError) as busy:
                        if not self._wait(busy, select.POLLOUT, until):
                            raise ChannelError(f"the {self.other} took nothing for {self.timeout:g} s") from None
                    else:
                        view = view[count:]
                        self.bytes_sent += count

    def _read(self, buffer: bytearray | memoryview, size: int, timeout: float | None) -> memoryview:
        view = memoryview(buffer)[:size]
        done, until = 0, None if timeout is None else time.monotonic() + timeout
        with self._line_errors():
            while done < size:
                try:
                    count = self._socket.recv_into(view[done:])
                except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as busy:
                    if not self._wait(busy, select.POLLIN, until):
                        raise ChannelError(f"the {self.other} sent nothing for {self.timeout:g} s") from None
                else:
                    if not count:
                        raise ChannelError(f"the {self.other} closed the connection")
                    done += count
                    until = until or time.monotonic() + self.timeout  # what was begun must come to its end
        self.bytes_received += size
        return view

    def _wait(self, busy: Exception, event: int, until: float | None) -> bool:
        """Until the line is ready for what it was ``busy`` for; False: not in time. ChannelError: fall_silent."""
        if isinstance(busy, ssl.SSLError):  # TLS may have to read before it can write, and the other way round
            event = select.POLLIN if isinstance(busy, ssl.SSLWantReadError) else select.POLLOUT
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._socket, event)
        left = None if until is None else max(until - time.monotonic(), 0.0) * 1000
        ready = poll.poll(left)
        if any(fd == self._wake.fileno() for fd, _ in ready):
            raise ChannelError(f"this side has nothing more to say to the {self.other}")
        return bool(ready)

    @contextlib.contextmanager
    def _line_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed under our feet by abort and close
            raise ChannelError(f"the connection to the {self.other} broke: {_why(error)}") from None


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
