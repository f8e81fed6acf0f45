"""A copy-on-write overlay: a sparse file with what differs from a base that is never written, except by ``commit``.

::

    0         header, one sector: what is below in _HEADER, the base's name, a checksum
    4096      bitmap: one bit for each cluster of 4 KiB, set: the cluster is here
    data_at   the clusters, each at its own offset in the disk

Order is what makes it survive a crash. A flush makes data durable before the bits that stand for it, see
``native/block_overlay.h``. What takes several steps, ``discard`` and ``commit``, notes in the header that it has begun:
an overlay found ``EMPTYING`` is emptied to the end when it is opened; one found ``COMMITTING`` reads as ever, since
whatever its base has already got is the same, but its base's time stamp does not count.

The base is recognized by its size and, if it is a file, its time stamp. An overlay over a base that was written
meanwhile would mix two disks, so it is refused.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from typing import Any

from pyvmm.block.image import SECTOR, Image, check_result, disk_size, lock_disk, open_disk_file, open_image
from pyvmm.errors import ConfigError, HostError, ImageError
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

T = trace_group("block")

MAGIC = b"pyvmmCOW"
VERSION = 1
CLUSTER: int = lib.PV_CLUSTER
BITMAP_AT = 4096
SIZE_MAX = 1 << 44
"""16 TiB, for which the bitmap is 512 MiB."""
COMMIT_STEP = 256
"""Clusters moved at once; in between the guest's requests are served."""

CLEAN, COMMITTING, EMPTYING = range(3)

# magic, version, cluster size, state, length of the base's name, disk's size, base's time stamp (ns)
_HEADER = struct.Struct("<8sIIIIQq")
_NAME_MAX = SECTOR - _HEADER.size - 4


class Header:
    """What the file says of itself."""

    def __init__(self, size: int, base_time: int, base_name: str, state: int = CLEAN) -> None:
        self.size = size
        self.base_time = base_time
        self.base_name = base_name
        self.state = state

    @property
    def data_at(self) -> int:
        """Where the clusters begin."""
        return BITMAP_AT + bitmap_size(self.size)

    def encode(self) -> bytes:
        """One sector, which a disk writes whole or not at all."""
        name = os.fsencode(self.base_name)[-_NAME_MAX:]
        head = _HEADER.pack(MAGIC, VERSION, CLUSTER, self.state, len(name), self.size, self.base_time) + name
        head = head.ljust(SECTOR - 4, b"\0")
        return head + zlib.crc32(head).to_bytes(4, "little")

    @staticmethod
    def decode(path: str, data: bytes) -> Header:
        """ImageError names what is wrong."""
        if len(data) < SECTOR or not data.startswith(MAGIC):
            raise ImageError(path, "header", "is no overlay of pyvmm's; name another file, or remove this one")
        version = int.from_bytes(data[8:12], "little")
        if version != VERSION:
            raise ImageError(path, "version", f"{version}; this pyvmm knows version {VERSION}")
        if zlib.crc32(data[: SECTOR - 4]).to_bytes(4, "little") != data[SECTOR - 4 :]:
            raise ImageError(path, "header", "its checksum does not fit: the overlay is damaged")
        _, _, cluster, state, length, size, base_time = _HEADER.unpack_from(data)
        if cluster != CLUSTER or state > EMPTYING or length > _NAME_MAX or size % SECTOR or not 0 < size <= SIZE_MAX:
            raise ImageError(path, "header", "has impossible values: the overlay is damaged")
        return Header(size, base_time, os.fsdecode(data[_HEADER.size : _HEADER.size + length]), state)


def bitmap_size(size: int) -> int:
    """Bytes of the bitmap, whole pages, for a disk of ``size`` bytes."""
    page = int(lib.PV_BITMAP_PAGE)
    clusters = -(-size // CLUSTER)
    return -(-clusters // (8 * page)) * page


class Overlay(Image):
    """An image that takes what is written over ``base``, which it owns. Without ``header`` nothing of it is kept."""

    def __init__(self, path: str, fd: int, base: Image, header: Header | None) -> None:
        super().__init__(path, fd, base.size, read_only=False)
        self.base = base
        self._header = header
        at = (BITMAP_AT, header.data_at) if header else (0, 0)
        self._overlay = lib.pv_overlay_new(base.fd, base.size, *at, header is not None)
        if self._overlay == ffi.NULL:
            raise HostError(f"overlay {path}: not enough memory for its bitmap; use a smaller disk")
        self.native.overlay = self._overlay

    @property
    def clusters_used(self) -> int:
        """Clusters of 4 KiB that are here and not in the base."""
        return int(lib.pv_overlay_used(self._overlay))

    def discard(self) -> None:
        """Back to what the base holds. Requests in flight end before or begin after it, one by one.

        A guest may go on meanwhile only if nothing is kept anyway: what it flushes before the header says that all is
        done would be gone after a crash.
        """
        T.block_overlay_discard.on and T.block_overlay_discard(self.path, self.clusters_used)
        self._note(EMPTYING)
        lib.pv_overlay_clear(self.native)
        self._emptied()

    def commit(self) -> None:
        """Move everything into the base; the disk may be in use meanwhile, and what is written then may stay here.

        HostError if the base cannot be written, or somebody else uses it.
        """
        used = self.clusters_used
        T.block_overlay_commit.on and T.block_overlay_commit(self.path, used)
        base_fd = open_disk_file(self.base.path, read_only=False)
        try:
            if not os.path.sameopenfile(base_fd, self.base.fd):
                raise ConfigError(f"disk {self.base.path}: is another file than it was; move the old one back")
            lock_disk(self.base.fd, self.base.path, shared=False)  # the same lock, upgraded
            self._note(COMMITTING)
            at = 0
            while at < self._overlay.clusters:
                at = check_result(lib.pv_overlay_commit(self.native, base_fd, at, COMMIT_STEP), self.base.path)
            self.flush()
            if self._header is None:
                os.fdatasync(base_fd)  # nothing of the overlay is kept, so its flush does nothing
            else:
                self._header.base_time = time_stamp(base_fd)
            self._emptied()
        finally:
            os.close(base_fd)
            with contextlib.suppress(HostError):
                lock_disk(self.base.fd, self.base.path, shared=True)

    def begin_scratch(self) -> None:
        """From now on nothing of it survives a crash, until :meth:`keep`; so throwing it away costs no fsync. OSError.

        It is a replica's: what that writes counts only once it is the guest.
        """
        self._note(EMPTYING)

    def throw_away(self) -> None:
        """Back to what the base holds, after :meth:`begin_scratch`; nothing may be in flight. OSError."""
        T.block_overlay_discard.on and T.block_overlay_discard(self.path, self.clusters_used)
        lib.pv_overlay_clear(self.native)
        check_result(lib.pv_overlay_trim(self.native), self.path)

    def keep(self) -> None:
        """What is here counts, durably, over the base as it is now. OSError."""
        self.flush()
        if self._header is not None:
            self._header.base_time = time_stamp(self.base.fd)
        self._note(CLEAN)

    def _emptied(self) -> None:
        self.flush()
        self._note(CLEAN)
        check_result(lib.pv_overlay_trim(self.native), self.path)

    def _note(self, state: int) -> None:
        if self._header is not None:
            self._header.state = state
            os.pwrite(self.fd, self._header.encode(), 0)
            os.fdatasync(self.fd)

    def load(self) -> None:
        """Take over the file's bitmap."""
        assert self._header is not None
        data = os.pread(self.fd, bitmap_size(self.size), BITMAP_AT)
        lib.pv_overlay_load_bits(self._overlay, data, len(data))
        if self._header.state == EMPTYING:
            self.discard()

    def claim(self) -> None:
        """Be the one that writes, and know what the one before has written."""
        super().claim()
        if self._header is not None:
            self._header = Header.decode(self.path, os.pread(self.fd, SECTOR, 0))
            self.load()

    def close(self) -> None:
        """Flush, so that a clean end loses nothing, then give everything back. OSError if that fails."""
        if self.fd < 0:
            return
        try:
            if self._header is not None and self.claimed:
                self.flush()
        finally:
            super().close()
            self.native.overlay = ffi.NULL
            lib.pv_overlay_free(self._overlay)
            self.base.close()


def open_overlay(path: str, base_path: str, *, later: bool = False, kind: type[Overlay] = Overlay) -> Overlay:
    """The overlay at ``path`` over ``base_path``, made if it is not there. ConfigError, HostError or ImageError.

    ``later``: somebody else still writes to it; :meth:`Overlay.claim` takes it over.
    """
    base = open_image(base_path, read_only=True)
    try:
        if not os.path.lexists(path):
            create_overlay(path, base)
        return _open(path, base, later, kind)
    except BaseException:
        base.close()
        raise


def _open(path: str, base: Image, later: bool, kind: type[Overlay]) -> Overlay:
    fd = open_disk_file(path, read_only=False)
    try:
        if os.path.sameopenfile(fd, base.fd):
            raise ConfigError(f"overlay {path}: is its own base; name another file")
        if not later:
            lock_disk(fd, path, shared=False)
        header = Header.decode(path, os.pread(fd, SECTOR, 0))
        if header.size != base.size:
            raise ImageError(path, "base", f"has {header.size} bytes, {base.path} has {base.size}")
        if header.state != COMMITTING and header.base_time != time_stamp(base.fd):
            raise ImageError(path, "base", f"{base.path} was written after the overlay was made over it;"
                             " restore it, or start over with a new overlay")  # fmt: skip
        if os.fstat(fd).st_size < header.data_at + header.size:
            raise ImageError(path, "size", "the file is too short: the overlay is damaged")
        overlay = kind(path, fd, base, header)
    except BaseException:
        os.close(fd)
        raise
    overlay.claimed = not later
    if not later:
        overlay.load()
    return overlay


def read_header(path: str) -> Header:
    """What the overlay at ``path`` says of itself, without its base."""
    fd = open_disk_file(path, read_only=True)
    try:
        return Header.decode(path, os.pread(fd, SECTOR, 0))
    finally:
        os.close(fd)


def create_overlay(path: str, base: Image) -> None:
    """A new, empty overlay file over ``base``. ConfigError if the disk is too large, HostError if it cannot be made."""
    if base.size > SIZE_MAX:
        raise ConfigError(f"disk {base.path}: too large for an overlay, at most {SIZE_MAX >> 40} TiB")
    header = Header(base.size, time_stamp(base.fd), os.path.abspath(base.path))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, header.data_at + header.size)
            # So that a flush, which has the data in place by then, does not fail for want of a place for its bits.
            os.posix_fallocate(fd, 0, header.data_at)
            os.fsync(fd)
            os.pwrite(fd, header.encode(), 0)
            os.fsync(fd)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise HostError(f"overlay {path}: cannot be made: {error.strerror}; choose another place") from None


def temporary_overlay(base_path: str) -> Overlay:
    """An overlay in memory, gone with the process: for tests, and for a replica whose writes may be thrown away."""
    base = open_image(base_path, read_only=True)
    fd = os.memfd_create("pyvmm-overlay", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, base.size)
        return Overlay(f"memory over {base_path}", fd, base, None)
    except BaseException:
        os.close(fd)
        base.close()
        raise


def time_stamp(fd: int) -> int:
    """When a file was last written (ns); 0 for a block device, whose node says nothing about it."""
    return 0 if disk_size(fd, "")[1] else os.fstat(fd).st_mtime_ns


def describe(path: str) -> dict[str, Any]:
    """Facts about an overlay file, for ``pyvmm disk info``."""
    header = read_header(path)
    return {
        "overlay": path, "base": header.base_name, "size": header.size,
        "state": ("clean", "commit interrupted", "being emptied")[header.state],
        "allocated": os.stat(path).st_blocks * 512,
    }  # fmt: skip
