"""Guest memory and image files for the boot tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.memory.guest_memory import GuestMemory, Region

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """16 MiB of RAM from 0."""
    ram = GuestMemory([Region(0, 16 * MIB)])
    yield ram
    ram.close()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "image") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write
