"""A vCPU that is run in this thread, and is to come back in time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pyvmm.kvm.vcpu import Vcpu
from pyvmm.native import lib


@contextlib.contextmanager
def kicked_after(vcpu: Vcpu, seconds: float) -> Iterator[threading.Event]:
    """Kick ``vcpu`` when ``seconds`` are over. The event is set then: any signal ends KVM_RUN, not only this one."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        vcpu.kick()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()
        lib.pv_vcpu_cancel_kick(vcpu.native)
