"""The entry without its bit 1."""

from typing import Any


def protect(vm: Any, page: int) -> None:
    at = 0x7000 + 8 * (page >> 12)
    vm.memory.write_uint(at, 8, vm.memory.read_uint(at, 8) & ~2)
    sregs = vm.sregs
    sregs.cr0 |= 1 << 16
    vm.sregs = sregs


def _absent(vm: Any, page: int) -> None:
    at = 0x7000 + 8 * (page >> 12)
    vm.memory.write_uint(at, 8, vm.memory.read_uint(at, 8) & ~1)


def _all(vm: Any, page: int) -> None:
    for at in range(0x7000 + 8 * 9, 0x8000, 8):
        vm.memory.write_uint(at, 8, vm.memory.read_uint(at, 8) & ~2)


WRONG = {"not there at all": _absent, "every page": _all}
