"""Processes that a guest moves between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.framework.migrating import Side, sides


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Side]]:
    """(name, arguments...) -> a running ``pyvmm``."""
    with sides(tmp_path) as make:
        yield make
