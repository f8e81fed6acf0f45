"""For unit tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def prompt_switches() -> Iterator[None]:
    """Python lets a thread that waits for the interpreter have it after 10 us, not 5 ms.

    With 5 ms, threads that let go of it at every call into C and want it back at once stand in line for most of a
    minute, at times, and meet each other less often than they should in a test.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
