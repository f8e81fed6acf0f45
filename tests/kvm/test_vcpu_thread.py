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


def test_a_vcpu_that_kvm_refuses_to_run_ends_the_guest_in_order(machine_of: Callable[..., Machine]) -> None:
    """Not with a thread that fails for ever and a deadline that passes."""
    machine = machine_of(b"\xeb\xfe")
    native = machine.vcpus[0].native
    fd = native.fd
    native.fd = -1  # every KVM_RUN fails with EBADF
    try:
        ending = machine.run()
        assert (ending.kind, ending.status) == ("vcpu-error", 126)
        assert "Bad file descriptor" in ending.reason
    finally:
        native.fd = fd
