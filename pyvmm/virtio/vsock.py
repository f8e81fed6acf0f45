"""The socket device (virtio 1.2, 5.10): streams between the guest's ports and unix sockets of the host's.

The guest's connection to CID 2, port N goes to whoever listens on the unix socket ``PATH_N``; how a host program asks
for a port of the guest's is told in ``vsock_listener.py``. Other types than streams are refused.

No packet of the guest's is left waiting except when answers pile up that it makes no room for (5.10.6.1): then, and
only then, its transmit queue is not served.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pyvmm.devices.state import DeviceState
from pyvmm.trace import trace_group
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue import Chain, NeedsReset, VirtQueue
from pyvmm.virtio.vsock_connection import Connection, HostLoop, Stage
from pyvmm.virtio.vsock_listener import VsockListener
from pyvmm.virtio.vsock_packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    HOST_CID,
    REQUEST,
    RESET,
    RESPONSE,
    RW,
    SHUTDOWN,
    STREAM,
    Header,
)

T = trace_group("virtio")

F_STREAM = 1 << 0  # 5.10.3
RECEIVE, TRANSMIT, EVENT = 0, 1, 2  # 5.10.2
TRANSPORT_RESET = 0  # 5.10.6.7

CONNECTIONS_MAX = 512
"""With BUFFER and READ_MAX of each, the bound on what the host holds for them."""
ANSWERS_MAX = 64
"""Refusals that wait for the guest to make room."""
FIRST_HOST_PORT = 1 << 30
"""Ports of host programs' connections, counted from here: apart from those the guest asks for by habit."""
_LAST_HOST_PORT = 0xFFFFFFFE

# Seconds
CONNECT_DEADLINE = 2.0
"""For a host program to accept (its backlog is full): as long as Linux waits by default."""
CONNECT_AGAIN = 0.05
REQUEST_DEADLINE = 10.0
"""For the guest to answer; a busy one may take its time."""
SHUTDOWN_DEADLINE = 8.0
"""For the guest to answer SHUTDOWN with RST: as long as Linux waits."""
DRAIN_DEADLINE = 30.0
"""For a host program to read what came before the guest closed."""


class VsockState(DeviceState):
    """``reset_wanted``: the driver is to hear that all its connections are gone. They are not part of the state."""

    reset_wanted: bool = False


class VirtioVsock(VirtioDevice):
    """The guest is ``cid``; ``listener`` is a listening non-blocking unix socket bound to ``path``, owned."""

    name = "virtio-vsock"
    device_id = 19
    features = F_STREAM
    queue_sizes = (128, 128, 16)
    state_type = VsockState

    def __init__(self, memory_table: Any, loop: HostLoop, cid: int, listener: socket.socket, path: str) -> None:
        super().__init__(memory_table)
        self._loop = loop
        self._cid = cid
        self._path = path
        self._chains = [queue.new_chain() for queue in self.queues]
        self._connections: dict[tuple[int, int], Connection] = {}
        self._leaving: set[Connection] = set()
        """The guest knows them no more; their sockets are still open."""
        self._line: deque[Connection] = deque()
        """Those that may have a packet for the guest, each once."""
        self._answers: deque[bytes] = deque()
        self._transmit_waits = False
        self._next_host_port = FIRST_HOST_PORT
        self._listener = VsockListener(loop, listener, path, self._program_connects)

    def configuration(self) -> bytes:
        """guest_cid (5.10.4)."""
        return struct.pack("<Q", self._cid)

    def serve_queue(self, queue: VirtQueue) -> bool:
        """Packets to the guest, packets from it, events."""
        return (self._receive, self._transmit, self._event)[queue.index](queue)

    # -- packets to the guest -------------------------------------------------------------------

    def _receive(self, queue: VirtQueue) -> bool:
        chain = self._chains[RECEIVE]
        more = True
        for _ in range(queue.size):
            sender = self._sender()
            if sender is None and not self._answers:
                more = False
                break
            if not queue.pop(chain):
                more = queue.enable_kicks()
                break
            if chain.readable or chain.writable <= HEADER.size:
                raise NeedsReset(f"queue {queue.index}: a buffer that no packet can go into")
            if self._answers:
                packet = self._answers.popleft()
            else:
                assert sender is not None
                packet = sender.packet(chain.writable - HEADER.size)
                self._line.rotate(-1)  # every connection has its turn
                if sender.said_nothing_more:
                    self._expect(sender, SHUTDOWN_DEADLINE, again=False)
            queue.push(chain, chain.write(0, packet))
            if T.virtio_vsock_packet.on:
                self._trace("to", Header.decode(packet[: HEADER.size]))
        if self._transmit_waits and len(self._answers) < ANSWERS_MAX and self.transport is not None:
            self._transmit_waits = False
            self.transport.ring(TRANSMIT)
        return more

    def _trace(self, direction: str, header: Header) -> None:
        source, target = f"{header.src_cid}:{header.src_port}", f"{header.dst_cid}:{header.dst_port}"
        T.virtio_vsock_packet(direction, source, target, header.operation, header.length, header.flags)

    def _sender(self) -> Connection | None:
        while self._line:
            if self._line[0].next_operation() is not None:
                return self._line[0]
            self._line.popleft().queued = False
        return None

    def _answer(self, packet: bytes) -> None:
        self._answers.append(packet)
        if self.transport is not None:
            self.transport.ring(RECEIVE)

    def _event(self, queue: VirtQueue) -> bool:
        """5.10.6.7: after a load the driver is told to give up its connections and read its CID again."""
        chain = self._chains[EVENT]
        while self.state.reset_wanted:
            if not queue.pop(chain):
                if not queue.enable_kicks():
                    break
                continue
            if chain.readable or chain.writable < 4:
                raise NeedsReset(f"queue {queue.index}: a buffer that no event can go into")
            queue.push(chain, chain.write(0, struct.pack("<I", TRANSPORT_RESET)))
            self.state.reset_wanted = False
        return False

    # -- packets from the guest -----------------------------------------------------------------

    def _transmit(self, queue: VirtQueue) -> bool:
        chain = self._chains[TRANSMIT]
        for _ in range(queue.size):
            if len(self._answers) >= ANSWERS_MAX:
                self._transmit_waits = True
                return False
            if not queue.pop(chain):
                return queue.enable_kicks()
            if chain.writable or chain.readable < HEADER.size:
                raise NeedsReset(f"queue {queue.index}: a buffer that holds no packet")
            self._packet(Header.decode(chain.read(0, HEADER.size)), chain)
            queue.push(chain, 0)
        return True

    def _packet(self, header: Header, chain: Chain) -> None:
        """5.10.6.4: what cannot be is answered with RST, and RST never is."""
        if T.virtio_vsock_packet.on:
            self._trace("from", header)
        if header.src_cid != self._cid:
            return  # no address to answer to
        connection = None
        if header.dst_cid == HOST_CID and header.kind == STREAM:
            connection = self._connections.get((header.dst_port, header.src_port))
        if header.operation == RESET:
            if connection is not None:
                self._part(connection, drain=True)
        elif connection is not None:
            if not self._for_connection(connection, header, chain):
                self._break(connection)
        elif header.operation == REQUEST and header.dst_cid == HOST_CID and header.kind == STREAM:
            self._guest_connects(header)
        else:
            self._answer(header.refusal())

    def _for_connection(self, connection: Connection, header: Header, chain: Chain) -> bool:
        """``False``: a packet that must not come now."""
        operation = header.operation
        if header.length > chain.readable - HEADER.size or operation == REQUEST:
            return False
        connection.heard(header)
        if operation == RESPONSE:
            if connection.stage is not Stage.REQUESTED or not connection.requested:
                return False
            connection.establish()
            self._expect(connection, None)
            return connection.greet(b"OK %d\n" % connection.host_port)
        if connection.stage is not Stage.ESTABLISHED:
            return False
        if operation == RW:
            if not connection.may_bring(header.length):
                return False  # 5.10.6.3.1
            connection.to_host(chain.read(HEADER.size, header.length))
        elif operation == SHUTDOWN:
            if connection.guest_shuts_down(header.flags):
                self._answer(header.refusal())
                self._part(connection, drain=True)
        elif operation == CREDIT_REQUEST:
            connection.credit_wanted()
        else:
            return operation == CREDIT_UPDATE
        return True

    # -- connections ----------------------------------------------------------------------------

    def _add(self, connection: Connection, header: Header | None = None) -> None:
        self._connections[connection.key] = connection
        if header is not None:
            connection.heard(header)

    def _full(self) -> bool:
        return len(self._connections) + len(self._leaving) >= CONNECTIONS_MAX

    def _guest_connects(self, header: Header) -> None:
        if self._full():
            self._answer(header.refusal())
            return
        try:
            host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # no descriptor left
            self._answer(header.refusal())
            return
        connection = Connection(
            self, self._loop, host, self._cid, header.src_port, header.dst_port, Stage.CONNECTING
        )  # fmt: skip
        self._add(connection, header)
        self._connect(connection, time.monotonic() + CONNECT_DEADLINE)

    def _connect(self, connection: Connection, deadline: float) -> None:
        """Ask the host's program. A unix socket connects at once, or says that the backlog is full."""
        with self.lock:
            if self._connections.get(connection.key) is not connection:
                return
            try:
                connection.host.connect(f"{self._path}_{connection.host_port}")
            except BlockingIOError:
                if time.monotonic() < deadline:
                    again = functools.partial(self._connect, connection, deadline)
                    connection.timer = self._loop.call_later(CONNECT_AGAIN, again)
                else:
                    self._break(connection)
            except OSError:
                self._break(connection)
            else:
                connection.timer = None
                connection.establish()

    def _program_connects(self, program: socket.socket, port: int, rest: bytes) -> None:
        """A host program wants the guest's ``port``, and has sent ``rest`` already."""
        with self.lock:
            if not self.active or self._full():
                program.close()
                return
            while (self._next_host_port, port) in self._connections or self._next_host_port > _LAST_HOST_PORT:
                past_end = self._next_host_port >= _LAST_HOST_PORT
                self._next_host_port = FIRST_HOST_PORT if past_end else self._next_host_port + 1
            connection = Connection(
                self, self._loop, program, self._cid, port, self._next_host_port, Stage.REQUESTED, rest
            )
            self._next_host_port += 1
            self._add(connection)
            self._expect(connection, REQUEST_DEADLINE)
            self.has_packet(connection)

    def _expect(self, connection: Connection, seconds: float | None, *, again: bool = True) -> None:
        """Break ``connection`` unless something happens; ``None``: it has happened."""
        if connection.timer is not None:
            if not again:
                return
            connection.timer.cancel()
            connection.timer = None
        if seconds is not None:
            expire = functools.partial(self._expired, connection, seconds)
            connection.timer = self._loop.call_later(seconds, expire)

    def _expired(self, connection: Connection, seconds: float) -> None:
        with self.lock:
            connection.timer = None
            if connection in self._leaving:
                connection.close()
                self.drained(connection)
            elif self._connections.get(connection.key) is connection:
                if self._pauses:  # the guest cannot answer
                    self._expect(connection, seconds)
                else:
                    self._break(connection)

    def _break(self, connection: Connection) -> None:
        """RST to the guest, if it knows of the connection, and the end for the host's program."""
        if connection.requested:
            header = Header(
                self._cid, HOST_CID, connection.guest_port, connection.host_port, 0, STREAM, RESET, 0, 0, 0
            )  # fmt: skip
            self._answer(header.refusal())
        self._part(connection, drain=False)

    def _part(self, connection: Connection, *, drain: bool) -> None:
        """The guest does not know ``connection`` any more."""
        del self._connections[connection.key]
        if connection.queued:
            self._line.remove(connection)
            connection.queued = False
        connection.leave(drain=drain)
        if connection.stage is not Stage.CLOSED:
            self._leaving.add(connection)
            self._expect(connection, DRAIN_DEADLINE)

    # -- for connections (vsock_connection.Owner) -----------------------------------------------

    def enter(self) -> contextlib.AbstractContextManager[object]:
        """The lock, for callbacks of the loop's."""
        return self.lock

    def has_packet(self, connection: Connection) -> None:
        """Put it in line."""
        if self._connections.get(connection.key) is connection and not connection.queued:
            connection.queued = True
            self._line.append(connection)
            if self.transport is not None:
                self.transport.ring(RECEIVE)

    def drained(self, connection: Connection) -> None:
        """Its socket is closed."""
        self._leaving.discard(connection)

    # -- the device's life ----------------------------------------------------------------------

    def deactivated(self) -> None:
        """All connections are gone; their sockets are the loop's, and this may be a vCPU's thread."""
        gone = list(self._connections.values())
        self._connections.clear()
        self._line.clear()
        self._answers.clear()
        self._transmit_waits = False
        for connection in gone:
            connection.stage = Stage.DRAINING
            connection.queued = False
        self._leaving.update(gone)
        if gone:
            self._loop.post(functools.partial(self._bury, gone))

    def _bury(self, gone: list[Connection]) -> None:
        with self.lock:
            for connection in gone:
                if connection.stage is not Stage.CLOSED:
                    connection.leave(drain=True)
                if connection.stage is Stage.CLOSED:
                    self.drained(connection)
                else:
                    self._expect(connection, DRAIN_DEADLINE)

    def close(self) -> None:
        """Close every socket and remove the listener's file."""
        with self.lock:
            self._listener.close()
            for connection in [*self._connections.values(), *self._leaving]:
                connection.close()
            self._connections.clear()
            self._leaving.clear()
            self._line.clear()

    def decode(self, section: str, data: object) -> Callable[[], None]:
        """As the base class does; the connections stayed behind, and the driver is to hear of it."""
        apply = super().decode(section, data)

        def apply_and_tell() -> None:
            apply()
            self.state.reset_wanted = True

        return apply_and_tell
