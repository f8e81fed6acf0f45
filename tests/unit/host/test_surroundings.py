"""Each right is tried for real, its refusal has a reason, and trying leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.host import surroundings
from pyvmm.host.surroundings import look_around, try_kvm, try_memfd, try_network, try_tap


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
    for text in (around.kvm, around.tap, around.memfd, around.bridge, around.nftables):
        assert text == "yes" or text.startswith("no: ")
    assert around.network_namespace in ("yes", "in a user namespace") or around.network_namespace.startswith("no: ")
    assert 0 < around.memory_available <= around.memory_total
    assert around.cpus >= 1
    assert around.disk_free >= 0
    assert os.path.isdir(around.disk_path)


def test_memfd_is_there() -> None:
    """Python itself needs Linux 3.17 for it, and so does pyvmm: no host that runs these tests lacks it."""
    assert try_memfd() == "yes"


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "pass", "print(1), print(2), exit(1)", "print('x\\n' * 4)"])
def test_a_child_that_answers_nothing_is_a_no(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(surroundings, "_UNSHARE", code)
    answers = try_network()
    assert answers[0].startswith("no: the child ended")
    assert all(answer.startswith("no: ") for answer in answers)


def test_a_child_that_hangs_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_UNSHARE", "import time; time.sleep(60)")
    monkeypatch.setattr(surroundings, "_TIMEOUT", 0.2)
    assert all(answer.startswith("no: ") for answer in try_network())


def test_a_refused_namespace_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_UNSHARE", "print('no: Operation not permitted')")
    namespace, bridge, nftables = try_network()
    assert namespace == "no: Operation not permitted"
    assert bridge == nftables == "no: without a network namespace of its own this is not tried"


def test_the_childs_answer_is_true() -> None:
    """Against unshare(1), which is part of every Debian."""
    done = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, timeout=30)
    namespace, bridge, _ = try_network()
    assert (namespace == "yes") == (done.returncode == 0)
    if namespace == "yes":
        script = "from pyroute2 import IPRoute; IPRoute().link('add', ifname='br0', kind='bridge')"
        made = ["unshare", "--net", sys.executable, "-c", script]
        done = subprocess.run(made, check=False, capture_output=True, timeout=30)
        assert (bridge == "yes") == (done.returncode == 0), done.stderr
