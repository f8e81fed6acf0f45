"""The native core: run loop, coalesced ring, guest-memory table, syscall entry. No policy here."""

from __future__ import annotations

import mmap
import os

from pyvmm.native._native import ffi, lib

__all__ = ["address_of", "fallocate_punch_hole", "ffi", "lib"]


def address_of(mapping: mmap.mmap) -> int:
    """Host virtual address of a mapping. Valid while the mapping is open."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(mapping, require_writable=True)))


def fallocate_punch_hole(fd: int, size: int) -> None:
    """Free the first ``size`` bytes of a file, keeping its length (Python's os has only posix_fallocate)."""
    if lib.pv_punch_hole(fd, size):
        raise OSError(ffi.errno, os.strerror(ffi.errno))
