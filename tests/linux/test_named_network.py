"""``pyvmm linux --net demo``; what it is like inside is in test_web_server.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.framework.net_commands import net, networks
from tests.framework.processes import PYVMM
from tests.framework.topology import namespace, wait_until

pytestmark = [pytest.mark.linux, pytest.mark.net, pytest.mark.timeout(420)]


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
