"""Each right is tried for real, its refusal has a reason, and trying leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from pyvmm.host import surroundings
from pyvmm.host.surroundings import look_around, try_kvm, try_memfd, try_network_namespace, try_tap


def test_missing_devices_name_the_remedy(tmp_path: Path) -> None:
    assert try_kvm(str(tmp_path / "kvm")).startswith("no: No such file")
    assert "load kvm_intel or kvm_amd" in try_kvm(str(tmp_path / "kvm"))
    assert "modprobe tun" in try_tap(str(tmp_path / "tun"))


def test_permission_denied_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "group kvm" in try_kvm()


def test_what_is_no_tun_device_is_refused() -> None:
    assert try_tap("/dev/null").startswith("no: ")


def test_a_tap_without_the_right_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert "CAP_NET_ADMIN" in try_tap("/dev/null")


def test_trying_changes_nothing() -> None:
    """The tap goes with its descriptor (the fixture for leftovers looks for it), the namespace with its child."""
    namespace = os.readlink("/proc/self/ns/net")
    descriptors = sorted(os.listdir("/proc/self/fd"))
    around = look_around()
    assert os.readlink("/proc/self/ns/net") == namespace
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    for text in (around.kvm, around.tap, around.memfd):
        assert text == "yes" or text.startswith("no: ")
    assert around.network_namespace in ("yes", "in a user namespace") or around.network_namespace.startswith("no: ")
    assert 0 < around.memory_available <= around.memory_total
    assert around.cpus >= 1
    assert around.disk_free >= 0
    assert os.path.isdir(around.disk_path)


def test_memfd_is_there() -> None:
    """Python itself needs Linux 3.17 for it, and so does pyvmm: no host that runs these tests lacks it."""
    assert try_memfd() == "yes"


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "pass"])
def test_a_child_that_answers_nothing_is_a_no(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(surroundings, "_UNSHARE", code)
    assert try_network_namespace().startswith("no: the child ended")


def test_a_child_that_hangs_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_UNSHARE", "import time; time.sleep(60)")
    monkeypatch.setattr(surroundings, "_TIMEOUT", 0.2)
    assert try_network_namespace().startswith("no: ")


def test_the_childs_answer_is_true() -> None:
    """Against unshare(1), which is part of every Debian."""
    done = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, timeout=30)
    assert (try_network_namespace() == "yes") == (done.returncode == 0)
