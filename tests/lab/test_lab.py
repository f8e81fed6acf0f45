"""What passes on this host must pass on an AMD SVM host: the tests that touch KVM, once more, on an emulated one.

As many labs as there are CPUs run once, each with its part of the files; then each test of the other folders has a test
here, which fails with the text of its failure there. Console, output, JUnit and JSON are left in build/lab/host/0/ and
so on.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from pyvmm.errors import HostError
from tests.lab.nested_host import LabRun, run_in_labs
from tests.lab.outcomes import Outcome, read_outcomes
from tests.lab.root_images import REPOSITORY
from tests.lab.selection import is_in_lab, long_form, test_functions

SECONDS = 3600.0 if long_form() else 440.0
"""For everything in the lab. With making its images and starting it, the short form stays within 8 minutes."""

pytestmark = [pytest.mark.lab_host, pytest.mark.timeout(SECONDS + 120)]

REPEATED = [pair for pair in test_functions() if is_in_lab(*pair)]


LABS = min(2, len(os.sched_getaffinity(0)))
"""Each takes some 2 GiB of this machine's memory."""


@pytest.fixture(scope="module")
def labs() -> list[LabRun]:
    work = REPOSITORY / "build" / "lab" / "host"
    commands = [f"python -m tests.lab.inside {SECONDS - 50} /lab/results {number} {LABS}" for number in range(LABS)]
    try:
        return run_in_labs(commands, work, SECONDS)
    except HostError as error:
        if os.environ.get("PYVMM_ALLOW_NO_LAB") == "1":
            pytest.skip(str(error))
        pytest.fail(f"{error} (PYVMM_ALLOW_NO_LAB=1 skips the lab)", pytrace=False)


@pytest.fixture(scope="module")
def outcomes(labs: list[LabRun]) -> dict[tuple[str, str], list[Outcome]]:
    return read_outcomes(lab.folder / "results" / "junit.xml" for lab in labs)


@pytest.fixture(scope="module")
def doctor(labs: list[LabRun]) -> dict[str, Any]:
    found = labs[0].folder / "results" / "doctor.json"
    assert found.exists(), labs[0].why_it_failed()
    said: dict[str, Any] = json.loads(found.read_text())
    return said


@pytest.mark.parametrize("number", range(LABS))
def test_the_lab_comes_to_its_end(number: int, labs: list[LabRun]) -> None:
    lab = labs[number]
    assert lab.status is not None, lab.why_it_failed()
    assert lab.status in (0, 1), lab.output()[-3000:]  # 1: pytest ran them all, some failed: see their own tests


@pytest.mark.parametrize("number", range(LABS))
def test_the_lab_s_kernel_has_nothing_to_complain_about(number: int, labs: list[LabRun]) -> None:
    """A warning of KVM's own is a guest state or an ioctl that no VMM should produce."""
    lines = (labs[number].folder / "results" / "dmesg").read_text(errors="replace").splitlines()
    assert not [line for line in lines if "WARNING: " in line or "BUG: " in line or "Call Trace" in line]


@pytest.mark.parametrize(("file", "test"), REPEATED, ids=[f"{file}::{test}" for file, test in REPEATED])
def test_passes_on_kvm_amd(file: str, test: str, outcomes: dict[tuple[str, str], list[Outcome]]) -> None:
    cases = outcomes.get((file, test), [])
    if not cases:
        pytest.fail(f"did not run in the lab within {SECONDS:.0f} s; see build/lab/host/*/output.log", pytrace=False)
    failed = [f"{one.case} after {one.seconds:.1f} s:\n{one.text}" for one in cases if one.kind == "failed"]
    if failed:
        pytest.fail("in the lab: " + "\n\n".join(failed), pytrace=False)
    if all(one.kind == "skipped" for one in cases):
        pytest.skip(f"in the lab: {cases[0].text}")


class TestDoctor:
    """What ``pyvmm doctor`` must find on such a host: hardware KVM, nothing to work around."""

    def test_it_knows_the_host(self, doctor: dict[str, Any]) -> None:
        profile = doctor["profile"]
        assert doctor["usable"] and profile["guests_run"]
        assert profile["kind"] == "svm"
        assert profile["nested"]

    def test_no_quirk_is_on(self, doctor: dict[str, Any]) -> None:
        assert doctor["profile"]["quirks"] == []

    @pytest.mark.parametrize("mode", ["real16", "prot32", "long64", "user32", "user64"])
    def test_no_mode_is_emulated(self, doctor: dict[str, Any], mode: str) -> None:
        assert not doctor["profile"]["speeds"][mode]["emulated"]

    def test_entries_to_cpl_0_work(self, doctor: dict[str, Any]) -> None:
        profile = doctor["profile"]
        assert profile["syscall_reaches_cpl0"] and profile["sysret_works"]
        assert set(profile["int_observed"].values()) == {"reaches-gate"}

    def test_the_cpu_carries_out_every_instruction_it_has(self, doctor: dict[str, Any]) -> None:
        """An emulated CPU lacks some; none may end in KVM's emulator, which is what the fallback is for."""
        assert set(doctor["profile"]["instructions"].values()) <= {"works", "invalid-opcode"}

    def test_state_can_be_set(self, doctor: dict[str, Any]) -> None:
        assert doctor["profile"]["guest_tsc_settable"] and doctor["profile"]["private_memfd_works"]
        assert not any(doctor["profile"]["features_show_through"].values())

    @pytest.mark.parametrize("name", ["irqfd", "ioeventfd", "coalesced_pio", "dirty_log_ring", "immediate_exit"])
    def test_what_devices_and_migration_use_is_there(self, doctor: dict[str, Any], name: str) -> None:
        assert doctor["profile"]["capabilities"][name] > 0
