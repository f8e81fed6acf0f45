"""Network namespaces of a test's own, with veth pairs and bridges between them.

::

    with Topology() as topology:
        host, client = topology.namespace("host"), topology.namespace("client")
        topology.veth((host, "up0", "192.0.2.1/24"), (client, "up0", "192.0.2.2/24"))
        host.run(PYVMM, "net", "up", "demo")            # a command inside
        tap = host.call(lambda: Tap.open("tap0"))       # a function inside, in this process

A namespace goes with the test process, whatever that dies of: see pyvmm/net/namespace.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyvmm.net.namespace import Namespace as Held
from pyvmm.net.namespace import add_cable

DEADLINE = 30.0
End = tuple["Namespace", str, str | None]
"""Namespace, device name, address with prefix length or None."""

def namespaces_here() -> set[str]:
    """What this process holds of namespaces, and what is mounted in /run/netns: for the check that nothing stays."""
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(entry.path)
            if target.startswith("net:["):
                found.add(f"{entry.name} -> {target}")
    with contextlib.suppress(FileNotFoundError):
        found |= {f"/run/netns/{name}" for name in os.listdir("/run/netns")}
    return found


def interfaces_here() -> set[str]:
    """Names of this thread's network devices. Not from /sys, which shows the namespace that mounted it."""
    lines = Path("/proc/thread-self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return {line.split(":")[0].strip() for line in lines}


class Namespace(Held):
    """One with programs that run inside. IPv6 is off, whose router solicitations tests do not want to count."""

    def __init__(self, name: str) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        super().__init__(name)

    def run(
        self, *argv: str | os.PathLike[str], timeout: float = DEADLINE, stdin: bytes = b"", **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program inside to its end. The status is the caller's to look at."""
        return subprocess.run(
            self.command(*argv), input=stdin, capture_output=True, timeout=timeout, check=False, **options
        )

    def start(self, *argv: str | os.PathLike[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program inside. The topology ends it."""
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen(self.command(*argv), start_new_session=True, **(streams | options))
        self._started.append(child)
        return child

    def interfaces(self) -> set[str]:
        """Names of the devices inside."""
        return self.call(interfaces_here)

    def iproute(self) -> Any:
        """A pyroute2 IPRoute inside; close it (``with``)."""
        from pyroute2 import IPRoute

        return self.call(IPRoute)

    def default_route(self, gateway: str) -> None:
        """Send everything else to ``gateway``."""

        def inside() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                route.route("add", dst="default", gateway=gateway)

        self.call(inside)

    def close(self) -> None:
        """End what was started inside and let go of the namespace; the kernel takes its devices down."""
        for child in self._started:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.wait(DEADLINE)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._started.clear()
        super().close()


class Topology:
    """Namespaces and what connects them, for a ``with``."""

    def __init__(self) -> None:
        self.namespaces: list[Namespace] = []

    def namespace(self, name: str) -> Namespace:
        """A new one; ``name`` is followed by this process's ID."""
        made = Namespace(name)
        self.namespaces.append(made)
        return made

    def veth(self, one: End, other: End) -> None:
        """A cable between two namespaces, both ends up. Taking down either namespace takes it away."""
        add_cable(one[:2], other[:2])
        for space, device, address in (one, other):
            space.set_up(device, address)

    def bridge(self, space: Namespace, name: str, ports: tuple[str, ...] = (), address: str | None = None) -> None:
        """A bridge inside ``space`` with ``ports``, up."""

        def inside() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                route.link("add", ifname=name, kind="bridge")
                master = route.link_lookup(ifname=name)[0]
                for port in ports:
                    route.link("set", index=route.link_lookup(ifname=port)[0], master=master, state="up")

        space.call(inside)
        space.set_up(name, address)

    def __enter__(self) -> Topology:
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.ExitStack() as stack:  # each, also when one of them fails
            for space in self.namespaces:
                stack.callback(space.close)
        self.namespaces.clear()


@contextlib.contextmanager
def namespace(name: str) -> Iterator[Namespace]:
    """One namespace, alone."""
    with Topology() as topology:
        yield topology.namespace(name)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Poll ``condition``; AssertionError names ``what`` when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)
