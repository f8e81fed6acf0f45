"""For all tests: what needs /dev/kvm says so when there is none, and no test leaves anything behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pyvmm.errors import PyvmmError
from tests.framework.topology import interfaces_here, namespaces_here
from tests.lab.selection import is_in_lab

KVM_FOLDERS = {"kvm", "guest", "linux", "qmp", "migration", "colo"}


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
def _interrupts() -> None:
    """A shell's background job ignores SIGINT, and so would all its children, whose answer to it is tested."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


def _leftovers() -> dict[str, set[str]]:
    return {
        "threads": {f"{t.name} {t.ident}" for t in threading.enumerate()},
        "children": {f"{p.pid}" for p in psutil.Process().children()},
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
