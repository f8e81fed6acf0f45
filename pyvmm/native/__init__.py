"""The native core: run loop, coalesced ring, guest-memory table, syscall entry. No policy here."""

from __future__ import annotations

import mmap

from pyvmm.native._native import ffi, lib

__all__ = ["address_of", "ffi", "lib"]


def address_of(mapping: mmap.mmap) -> int:
    """Host virtual address of a mapping. Valid while the mapping is open."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(mapping, require_writable=True)))
