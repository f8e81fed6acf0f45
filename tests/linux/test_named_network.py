"""``pyvmm linux --net demo``: the guest has its address when user space begins, and both sides reach each other."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.framework.net_commands import net, networks
from tests.framework.ping import ping
from tests.framework.processes import PYVMM
from tests.framework.topology import namespace, wait_until
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(420)]


def test_guest_and_host_reach_each_other() -> None:
    with namespace("host") as host:
        net(host, "up", "demo")
        with host.call(lambda: socket.create_server(("10.91.0.1", 7))) as server:
            server.settimeout(1.5 * BOOT_DEADLINE)  # with the ping before it
            child = host.start(
                PYVMM, "linux", "--net", "demo", "--name", "box",
                "--exec", "ping -c 2 10.91.0.1", "--exec", "hostname; ifconfig eth0", "--exec", "nc 10.91.0.1 7",
            )  # fmt: skip
            try:
                guest, (address, _) = server.accept()
            except TimeoutError:
                child.kill()
                pytest.fail(f"the guest did not connect: {child.communicate(timeout=10)}")
            with guest:
                assert address == "10.91.0.2"
                vms = networks(host)["demo"]["vms"]
                assert [(vm["vm"], vm["tap"], vm["state"]) for vm in vms] == [("box", "vm-box", "connected")]
                assert host.call(lambda: ping("10.91.0.2", 60)) is not None
                guest.sendall(b"over tcp\n")
        out, err = child.communicate(timeout=BOOT_DEADLINE)
        assert child.returncode == 0, err
        text = out.decode()
        assert "2 packets transmitted, 2 packets received" in text
        assert "box\n" in text
        assert vms[0]["mac"].upper() in text
        assert "inet addr:10.91.0.2" in text
        assert text.endswith("over tcp\n")
        assert networks(host)["demo"]["vms"] == []
        net(host, "down", "demo")
        assert host.interfaces() == {"lo"}


def test_a_killed_vm_leaves_its_place(tmp_path: Path) -> None:
    with namespace("host") as host:
        net(host, "up", "demo")
        with open(tmp_path / "err", "wb") as err:
            child = host.start(PYVMM, "linux", "--net", "demo", stdout=subprocess.DEVNULL, stderr=err)
        wait_until(lambda: bool(networks(host)["demo"]["vms"]), "the VM has its place")
        child.kill()
        wait_until(lambda: host.interfaces() == {"lo", "pvm-demo"}, "its tap is gone")
        assert networks(host)["demo"]["vms"] == []
        assert net(host, "down", "demo") == "network demo is down\n"
