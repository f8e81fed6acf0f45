"""A profile as a plain host would give it, and a cache directory that is the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.host import cache
from pyvmm.host.profile import HostProfile, Speed


def plain_profile(**changes: object) -> HostProfile:
    """Everything works and nothing is emulated; ``changes`` replace fields."""
    speeds = {
        mode: Speed(instructions_per_second=3_000_000_000, emulated=False)
        for mode in ("real16", "prot32", "long64", "user32", "user64")
    }
    fields: dict[str, object] = {
        "kind": "svm",
        "nested": False,
        "evidence": ("/sys/module/kvm_amd is there",),
        "kernel": "6.12.0",
        "cpu": "A CPU",
        "guests_run": True,
        "speeds": speeds,
        "pio_exit_us": 1.5,
        "pio_exit_python_us": 2.5,
        "string_iteration_ns": 0.05,
        "instructions": {"popcnt": "works", "int3": "works"},
        "syscall_reaches_cpl0": True,
        "syscall_observed": "reaches-cpl0",
        "sysret_works": True,
        "int_observed": {"user32": "reaches-gate", "user64": "reaches-gate"},
        "features_show_through": {"cpl0": (), "cpl3": ()},
        "two_dimensional_paging": True,
        "guest_tsc_settable": True,
        "private_memfd_works": True,
        "capabilities": {"irqfd": 1, "dirty_log_ring": 65536},
        "quirks": (),
    }
    return HostProfile(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place the cache looks at; it does not exist yet."""
    directory = tmp_path / "runtime" / "pyvmm"
    monkeypatch.setattr(cache, "directories", lambda: iter([str(directory)]))
    return directory
