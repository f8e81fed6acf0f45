"""The tests themselves on a host without a usable /dev/kvm: they fail with doctor's sentence, or skip if told so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.framework.kvm_device import with_kvm_device
from tests.framework.processes import PYVMM, REPOSITORY

SENTENCES = {
    "missing": "/dev/kvm does not exist: load kvm_intel or kvm_amd",
    "forbidden": "/dev/kvm: permission denied; add this user to the group kvm",
    "other-device": "/dev/kvm is not a KVM device",
}
ONE_TEST = "tests/kvm/test_run_loop.py::test_a_triple_fault_is_a_shutdown"
NO_KVM_NEEDED = "tests/unit/memory/test_zero.py"


def run(kind: str, folder: Path, allow: bool, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PY")}
    if allow:
        environment["PYVMM_ALLOW_NO_KVM"] = "1"
    return subprocess.run(
        with_kvm_device(kind, folder, *command),
        capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY, env=environment,
    )  # fmt: skip


def run_pytest(kind: str, folder: Path, allow: bool, *tests: str) -> subprocess.CompletedProcess[str]:
    return run(kind, folder, allow, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *tests)


@pytest.mark.parametrize("kind", SENTENCES)
def test_they_fail_with_the_remedy(tmp_path: Path, kind: str) -> None:
    done = run_pytest(kind, tmp_path, False, ONE_TEST)
    assert done.returncode == 1
    assert SENTENCES[kind] in done.stdout
    assert "PYVMM_ALLOW_NO_KVM=1 skips" in done.stdout


def test_they_skip_with_the_remedy_when_allowed(tmp_path: Path) -> None:
    done = run_pytest("missing", tmp_path, True, ONE_TEST, NO_KVM_NEEDED)
    assert done.returncode == 0, done.stdout
    assert re.search(r"SKIPPED \[1\].*" + re.escape(SENTENCES["missing"]), done.stdout)
    assert re.search(r"\d+ passed, 1 skipped", done.stdout), done.stdout


def test_they_run_where_it_is_usable_even_when_allowed() -> None:
    environment = os.environ | {"PYVMM_ALLOW_NO_KVM": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ONE_TEST],
        capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("kind", SENTENCES)
def test_doctor_says_the_same_sentence(tmp_path: Path, kind: str) -> None:
    done = run(kind, tmp_path, False, str(PYVMM), "doctor", "--json")
    assert done.returncode == 125
    assert done.stderr.startswith(f"pyvmm: {SENTENCES[kind]}") and done.stderr.count("\n") == 1
    assert '"usable": false' in done.stdout
