"""The secondary's disk: what the last checkpoint says, what the primary has written since, and what the replica has.

::

    primary --records--> log --commit(n)--> image      as of checkpoint n
    replica --virtio-blk--> overlay -------over------^  thrown away by each checkpoint

Before the first checkpoint the image is nobody's disk yet: records go straight to it, beside what a full sync sends.
From then on the image changes only in :meth:`ReplicaDisk.commit`. That may be cut off anywhere: the log still has the
epoch, and doing it again from its first record ends with the same image (replica_repair.py).

An image is made durable when the log file with what it got last is about to be used again, not within a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

from pyvmm.block.disk_sums import pieces, sum_of
from pyvmm.block.image import Image, disk_size_of, lock_disk, open_disk_file, open_image
from pyvmm.block.overlay import Overlay, create_overlay, open_overlay
from pyvmm.block.pair_file import (
    PairFile,
    State,
    check_startable,
    log_path,
    overlay_path,
    read_pair,
    remove_pair,
    write_pair,
)  # fmt: skip
from pyvmm.block.watched import watched
from pyvmm.block.write_log import (
    MARKER,
    RECORD,
    WRITE,
    ZERO,
    Record,
    WriteLog,
    decode_records,
    encode_record,
    write_all,
)  # fmt: skip
from pyvmm.errors import ChannelError, ConfigError, DeadlineError, HostError
from pyvmm.native import lib
from pyvmm.trace import trace_group

T = trace_group("block")

LIMIT = 1 << 30
"""Bytes that the primary may write between two checkpoints."""
END_PATIENCE = 30.0
"""Seconds without a cluster merged that make the host's disk one that does not answer."""


class ReplicaOverlay(Overlay):
    """A replica's: nobody else's at any time, so there is nothing to hand over."""

    replica: ReplicaDisk | None = None
    """What ends with it: set once it is a device's, for good."""

    def close(self) -> None:
        """As any overlay; a survivor's disk is a plain one again then. OSError."""
        if self.replica is not None and self.replica.stuck:
            return  # a thread still uses it all, and keeps it until the process ends
        replica, self.replica = self.replica, None
        was_the_guest = replica is not None and replica.over
        try:
            if replica is not None:
                replica.end()
        finally:
            try:
                if replica is not None and replica.stuck:
                    self.replica = replica
                else:
                    super().close()
            except OSError:
                if was_the_guest:  # else nobody misses it, and what failed has been told
                    raise

    def claim(self) -> None:
        """It is ours from the beginning."""

    def release(self) -> None:
        """It stays ours. OSError."""
        self.flush()


class ReplicaDisk:
    """``overlay`` is what the replica's device uses, and closes. Owns the log and the image.

    One thread brings what the primary sends (:meth:`receive`), another takes checkpoints. HostError, which names file
    and remedy, is the end of this replica; it comes again from whatever is asked of it later.
    """

    def __init__(self, path: str, *, limit: int = LIMIT) -> None:
        """Make a replica of the image at ``path``: its content does not count. ConfigError, HostError, ImageError."""
        self.path = path
        if os.path.exists(path) and disk_size_of(path)[1]:
            raise ConfigError(f"disk {path}: a block device has no place beside it for a replica's files; use a file")
        check_not_the_guests(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(overlay_path(path))
        self.overlay = _scratch(path)
        fd = -1
        try:
            # The base's lock is the image's: nobody else reads or writes it.
            lock_disk(self.overlay.base.fd, path, shared=False)
            fd = open_disk_file(path, read_only=False)
            self._image = Image(path, fd, self.overlay.size, read_only=False)
            fd = -1
            self._log = WriteLog(log_path(path), self.overlay.size, limit)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            self.overlay.close()
            raise
        self._lock = threading.Lock()
        self._problem: HostError | None = None
        self._pair: PairFile | None = None
        self._unsynced = False
        self.committed = 0
        """The checkpoint that the image holds; 0: none yet."""
        self.marked = 0
        """The newest epoch that is durable as a whole."""
        self.over = False
        """After a failover: this is no replica any more."""
        self.stuck = False
        """The host's disk did not answer at the end; nothing was given back."""
        self._merging: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.overlay.size

    def sums(self) -> Iterator[bytes]:
        """Checksums of what the image holds (disk_sums.py). HostError."""
        for offset, size in pieces(self.size):
            yield self.sum_at(offset, size)

    def sum_at(self, offset: int, size: int) -> bytes:
        """Checksum of a piece of the image, which is the disk as of the last checkpoint. HostError."""
        with self._guarded():
            return sum_of(self._image.read(offset, size))

    # -- what the primary sends -------------------------------------------------------------------

    def begin(self, pair: str, term: int) -> None:
        """The primary of ``pair`` will send its disk. HostError."""
        with self._guarded():
            self._log.drop()
            self._pair = PairFile(pair=pair, term=term, role="secondary", state="syncing")
            write_pair(self.path, self._pair)
            self.overlay.begin_scratch()

    def receive(self, batch: memoryview) -> int:
        """Take over a hostile ``batch`` of records; the epoch of the marker that was its last, or 0.

        When it returns with one, all before it is durable. ChannelError: this is not what can come now; HostError.
        """
        first, epoch = 0, self.marked + 1
        with self._guarded():
            records = list(decode_records(batch, self.size))
            at = 0
            for index, record in enumerate(records):
                if record.epoch != epoch:
                    raise ChannelError(f"a write of epoch {record.epoch} came where {epoch} was due")
                if record.kind == MARKER and index != len(records) - 1:
                    raise ChannelError("a batch of writes goes on behind a marker")
            if epoch > self.committed + 2:
                raise ChannelError(f"writes of epoch {epoch} came while checkpoint {self.committed} is the last one")
            for record in records:
                if record.kind == MARKER:
                    self._keep(epoch, batch[first:at])
                    self._mark(epoch)
                    return epoch
                at += _size_of(record)
            self._keep(epoch, batch[first:at])
        return 0

    def _keep(self, epoch: int, records: memoryview) -> None:
        if not len(records):
            return
        if epoch == 1:
            for record in decode_records(records, self.size):
                self._write(record)
            return
        self._sync_before(epoch)
        self._log.append(epoch, records)

    def _mark(self, epoch: int) -> None:
        if epoch == 1:
            os.fdatasync(self._image.fd)
        else:
            self._sync_before(epoch)
            self._log.mark(epoch)
        self.marked = epoch
        T.block_replica_marked.on and T.block_replica_marked(self.path, epoch)

    def _sync_before(self, epoch: int) -> None:
        """``epoch`` may begin to write over the log of the one before the last: the image has that for good."""
        if not self._log.began(epoch) and self._unsynced:
            os.fdatasync(self._image.fd)
            self._unsynced = False

    def write_from_primary(self, epoch: int, offset: int, data: bytes) -> None:
        """As :meth:`receive` of one write."""
        self.receive(memoryview(encode_record(WRITE, epoch, offset, data=data)))

    def zero_from_primary(self, epoch: int, offset: int, length: int) -> None:
        """As :meth:`receive` of one range of zeros."""
        self.receive(memoryview(encode_record(ZERO, epoch, offset, length)))

    def marker_from_primary(self, epoch: int) -> None:
        """As :meth:`receive` of a marker: durable when it returns."""
        self.receive(memoryview(encode_record(MARKER, epoch)))

    # -- checkpoints ------------------------------------------------------------------------------

    def commit(self, epoch: int) -> None:
        """The disk as of checkpoint ``epoch``, which is marked; what the replica wrote is gone. It stands still.

        HostError: neither this checkpoint nor the one before is there now; a repair has it.
        """
        with self._guarded():
            if epoch != self.committed + 1 or epoch > self.marked:
                raise ValueError(f"checkpoint {epoch} after {self.committed}, with {self.marked} held")
            self.overlay.throw_away()
            if epoch == 1:
                self._become("replica")
            else:
                self._unsynced |= self._log.apply(epoch, self._write)
            self.committed = epoch
            T.block_replica_commit.on and T.block_replica_commit(self.path, epoch)

    def _write(self, record: Record) -> None:
        write_record(self._image, record)

    def _become(self, state: State, term: int | None = None) -> None:
        assert self._pair is not None
        self._pair = PairFile(
            pair=self._pair.pair, term=self._pair.term if term is None else term,
            role="secondary" if state in ("syncing", "replica") else "primary", state=state,
        )  # fmt: skip
        write_pair(self.path, self._pair)

    # -- the end ----------------------------------------------------------------------------------

    def failover_hybrid(self, term: int) -> None:
        """The replica is the guest: what it wrote stays, what the primary wrote since the checkpoint does not."""
        self._failover(term, keep=True)

    def failover_periodic(self, term: int) -> None:
        """The guest goes on from the checkpoint: nothing of what either wrote since stays."""
        self._failover(term, keep=False)

    def _failover(self, term: int, *, keep: bool) -> None:
        """Durable, and the device may run, when it returns; asked again it changes nothing. HostError."""
        with self._guarded(survivor=True):
            if self.over:
                return
            if not self.committed:
                raise ValueError(f"disk {self.path}: there was no checkpoint to take over from")
            os.fdatasync(self._image.fd)  # from here on the log does not make it up
            if not keep:
                self.overlay.throw_away()
            self.overlay.keep()
            self._become("overlaid", term)  # before, it is still a replica, and the log counts
            self.over = True
            self._log.drop()
            T.block_replica_failover.on and T.block_replica_failover(self.path, keep, self.overlay.clusters_used)

    def merge(self) -> None:
        """After a failover: move what is in the overlay into the image, while the device is in use. HostError."""
        with self._guarded(survivor=True):
            if not self.over:
                raise ValueError(f"disk {self.path}: there was no failover")
            try:
                self.overlay.commit()
            finally:
                lock_disk(self.overlay.base.fd, self.path, shared=False)

    def merge_behind(self) -> None:
        """:meth:`merge` on a thread of its own, which ends with the overlay. What fails is tried again at the end."""

        def merge() -> None:
            with contextlib.suppress(HostError):
                self.merge()

        self._merging = threading.Thread(target=merge, name="merge", daemon=True)
        self._merging.start()

    def end(self) -> None:
        """The device is at rest for good, and closes its disk. OSError: it is no plain one; the file beside it says so.
        """
        try:
            if self.over:
                watched(self._merge_and_settle, lambda: self.overlay.clusters_used, END_PATIENCE, "settle")
        except HostError as error:
            raise OSError(errno.EIO, str(error)) from None
        except DeadlineError as error:
            self.stuck = True
            raise OSError(errno.ETIMEDOUT, f"merging: {error}; is the host's disk well? What the guest flushed is in"
                          f" --disk {self.path},overlay={overlay_path(self.path)}") from None  # fmt: skip
        finally:
            if not self.stuck:
                self.close()

    def _merge_and_settle(self) -> None:
        if self._merging is not None:
            self._merging.join()
        self.settle()

    def settle(self) -> None:
        """After a failover, with the device at rest for good: the image is a plain disk again. HostError."""
        self.merge()
        with self._guarded(survivor=True):
            if self.overlay.clusters_used:
                raise ValueError(f"disk {self.path}: is still written to")
            remove_pair(self.path)
            os.unlink(overlay_path(self.path))
            self._log.remove()

    def close(self) -> None:
        """Give back what is not the device's; harmless twice."""
        self._log.close()
        self._image.close()

    @contextlib.contextmanager
    def _guarded(self, *, survivor: bool = False) -> Iterator[None]:
        with self._lock:
            if self._problem is not None:
                raise self._problem
            if self.over and not survivor:
                raise ChannelError(f"disk {self.path}: is no replica any more")
            try:
                yield
            except OSError as error:
                # What failed half is not tried again: fsync tells of a lost page only once.
                self._problem = HostError(f"disk {self.path}: the replica failed: {error.strerror or error};"
                                          " see to the host's disk and protect again")  # fmt: skip
                raise self._problem from error
            except HostError as error:
                self._problem = error
                raise


def _size_of(record: Record) -> int:
    return RECORD.size + len(record.data)


def write_record(image: Image, record: Record) -> None:
    """Do to ``image`` what ``record`` says. OSError."""
    if record.kind == WRITE:
        write_all(image.fd, record.data, record.offset)
    elif record.kind == ZERO:
        zero(image, record.offset, record.length)


def zero(image: Image, offset: int, length: int) -> None:
    """Zeros, which need no space. OSError."""
    result = lib.pv_image_zero(image.native, offset, length, True)
    if result < 0:
        raise OSError(-result, os.strerror(-result), image.path)


def _scratch(path: str) -> ReplicaOverlay:
    base = open_image(path, read_only=True)
    try:
        create_overlay(overlay_path(path), base)
    finally:
        base.close()
    overlay = open_overlay(overlay_path(path), path, kind=ReplicaOverlay)
    assert isinstance(overlay, ReplicaOverlay)
    try:
        overlay.begin_scratch()
    except BaseException:
        overlay.close()
        raise
    return overlay


def check_not_the_guests(path: str) -> None:
    """ConfigError if the image at ``path`` may be the newest one there is: a replica would be written over it."""
    found = read_pair(path)
    if found is not None and found.state in ("overlaid", "protected"):
        check_startable(path)
