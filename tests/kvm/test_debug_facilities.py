"""What the host's KVM does about breakpoints is measured, and what was measured holds in a guest."""

from __future__ import annotations

import time

from pyvmm.host.debug_facilities import debug_facilities
from pyvmm.host.profile import load_profile


def test_they_are_measured_once_and_fit_the_host() -> None:
    found = debug_facilities()
    start = time.monotonic()
    assert debug_facilities() is found and time.monotonic() - start < 0.01
    if "emulated-cpl0" in load_profile().quirks:
        assert (found.execute, found.data, found.int3) == (True, False, True)
