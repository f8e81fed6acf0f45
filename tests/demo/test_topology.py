"""The demo's network: what is connected, what can be cut, and that nothing of it outlives the demo."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.demo.machines import FOLDER_PREFIX, run_folder
from pyvmm.demo.topology import BRIDGE, CLIENT, Topology
from pyvmm.net.links import Link, open_route, read_links
from pyvmm.net.namespace import Namespace
from tests.framework.processes import PYVMM
from tests.framework.topology import wait_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
PORT = 4445


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of demos in here, not those of others on this machine."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def udp(space: Namespace, address: str) -> socket.socket:
    made = space.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    made.settimeout(0.3)
    made.bind((address, PORT))
    return made


def heard(one: socket.socket, other: socket.socket) -> bool:
    """Whether a datagram goes over."""
    one.sendto(b"hello", other.getsockname())
    try:
        return other.recv(100) == b"hello"
    except TimeoutError:
        return False


def ports(space: Namespace, bridge: str) -> set[str]:
    def inside() -> set[str]:
        with open_route() as route:
            links = read_links(route)
        index = next(link.index for link in links if link.name == bridge)
        return {link.name for link in links if link.master == index and link.up}

    return space.call(inside)


def test_the_replication_link_is_cut_alone_and_mended() -> None:
    with Topology() as net, contextlib.ExitStack() as stack:
        ends = [stack.enter_context(udp(host.space, host.address)) for host in net.hosts]
        assert heard(ends[0], ends[1])
        assert heard(ends[1], ends[0])
        net.cut_link()
        assert not heard(ends[0], ends[1])
        assert not heard(ends[1], ends[0])
        assert ports(net.switch, "lan") == {"client", "primary", "secondary"}
        net.mend_link()
        assert heard(ends[0], ends[1])
        assert heard(ends[1], ends[0])


def test_a_host_on_the_bridge_hears_the_client_and_hosts_are_on_no_other_network() -> None:
    with Topology() as net:
        for host in net.hosts:
            assert ports(host.space, BRIDGE) == {"uplink"}
        net.primary.space.set_up(BRIDGE, "192.0.2.2/24")  # where a guest will be
        with udp(net.client, CLIENT) as client, udp(net.primary.space, "192.0.2.2") as guest:
            assert heard(client, guest)
            assert heard(guest, client)
            with pytest.raises(OSError, match="unreachable"):
                client.sendto(b"x", (net.primary.address, PORT))
        assert [net.other(host) for host in net.hosts] == [net.secondary, net.primary]


def test_two_at_once_are_strangers() -> None:
    with Topology() as one, Topology() as other:
        with udp(one.client, CLIENT) as here, udp(other.client, CLIENT) as there:
            assert not heard(here, there)
        names = {link.name for link in other.switch.call(_links)}
        assert names == {"lo", "client", "primary", "secondary", "lan", "repl", "repl-primary", "repl-secondary"}


def _links() -> list[Link]:
    with open_route() as route:
        return read_links(route)


class Demo:
    """``pyvmm colo demo`` that has come as far as its clients."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [PYVMM, "colo", "demo", "--vm", "bare", "--seconds", "60"], stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdout is not None
        lines = b""
        while b"clients work" not in lines:
            line = self.process.stdout.readline()
            assert line, lines
            lines += line
        self.spaces = namespaces_of(self.process.pid)
        self.machines = machines_of(self.process.pid)

    def gone(self) -> None:
        """Everything is."""
        wait_until(lambda: not any(machines_of(self.process.pid)), "the end of its machines", 15)
        wait_until(lambda: not self.spaces & all_namespaces(), "the end of its namespaces", 15)


@pytest.fixture
def demo() -> Iterator[Demo]:
    made = Demo()
    yield made
    made.process.kill()
    made.process.wait(10)
    assert made.process.stdout is not None
    made.process.stdout.close()


def namespaces_of(pid: int) -> set[str]:
    """Network namespaces that a process holds."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(entry.path)
            if target.startswith("net:["):
                found.add(target)
    return found


def all_namespaces() -> set[str]:
    """Those that any process is in, or holds."""
    found = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
            found |= namespaces_of(pid)
    return found


def machines_of(pid: int) -> list[int]:
    """Processes of VMs that the demo ``pid`` has named."""
    found = []
    for name in (name for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if any(word in words for word in (b"alice-%d" % pid, b"bob-%d" % pid, b"carol-%d" % pid)):
                found.append(int(name))
    return found


@pytest.mark.kvm
def test_nothing_outlives_a_demo_that_is_killed_and_the_next_one_clears_up(demo: Demo, tmp_path: Path) -> None:
    assert (len(demo.spaces), len(demo.machines)) == (4, 2)
    demo.process.send_signal(signal.SIGKILL)
    demo.process.wait(10)
    demo.gone()
    (left,) = tmp_path.glob(f"{FOLDER_PREFIX}*")
    time.sleep(max(0.0, left.stat().st_mtime + 1.1 - time.time()))
    with run_folder() as folder:
        assert list(tmp_path.glob(f"{FOLDER_PREFIX}*")) == [folder]
        with run_folder() as another:  # a demo that lives keeps its own
            assert folder.exists()
            assert another != folder
    assert list(tmp_path.glob(f"{FOLDER_PREFIX}*")) == []


@pytest.mark.kvm
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_ended_clears_up(demo: Demo, tmp_path: Path, number: signal.Signals, status: int) -> None:
    demo.process.send_signal(number)
    assert demo.process.wait(30) == status
    demo.gone()
    assert list(tmp_path.glob(f"{FOLDER_PREFIX}*")) == []
