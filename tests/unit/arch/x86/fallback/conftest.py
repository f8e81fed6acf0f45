from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.arch.x86.native_oracle import NativeOracle
from tests.unit.arch.x86.fallback.native import Host


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """One traced child for all tests of a worker."""
    with NativeOracle() as oracle:
        yield Host(oracle)
