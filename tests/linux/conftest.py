"""The tiny Linux must be built (``make setup``): a missing kernel fails, it is not skipped."""

from __future__ import annotations

import pytest

from pyvmm.machine.tiny_linux import find_initramfs, find_kernel

BOOT_DEADLINE = 150.0
"""Seconds a boot may take on an emulated host that is busy with other things; 10 to 20 is usual there."""


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    find_kernel(None)
    find_initramfs(None)
