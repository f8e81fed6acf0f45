"""Parking: asked for at any moment, also before the thread has noticed that it may run."""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.machine.machine import Machine


def test_parking_again_before_the_thread_woke_up_is_not_lost(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(b"\xeb\xfe")
    thread = machine.threads[0]
    thread.start()
    for _ in range(300):
        thread.resume()
        thread.request_park()
        thread.wait_parked(time.monotonic() + 5)
        assert thread.parked
