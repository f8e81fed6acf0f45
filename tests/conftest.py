"""For all tests: what needs /dev/kvm says so when there is none, and no test leaves anything behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from pyvmm.errors import PyvmmError
from tests.framework.topology import interfaces_here, namespaces_here
from tests.lab.selection import is_in_lab

settings.register_profile("pyvmm", deadline=None)  # a busy machine is no reason to fail; pytest's timeout is one
settings.load_profile("pyvmm")
KVM_FOLDERS = {"kvm", "guest", "linux", "qmp", "migration", "colo", "gdb"}


def _kvm_problem() -> str | None:
    """Doctor's sentence, or None if guests can run here."""
    from pyvmm.kvm.system import System

    try:
        with System() as system, system.create_vm():
            return None
    except PyvmmError as error:
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = Path(item.path).relative_to(Path(__file__).parent)
        folder = file.parts[0]
        if folder in KVM_FOLDERS:
            item.add_marker("kvm")
        if folder == "net":
            item.add_marker("net")
        if is_in_lab(str(file), item.nodeid.partition("::")[2].partition("[")[0]):
            item.add_marker("lab")


@pytest.fixture(scope="session", autouse=True)
def _runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Machines that tests run are not among the user's own."""
    folder = tmp_path_factory.mktemp("xdg", numbered=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """A shell's background job ignores SIGINT, what nohup starts SIGHUP, and so would all its children, whose answers
    to them are tested. With a handler here children begin with what the system does by default.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda _number, _frame: None)


@pytest.fixture(scope="session")
def kvm_problem() -> str | None:
    return _kvm_problem()


@pytest.fixture(autouse=True)
def _usable_kvm(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("kvm") is None:
        return
    problem = request.getfixturevalue("kvm_problem")
    if problem is not None:
        if os.environ.get("PYVMM_ALLOW_NO_KVM") == "1":
            pytest.skip(problem)
        pytest.fail(f"{problem} (PYVMM_ALLOW_NO_KVM=1 skips the tests that need it)")


def _open_kvm() -> set[str]:
    """Descriptors on /dev/kvm, VMs, vCPUs and guest memory that this process holds."""
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue
        if "kvm" in target or "memfd:pyvmm" in target:
            found.add(f"{entry.name} -> {target}")
    return found


def _children() -> set[str]:
    """Process IDs, also of those that have ended and were not waited for."""
    try:  # psutil reads of every process whose child it is: half of the time of a small test
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return {f"{child.pid}" for child in psutil.Process().children()}


def _leftovers() -> dict[str, set[str]]:
    return {
        "threads": {f"{t.name} {t.ident}" for t in threading.enumerate()},
        "children": _children(),
        "descriptors": _open_kvm(),
        "network devices": interfaces_here(),
        "network namespaces": namespaces_here(),
    }


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = _leftovers()
    yield
    after = _leftovers()
    for kind, things in after.items():
        assert not things - before[kind], f"{kind} left behind"
