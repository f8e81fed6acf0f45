"""A disk image: a raw file or a block device, opened, locked, and ready for the native data path.

Locks are flock(2)'s: an image that is written has one user, one that is only read may have many, and a killed user
leaves none behind. They bind those who ask for them: pyvmm, and what else uses flock on disks (udev, systemd).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from types import TracebackType
from typing import Any, Self

from pyvmm.errors import ConfigError, HostError
from pyvmm.native import ffi, lib
from pyvmm.trace import trace_group

T = trace_group("block")

SECTOR: int = lib.PV_SECTOR

# linux/fs.h: whether it is read-only, and bytes of a physical block; both give an int
_BLKROGET, _BLKPBSZGET = 0x125E, 0x127B


class Image:
    """Owns its descriptor and ``native`` (``struct pv_block_image *``). ``size`` is in bytes, whole sectors."""

    def __init__(self, path: str, fd: int, size: int, *, read_only: bool, is_device: bool = False) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.read_only = read_only
        self.claimed = True
        """Whether this process is the one that writes, if any does."""
        self.native: Any = ffi.new("struct pv_block_image *")
        self.native.fd = fd
        self.native.size = size
        self.native.is_device = is_device

    @property
    def block_size(self) -> int:
        """Bytes of the smallest write that costs no read: what a guest is told as its physical block."""
        size = _ask(self.fd, _BLKPBSZGET) if self.native.is_device else os.fstat(self.fd).st_blksize
        return min(4096, max(SECTOR, size))

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; OSError (EIO if the file has become too short)."""
        data = ffi.new("uint8_t[]", size)
        self._transfer(lib.pv_image_read, data, offset, size)
        return bytes(ffi.buffer(data, size))

    def write(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``; OSError."""
        self._transfer(lib.pv_image_write, ffi.from_buffer("uint8_t[]", data), offset, len(data))

    def flush(self) -> None:
        """Return when everything written is durable; OSError, also if an earlier flush failed."""
        check_result(lib.pv_image_flush(self.native), self.path)

    def _transfer(self, function: Any, memory: Any, offset: int, size: int) -> None:
        if not 0 <= offset <= self.size - size:
            raise ValueError(f"{self.path}: {size} bytes at {offset} of a disk of {self.size}")
        segment = ffi.new("struct iovec *", {"iov_base": memory, "iov_len": size})
        transfer = ffi.new(
            "struct pv_transfer *", {"segments": segment, "count": 1, "offset": offset, "left": size}
        )  # fmt: skip
        check_result(function(self.native, transfer, True), self.path)

    def release(self) -> None:
        """Make everything durable and let another process have the image; nothing may be under way. OSError."""
        if not self.read_only:
            self.flush()
            self.claimed = False
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def claim(self) -> None:
        """Be the one that writes: if opened ``later``, or after :meth:`release`. HostError if it is in use."""
        if not self.read_only:
            lock_disk(self.fd, self.path, shared=False)
            self.claimed = True

    def close(self) -> None:
        """Give everything back; harmless when done before. Not flushed: the host writes it in its own time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = self.native.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_result(result: int, path: str) -> int:
    """``result`` of a native call if it is not ``-errno``."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), path)
    return result


def open_image(path: str, *, read_only: bool, later: bool = False) -> Image:
    """Open and lock the file or block device at ``path``; ``later``: leave the lock to :meth:`Image.claim`.

    ConfigError (there is no such disk, or it makes none) or HostError (no permission, in use), in one line with the
    remedy.
    """
    fd = open_disk_file(path, read_only=read_only)
    try:
        size, is_device = disk_size(fd, path)
        if read_only or not later:
            lock_disk(fd, path, shared=read_only)
    except BaseException:
        os.close(fd)
        raise
    T.block_image_open.on and T.block_image_open(path, size, read_only)
    image = Image(path, fd, size, read_only=read_only, is_device=is_device)
    image.claimed = not later
    return image


def open_disk_file(path: str, *, read_only: bool) -> int:
    """A descriptor; a named pipe or the like is refused and not waited for."""
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not read_only and stat.S_ISBLK(os.fstat(fd).st_mode):
                _check_device(fd, path)
        except BaseException:
            os.close(fd)
            raise
        return fd
    except FileNotFoundError:
        raise ConfigError(f"disk {path}: no such file; make one with: truncate -s 1G {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"disk {path}: is a folder; name a raw image file or a block device") from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
            remedy = "use it readonly, or with overlay=FILE"
            raise HostError(f"disk {path}: cannot be written ({error.strerror}); {remedy}") from None
        if error.errno == errno.EBUSY:
            raise HostError(f"disk {path}: the host itself uses it (mounted, swap, or part of another device);"
                            " unmount it, or use it readonly") from None  # fmt: skip
        raise HostError(f"disk {path}: cannot be opened: {error.strerror}; check path and permissions") from None


def _ask(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def _check_device(fd: int, path: str) -> None:
    """OSError: EROFS for a block device that opens for writing and fails each write, EBUSY for one that is mounted."""
    if _ask(fd, _BLKROGET):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    # open(2): with O_EXCL and without O_CREAT a block device that the system uses is refused. Not kept open so, since
    # the target of a migration on the same host opens the disk, too.
    os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))


def disk_size(fd: int, path: str) -> tuple[int, bool]:
    """(bytes, whether it is a block device). ConfigError for what cannot be a disk."""
    mode = os.fstat(fd).st_mode
    is_device = stat.S_ISBLK(mode)
    if stat.S_ISDIR(mode):
        raise ConfigError(f"disk {path}: is a folder; name a raw image file or a block device")
    if not is_device and not stat.S_ISREG(mode):
        raise ConfigError(f"disk {path}: is neither a file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size < SECTOR:
        raise ConfigError(f"disk {path}: has {size} bytes, a disk has at least one sector of {SECTOR}")
    if size % SECTOR:
        whole = -(-size // SECTOR) * SECTOR
        raise ConfigError(f"disk {path}: {size} bytes are no whole sectors; extend it with: truncate -s {whole} {path}")
    return size, is_device


def disk_size_of(path: str) -> tuple[int, bool]:
    """(bytes, whether it is a block device) of the disk at ``path``. ConfigError, HostError."""
    fd = open_disk_file(path, read_only=True)
    try:
        return disk_size(fd, path)
    finally:
        os.close(fd)


def lock_disk(fd: int, path: str, *, shared: bool) -> None:
    """Take the lock that keeps a second writer away. HostError if somebody has it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        use = "written by another process" if shared else "in use by another process"
        raise HostError(f"disk {path}: is {use}; end that one, or give each its own overlay=FILE over it") from None
    except OSError as error:
        # Some network file systems have no locks; refusing their disks would help nobody.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise HostError(f"disk {path}: cannot be locked: {error.strerror}; copy it elsewhere") from None
