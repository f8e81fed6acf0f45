"""The disks of a protected guest: what it writes goes to the secondary's images, too, in step with the checkpoints.

::

    primary    guest --virtio-blk--> image            secondary   replica --virtio-blk--> overlay
                          \\--> records (native) ----> disk link ------> log --commit--> image

First the secondary says the checksums of what its images hold (block/disk_sums.py), and only pieces that differ are
copied: a copy that was broken off goes on where it was, and a disk that was the pair's once needs what has changed
since. That is right whatever is written meanwhile. A byte of a piece that compares equal either was not written since
the records began, and is the same on both sides; or it was, and its record brings it.

The first checkpoint waits until all that differs has been copied; meanwhile the guest writes, and its writes go the
same way, so that the copy and they have one order (native/block_forward.h). From then on each checkpoint ends with a
marker on this connection, and ``vmstate-received`` is said only when all before it is durable (COLO.md, rule 4).

One message: big-endian u32 number of the disk, u32 bytes, records (block/write_log.py); before all others, from the
secondary, the same with checksums in place of records. Disks that are read-only are
nobody's business: each side has its own copy. An error on the way, or of the secondary's disk, ends the protection and
not the guest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvmm.block.disk_sums import SUM, count_of, pieces, sum_of
from pyvmm.block.pair_file import PairFile, read_pair, remove_pair, write_pair
from pyvmm.block.replica_disk import LIMIT, ReplicaOverlay
from pyvmm.colo.session import ColoSession
from pyvmm.errors import ChannelError, HostError, PyvmmError, StateError

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine
    from pyvmm.virtio.blk import VirtioBlk

HEAD = struct.Struct(">II")
BATCH = 4 << 20
"""Bytes of records in one message, at most."""
QUEUED = 16 << 20
"""Bytes that wait for the line; then the guest's writes wait, too, so it is also how long they do."""
EPOCH_BYTES = LIMIT // 4
"""Sent since the last checkpoint: the next one is made now, before the secondary's log is full."""
SUMS_AT_ONCE = 16
"""Pieces whose checksums are one message: 16 MiB are read for it, which is no time to fall silent for."""
END_DEADLINE = 10.0


def written_disks(machine: Machine) -> list[VirtioBlk]:
    """Those that the guest can write, in the machine's order; both sides have the same ones."""
    from pyvmm.machine.virtio_slots import virtio_devices
    from pyvmm.virtio.blk import VirtioBlk

    return [disk for disk in virtio_devices(machine, VirtioBlk) if not disk.image.read_only]


class PrimaryDisks:
    """Of a primary. On the replication's thread, but for what says otherwise."""

    def __init__(self, machine: Machine, session: ColoSession) -> None:
        self._disks = written_disks(machine)
        self._session = session
        self._socket: socket.socket | None = None
        self._event = -1
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._theirs: list[list[bytes]] = []
        """Checksums of the secondary's disks, until they have been copied to."""
        self._sent: int | None = None
        """Bytes since the last marker, about; None before the first."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each."""
        return tuple(disk.image.size for disk in self._disks)

    def connect(self, sock: socket.socket, timeout: float) -> None:
        """The connection; ``timeout`` is the longest that the other side may take nothing from it."""
        self._socket = sock
        sock.settimeout(timeout)

    def learn(self) -> None:
        """What the secondary's disks hold. ChannelError."""
        assert self._socket is not None
        self._theirs = []
        for number, disk in enumerate(self._disks):
            known: list[bytes] = []
            while len(known) < count_of(disk.image.size):
                if self._session.closing or self._session.failover_wanted:
                    raise ChannelError("the disks were not compared to their end")
                due = min(SUMS_AT_ONCE, count_of(disk.image.size) - len(known))
                message = read_all(self._socket, memoryview(bytearray(HEAD.size + due * SUM)))
                if HEAD.unpack_from(message) != (number, due * SUM):
                    raise ChannelError(f"the secondary sent no checksums of its disk {number}")
                known += [bytes(message[at : at + SUM]) for at in range(HEAD.size, len(message), SUM)]
            self._theirs.append(known)

    def begin(self) -> None:
        """The guest stands still: from here on what it writes is recorded. On the loop. HostError."""
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        session = self._session
        assert self._socket is not None
        limit = int((self._socket.gettimeout() or 5.0) * 1000)
        for disk in self._disks:
            if read_pair(disk.image.path) is None:
                content = PairFile(pair=session.pair, term=session.term, role="primary", state="protected")
                write_pair(disk.image.path, content)
            disk.forward_begin(self._event, QUEUED, limit)
        self._thread = threading.Thread(target=self._send_all, name="colo-disks", daemon=True)
        self._thread.start()

    def copy_all(self) -> None:
        """Send what the secondary's disks have not got, while the guest writes. ChannelError, HostError."""
        counters = self._session.counters
        for disk, theirs in zip(self._disks, self._theirs, strict=True):
            for (offset, size), known in zip(pieces(disk.image.size), theirs, strict=True):
                if self._session.closing or self._session.failover_wanted or self._stopping:
                    raise ChannelError("the disks were not copied to their end")
                try:
                    same = sum_of(disk.image.read(offset, size)) == known
                except OSError as error:
                    raise HostError(f"disk {disk.image.path}: cannot be read: {error.strerror or error}") from None
                if same:
                    counters.disk_same += size
                else:
                    disk.forward_copy(offset, size)
                    counters.disk_copied += size
        self._theirs = []

    def mark(self, epoch: int) -> None:
        """The guest stands still for checkpoint ``epoch``: it is to have what was written up to here. On the loop."""
        for disk in self._disks:
            disk.forward_mark(epoch)
        self._sent = 0

    def alone(self) -> None:
        """The guest is this side's, or is over. On the loop."""
        for disk in self._disks:
            found = read_pair(disk.image.path)
            if found is not None and found.state == "protected":
                remove_pair(disk.image.path)

    def close(self) -> None:
        """Nothing is recorded or sent any more. Harmless twice."""
        self._stopping = True
        for disk in self._disks:
            disk.forward_end()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._event >= 0:
            os.eventfd_write(self._event, 1)
        if self._thread is not None:
            self._thread.join(END_DEADLINE)
        if self._socket is not None:
            self._socket.close()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1

    def _send_all(self) -> None:
        buffer = bytearray(BATCH)
        try:
            while not self._stopping:
                select.select([self._event], [], [], 1.0)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._event)
                while not self._stopping and self._send_round(buffer):
                    pass
        except PyvmmError as error:
            if not self._stopping:
                self._session.suspect(str(error))

    def _send_round(self, buffer: bytearray) -> int:
        return sum(self._send_some(number, disk, buffer) for number, disk in enumerate(self._disks))

    def _send_some(self, number: int, disk: VirtioBlk, buffer: bytearray) -> int:
        size = disk.forward_take(buffer)
        if size:
            assert self._socket is not None
            try:
                self._socket.sendall(HEAD.pack(number, size) + memoryview(buffer)[:size])
            except TimeoutError:
                raise ChannelError("the secondary takes nothing of what is written to disks") from None
            except OSError as error:
                raise ChannelError(f"the disks' connection broke: {error.strerror or error}") from None
            self._note_sent(size)
        return size

    def _note_sent(self, size: int) -> None:
        if self._sent is None:
            return
        self._sent += size
        if self._sent >= EPOCH_BYTES:
            self._sent = 0
            with contextlib.suppress(StateError):  # the pair is over
                self._session.ask_checkpoint("disks")


class SecondaryDisks:
    """Of a secondary. On the replication's thread, but for what says otherwise."""

    def __init__(self, machine: Machine, session: ColoSession) -> None:
        self._devices = written_disks(machine)
        self._disks = [disk.image.replica for disk in self._devices if isinstance(disk.image, ReplicaOverlay)
                       and disk.image.replica is not None]  # fmt: skip
        self._session = session
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._line_ended = False
        self.problem: PyvmmError | None = None
        """Why this replica is none any more."""

    def __bool__(self) -> bool:
        return bool(self._disks)

    def check(self, sizes: Sequence[int]) -> None:
        """ChannelError unless the primary's disks, of so many bytes, are like these."""
        ours = tuple(disk.size for disk in self._disks)
        if tuple(sizes) != ours:
            raise ChannelError(f"the primary's disks have {_list(sizes)} bytes, those here {_list(ours)}")

    def connect(self, sock: socket.socket, pair: str, term: int) -> None:
        """The connection of the primary of ``pair``. HostError."""
        sock.settimeout(None)
        self._socket = sock
        for disk, device in zip(self._disks, self._devices, strict=True):
            disk.begin(pair, term)
            device.on_host_error = functools.partial(self._replica_failed, disk.path)
        self._thread = threading.Thread(target=self._receive_all, name="colo-disks", daemon=True)
        self._thread.start()

    def wait_marked(self, epoch: int, seconds: float) -> None:
        """Until all that was written before checkpoint ``epoch`` is durable.

        ChannelError: it never will be, so this checkpoint is none. HostError: this replica is none any more.
        """
        if not self._disks:
            return

        def held() -> bool:
            return all(disk.marked >= epoch for disk in self._disks)

        with self._changed:
            self._changed.wait_for(lambda: self.problem is not None or self._line_ended or held(), seconds)
            if self.problem is not None:
                raise self.problem
            if not held():
                why = "the disks' connection ended" if self._line_ended else f"it is not here after {seconds:g} s"
                raise ChannelError(f"what was written to disks before checkpoint {epoch} is missing: {why}")

    def commit(self, epoch: int) -> None:
        """The replica, which stands still, has the disks of checkpoint ``epoch``. On the loop. HostError."""
        for disk in self._disks:
            disk.commit(epoch)

    def take_over(self) -> None:
        """The disks are the guest's, which stands still. On the loop. HostError."""
        for disk in self._disks:
            if self._session.mode == "hybrid":
                disk.failover_hybrid(self._session.term)
            else:
                disk.failover_periodic(self._session.term)
            disk.merge_behind()
        for device in self._devices:
            device.on_host_error = None

    def close(self) -> None:
        """Nothing comes any more. Harmless twice."""
        self._stopping = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if self._thread is not None:
                self._thread.join(END_DEADLINE)
            self._socket.close()

    def _receive_all(self) -> None:
        buffer = memoryview(bytearray(BATCH))
        try:
            self._say_sums()
            while not self._stopping:
                number, size = HEAD.unpack(self._read(buffer[: HEAD.size]))
                if number >= len(self._disks) or size > BATCH:
                    raise ChannelError(f"the primary sent {size} bytes for disk {number}")
                if self._disks[number].receive(self._read(buffer[:size])):
                    with self._changed:
                        self._changed.notify_all()
        except PyvmmError as error:
            if self._stopping:
                return
            with self._changed:
                # A line that ends is the primary's end, perhaps; a disk that fails is this replica's.
                self._line_ended = isinstance(error, _LineEnded)
                self._changed.notify_all()
            if self._line_ended:
                self._session.suspect(str(error))
            else:
                self._give_up(error)

    def _say_sums(self) -> None:
        """What the disks hold. HostError; ChannelError: nobody listens."""
        assert self._socket is not None
        for number, disk in enumerate(self._disks):
            waiting: list[bytes] = []
            for at, one in enumerate(disk.sums(), 1):
                waiting.append(one)
                if len(waiting) == SUMS_AT_ONCE or at == count_of(disk.size):
                    message = HEAD.pack(number, len(waiting) * SUM) + b"".join(waiting)
                    try:
                        self._socket.sendall(message)
                    except OSError as error:
                        raise _LineEnded(f"the disks' connection broke: {error.strerror or error}") from None
                    waiting = []

    def _replica_failed(self, path: str, what: str) -> None:
        """The replica has seen an error that the guest has not. On a thread of its disk's."""
        self._give_up(HostError(f"disk {path}: the replica failed: {what}; see to the host's disk and protect again"))

    def _give_up(self, problem: PyvmmError) -> None:
        with self._changed:
            self.problem = self.problem or problem
            self._changed.notify_all()
        self._session.give_up()

    def _read(self, into: memoryview) -> memoryview:
        assert self._socket is not None
        return read_all(self._socket, into)


class _LineEnded(ChannelError):
    """Nothing more comes."""


def read_all(sock: socket.socket, into: memoryview) -> memoryview:
    """Fill ``into``. ChannelError."""
    done = 0
    try:
        while done < len(into):
            count = sock.recv_into(into[done:])
            if not count:
                raise _LineEnded("the other side closed the disks' connection")
            done += count
    except TimeoutError:
        raise ChannelError("the secondary says nothing of its disks") from None
    except OSError as error:
        raise _LineEnded(f"the disks' connection broke: {error.strerror or error}") from None
    return into


def _list(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) or "no"
