"""ioctls on KVM file descriptors, and an owner for such a descriptor."""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Any, Self

from pyvmm.errors import KvmError
from pyvmm.native import ffi, lib

_HINTS = {
    errno.ENOMEM: "the host is out of memory",
    errno.EBUSY: "another hypervisor may hold the CPU's virtualization",
    errno.EPERM: "not permitted to this process",
}


class KvmFd:
    """Owns one KVM file descriptor; closing twice is harmless."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ioctl(self, name: str, argument: Any = None) -> int:
        """ioctl ``name`` with a cffi pointer or ``None``; KvmError names it when the kernel refuses."""
        result = int(lib.pv_ioctl(self.fd, getattr(lib, name), ffi.NULL if argument is None else argument))
        if result < 0:
            raise KvmError(name, -result, _HINTS.get(-result, ""))
        return result

    def ioctl_number(self, name: str, argument: int) -> int:
        """ioctl ``name`` with a number as its argument."""
        result = int(lib.pv_ioctl_number(self.fd, getattr(lib, name), argument))
        if result < 0:
            raise KvmError(name, -result, _HINTS.get(-result, ""))
        return result

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
