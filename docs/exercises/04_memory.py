"""A page that the guest may read and not write. Chapter 4."""

import pyvmm


def protect(vm: pyvmm.Machine, page: int) -> None:
    """``vm`` is in 64-bit mode and maps its first 2 MiB one to one, in pages of 4 KiB, with a table at 0x7000: change
    the entry of ``page`` (vm.memory.read_uint(at, 8), vm.memory.write_uint(at, 8, entry)).
    """
