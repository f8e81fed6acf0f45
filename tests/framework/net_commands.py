"""``pyvmm net`` as a user runs it, and VMs' leases without the VMs, in a namespace of a test's own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from pyvmm.net.networks import list_networks
from tests.framework.processes import PYVMM, REPOSITORY
from tests.framework.topology import Namespace, namespace

_HOLDER = """
import sys, time
from pyvmm.errors import PyvmmError
from pyvmm.net.leases import join
network, vm, mac = sys.argv[1:4]
try:
    with join(network, vm, mac=mac or None) as lease:
        print(lease.tap.name, lease.address, lease.mac, flush=True)
        sys.stdin.read()
except PyvmmError as error:
    print("refused:", error, flush=True)
"""


def net(space: Namespace, *arguments: str) -> str:
    """``pyvmm net ...`` that must succeed; what it prints."""
    done = space.run(PYVMM, "net", *arguments)
    assert (done.returncode, done.stderr) == (0, b""), (arguments, done.stderr.decode())
    return done.stdout.decode()


def net_refused(space: Namespace, *arguments: str) -> str:
    """``pyvmm net ...`` that must refuse: status 125 and one line, which is returned."""
    done = space.run(PYVMM, "net", *arguments)
    text = done.stderr.decode()
    assert (done.returncode, done.stdout, text.count("\n")) == (125, b"", 1), (arguments, done)
    return text


def networks_by_command(space: Namespace) -> dict[str, Any]:
    """What ``pyvmm net list --json`` says, by name."""
    report = json.loads(net(space, "list", "--json"))
    assert report["version"] == 1
    return {network["name"]: network for network in report["networks"]}


def networks(space: Namespace) -> dict[str, Any]:
    """The same from this process: half a second faster."""
    listed = msgspec.json.decode(msgspec.json.encode(space.call(list_networks)))
    return {network["name"]: network for network in listed}


def standing(space: Namespace) -> dict[str, tuple[str, str, str]]:
    """VM of the network "demo" -> (state, address, MAC address)."""
    return {vm["vm"]: (vm["state"], vm["address"], vm["mac"]) for vm in networks(space)["demo"]["vms"]}


@contextlib.contextmanager
def demo_host() -> Iterator[Namespace]:
    """A namespace in which the network "demo" is up."""
    with namespace("host") as space:
        net(space, "up", "demo")
        yield space


class LeaseHolder:
    """A process that holds a lease like a VM does, until it is ended or killed."""

    def __init__(self, space: Namespace, network: str, vm: str, mac: str = "") -> None:
        self.process = space.start(
            sys.executable, "-c", _HOLDER, network, vm, mac, stdin=subprocess.PIPE, cwd=REPOSITORY
        )

    def answer(self) -> list[str]:
        """[tap, address, MAC address], or ``["refused:", ...]``."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().split()

    def kill(self) -> None:
        """By SIGKILL."""
        self.process.kill()
        self.process.wait(10)
