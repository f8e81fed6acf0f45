"""Memory whose first touch waits: whoever reads a file into it hangs in the kernel, until it is let go.

Linux, Documentation/admin-guide/mm/userfaultfd.rst, <linux/userfaultfd.h>. Needs /dev/userfaultfd.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_NEW, _API, _REGISTER, _UNREGISTER = 0xAA00, 0xC018AA3F, 0xC020AA00, 0x8010AA01
_FEATURE_MISSING_SHMEM, _MODE_MISSING = 1 << 5, 1


@contextmanager
def stuck_memory(hva: int, size: int) -> Iterator[None]:
    """Pages at ``hva`` that were never touched: touching one waits until the end of the block."""
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        fd = fcntl.ioctl(device, _NEW, os.O_CLOEXEC)
    finally:
        os.close(device)
    try:
        fcntl.ioctl(fd, _API, struct.pack("<QQQ", 0xAA, _FEATURE_MISSING_SHMEM, 0))
        fcntl.ioctl(fd, _REGISTER, struct.pack("<QQQQ", hva, size, _MODE_MISSING, 0))
        yield
    finally:
        fcntl.ioctl(fd, _UNREGISTER, struct.pack("<QQ", hva, size))  # wakes who waits
        os.close(fd)
