"""The primary's writes on their way to the secondary's image: records, and the log where they wait for a checkpoint.

A record, on the wire as in the log; little-endian::

    u32 CRC-32C of all that follows | u32 kind | u64 epoch | u64 offset | u64 length | data, of WRITE only

The log is two files, one for the even epochs and one for the odd ones: while epoch N waits for its checkpoint, N + 1 is
being written. A marker ends an epoch. It counts if all records before it are whole, which their checksums say: one
fdatasync makes them and the marker durable, in no order.

A file is overwritten in place, so behind its end lie records of an older epoch. They are told by that epoch; and the
log is emptied, durably, before epochs begin anew.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pyvmm.block.image import SECTOR
from pyvmm.block.pair_file import sync_folder
from pyvmm.errors import ChannelError, HostError
from pyvmm.native import ffi, lib

RECORD = struct.Struct("<IIQQQ")
WRITE, ZERO, MARKER = 1, 2, 4
DATA_MAX = 1 << 20
"""Bytes of one WRITE."""
KEPT = 64 << 20
"""Bytes of a log file that are not given back between epochs."""
_READ = 4 << 20


class Record(NamedTuple):
    """``data`` is empty but for WRITE; bytes."""

    kind: int
    epoch: int
    offset: int
    length: int
    data: memoryview


def encode_record(kind: int, epoch: int, offset: int = 0, length: int = 0, data: bytes | memoryview = b"") -> bytes:
    """One record; ``length`` is the data's if there is some."""
    body = RECORD.pack(0, kind, epoch, offset, len(data) or length)[4:] + bytes(data)
    return _crc(memoryview(body)).to_bytes(4, "little") + body


def decode_records(batch: memoryview, disk: int) -> Iterator[Record]:
    """Records of a hostile ``batch``, for a disk of ``disk`` bytes. ChannelError names the first that is none."""
    at = 0
    while at < len(batch):
        record, at = decode_record(batch, at, disk)
        yield record


def decode_record(batch: memoryview, at: int, disk: int) -> tuple[Record, int]:
    """The record at ``at``, and where the next one is. ChannelError."""
    if len(batch) - at < RECORD.size:
        raise ChannelError(f"a record of a write is cut off after {len(batch) - at} bytes")
    crc, kind, epoch, offset, length = RECORD.unpack_from(batch, at)
    begin = at + RECORD.size
    end = begin + (length if kind == WRITE else 0)
    if kind == WRITE and length > DATA_MAX:
        raise ChannelError(f"a write of {length} bytes; {DATA_MAX} is the most there can be")
    if end > len(batch):
        raise ChannelError(f"a write of {length} bytes is cut off")
    if _crc(batch[at + 4 : end]) != crc:
        raise ChannelError("a record of a write is damaged")
    if kind in (WRITE, ZERO):
        if offset % SECTOR or length % SECTOR or not length or offset > disk or length > disk - offset:
            raise ChannelError(f"a write of {length} bytes at {offset} of a disk of {disk}")
    elif kind != MARKER:
        raise ChannelError(f"a record of the unknown kind {kind}")
    return Record(kind, epoch, offset, length, batch[begin:end]), end


def _crc(view: memoryview) -> int:
    return int(lib.pv_crc32c(0, ffi.from_buffer(view), len(view)))


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite(2) to the end. OSError."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        offset += done
        view = view[done:]


class Segment:
    """One of the log's files. ``epoch`` 0: nothing of it counts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.empty()

    def empty(self) -> None:
        """Forget what is there."""
        self.epoch = self.end = 0
        self.marked = False

    def begin(self, epoch: int) -> None:
        """From now on it is ``epoch``'s."""
        self.empty()
        self.epoch = epoch
        if os.fstat(self.fd).st_size > KEPT:
            os.ftruncate(self.fd, 0)

    def append(self, data: bytes | memoryview) -> None:
        """Behind what is there. OSError."""
        write_all(self.fd, data, self.end)
        self.end += len(data)

    def records(self, disk: int) -> Iterator[Record]:
        """From the first to the one before the marker, or to the end; ChannelError at what is none. OSError."""
        at, held, base = 0, memoryview(b""), 0
        while at < self.end:
            if base + len(held) < self.end and at - base + RECORD.size + DATA_MAX > len(held):
                held, base = memoryview(os.pread(self.fd, min(_READ, self.end - at), at)), at
            record, end = decode_record(held, at - base, disk)
            if record.kind == MARKER:
                return
            yield record
            at = base + end

    def scan(self, disk: int) -> None:
        """Find out what is there after a crash: an epoch, if it was marked and all of it is whole."""
        self.empty()
        size = os.fstat(self.fd).st_size
        at, held, base, epoch = 0, memoryview(b""), 0, 0
        while at < size:
            if base + len(held) < size and at - base + RECORD.size + DATA_MAX > len(held):
                held, base = memoryview(os.pread(self.fd, min(_READ, size - at), at)), at
            try:
                record, end = decode_record(held, at - base, disk)
            except ChannelError:
                return
            epoch = epoch or record.epoch
            if record.epoch != epoch:
                return
            at = base + end
            if record.kind == MARKER:
                self.epoch, self.end, self.marked = epoch, at, True
                return


class WriteLog:
    """Epochs that wait. ``path``: of its two files, without the digit. ``limit``: bytes an epoch may have."""

    def __init__(self, path: str, disk: int, limit: int) -> None:
        self._disk = disk
        self.limit = limit
        self._segments: list[Segment] = []
        try:
            for digit in "01":
                self._segments.append(Segment(path + digit))
            sync_folder(path)
        except OSError as error:
            self.close()
            raise HostError(f"{path}: cannot be made: {error.strerror}; choose another place for the disk") from None

    def scan(self) -> int:
        """The newest epoch that is all there, after a crash; 0 for none. OSError."""
        for segment in self._segments:
            segment.scan(self._disk)
        return max(segment.epoch for segment in self._segments)

    def _of(self, epoch: int) -> Segment:
        return self._segments[epoch % 2]

    def began(self, epoch: int) -> bool:
        """Whether there is something of ``epoch``; if not, its file may still be an older one's."""
        return self._of(epoch).epoch == epoch

    def append(self, epoch: int, data: bytes | memoryview) -> None:
        """Whole records of ``epoch``. HostError if there are too many, OSError."""
        segment = self._of(epoch)
        if segment.epoch != epoch:
            segment.begin(epoch)
        if segment.end + len(data) > self.limit:
            raise HostError(f"{segment.path}: more than {self.limit >> 20} MiB were written between two checkpoints;"
                            " take more of them, or allow more")  # fmt: skip
        segment.append(data)

    def mark(self, epoch: int) -> None:
        """``epoch`` ends, and is durable when this returns. OSError."""
        segment = self._of(epoch)
        if segment.epoch != epoch:
            segment.begin(epoch)
        segment.append(encode_record(MARKER, epoch))
        os.fdatasync(segment.fd)
        segment.marked = True

    def apply(self, epoch: int, write: Callable[[Record], None]) -> bool:
        """``write`` each record of ``epoch``, which is marked, in order; whether there was one. HostError, OSError."""
        segment = self._of(epoch)
        if segment.epoch != epoch or not segment.marked:
            raise ValueError(f"epoch {epoch} is not held")
        found = False
        try:
            for record in segment.records(self._disk):
                write(record)
                found = True
        except ChannelError as error:
            raise HostError(f"{segment.path}: {error}; see to the host's disk") from None
        return found

    def held(self) -> list[int]:
        """Epochs that are marked, in order."""
        return sorted(segment.epoch for segment in self._segments if segment.marked)

    def drop(self) -> None:
        """Nothing waits any more, durably. OSError."""
        for segment in self._segments:
            segment.empty()
            os.ftruncate(segment.fd, 0)
            os.fsync(segment.fd)

    def remove(self) -> None:
        """Close it and remove its files. OSError."""
        paths = [segment.path for segment in self._segments]
        self.close()
        for path in paths:
            os.unlink(path)

    def close(self) -> None:
        """Harmless twice."""
        for segment in self._segments:
            if segment.fd >= 0:
                os.close(segment.fd)
                segment.fd = -1
