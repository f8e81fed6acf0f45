"""Bitmap or ring: what the profile says decides, and doctor says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.cli.migration_options import resolve_dirty_log
from pyvmm.host import profile as host_profile
from pyvmm.host.dirty_log import RING_FROM, choose_dirty_log, ring_problem
from pyvmm.host.findings import profile_findings
from pyvmm.host.kind import read_two_dimensional_paging
from tests.unit.host.conftest import plain_profile


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"capabilities": {"dirty_log_ring_acq_rel": 65536}}, None),
        ({"capabilities": {"dirty_log_ring": 0}}, "no dirty ring"),
        ({"two_dimensional_paging": False}, "shadows page tables"),
        ({"two_dimensional_paging": None}, "not known"),
    ],
)
def test_the_ring_is_chosen_only_where_it_is_reliable_and_useful(
    changes: dict[str, object], problem: str | None
) -> None:
    profile = plain_profile(**changes)
    found = ring_problem(profile)
    assert found is None if problem is None else found is not None and problem in found
    assert choose_dirty_log(profile, RING_FROM)[0] == ("bitmap" if problem else "ring")
    assert choose_dirty_log(profile, RING_FROM - 1)[0] == "bitmap"
    row = next(row for row in profile_findings(profile) if row.what == "dirty tracking")
    assert ("ring" in row.value) is (problem is None)
    assert row.action == found if problem else f"{RING_FROM >> 30} GiB" in row.action


def test_what_is_said_counts_and_small_guests_need_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> host_profile.HostProfile:
        raise AssertionError("the profile was looked at")

    monkeypatch.setattr(host_profile, "load_profile", load)
    assert resolve_dirty_log("ring", 1 << 20) == "ring"
    assert resolve_dirty_log("bitmap", 1 << 40) == "bitmap"
    assert resolve_dirty_log("auto", RING_FROM - 1) == "bitmap"
    monkeypatch.setattr(host_profile, "load_profile", plain_profile)
    assert resolve_dirty_log("auto", RING_FROM) == "ring"


@pytest.mark.parametrize(
    ("kind", "text", "paging"),
    [
        ("vmx", "Y\n", True), ("vmx", "N\n", False), ("svm", "1\n", True), ("svm", "0\n", False), ("svm", "?", None),
        ("svm", None, None), ("pvm", None, False), ("unknown", None, None),
    ],
)  # fmt: skip
def test_the_way_of_paging_is_what_the_module_says(
    tmp_path: Path, kind: str, text: str | None, paging: bool | None
) -> None:
    if text is not None:
        parameter = tmp_path / ("kvm_intel/parameters/ept" if kind == "vmx" else "kvm_amd/parameters/npt")
        parameter.parent.mkdir(parents=True)
        parameter.write_text(text)
    assert read_two_dimensional_paging(kind, str(tmp_path)) is paging
