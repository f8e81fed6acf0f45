"""Network namespaces of a test's own, with veth pairs and bridges between them.

::

    with Topology() as topology:
        host, client = topology.namespace("host"), topology.namespace("client")
        topology.veth((host, "up0", "192.0.2.1/24"), (client, "up0", "192.0.2.2/24"))
        host.run(PYVMM, "net", "up", "demo")            # a command inside
        tap = host.call(lambda: Tap.open("tap0"))       # a function inside, in this process

A namespace is held by a descriptor of this process, not by a mount in /run/netns: so the kernel takes it down, with
every device in it, when the test process dies, whatever it dies of. It still has a name, for error messages, and to
look into one: ``nsenter --net=/proc/PID/fd/N``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
DEADLINE = 30.0
End = tuple["Namespace", str, str | None]
"""Namespace, device name, address with prefix length or None."""

_libc = ctypes.CDLL(None, use_errno=True)


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


class Namespace:
    """One network namespace with ``lo`` up and IPv6 off (whose router solicitations tests do not want to count)."""

    def __init__(self, name: str) -> None:
        self.name = f"{name}-{os.getpid()}"
        self._started: list[subprocess.Popen[bytes]] = []
        self.fd = _in_thread(self.name, _make)
        try:
            self.call(_quiet)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def path(self) -> str:
        """For setns() by another process, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def call(self, function: Callable[[], T]) -> T:
        """Call ``function`` inside, on a thread that ends with it; its value, or its exception.

        A namespace belongs to a thread. What the function opens (sockets, taps) stays inside for good and can be
        handed out; what it starts (threads, processes) stays inside, too. No other thread of this process moves.
        """

        def inside() -> T:
            if _libc.setns(self.fd, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.name}")
            return function()

        return _in_thread(self.name, inside)

    def command(self, *argv: str | os.PathLike[str]) -> list[str]:
        """``argv`` so that it runs inside: for subprocess.Popen."""
        return ["nsenter", f"--net={self.path}", "--", *(os.fspath(word) for word in argv)]

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

    def set_up(self, device: str, address: str | None = None) -> None:
        """Give ``device`` an address (``A.B.C.D/N``) and set it up."""

        def inside() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                index = route.link_lookup(ifname=device)[0]
                if address is not None:
                    ip, _, prefix = address.partition("/")
                    route.addr("add", index=index, address=ip, prefixlen=int(prefix))
                route.link("set", index=index, state="up")

        self.call(inside)

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
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


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
        (near, near_name, _), (far, far_name, _) = one, other

        def inside() -> None:
            from pyroute2 import IPRoute

            with IPRoute() as route:
                peer = {"ifname": far_name, "net_ns_fd": far.fd}
                route.link("add", ifname=near_name, kind="veth", peer=peer)

        near.call(inside)
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


def _make() -> int:
    if _libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace cannot be made; these tests run as root")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _quiet() -> None:
    for which in ("all", "default", "lo"):
        path = Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6")
        if path.exists():
            path.write_text("1", encoding="ascii")
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=1, state="up")


def _in_thread(name: str, function: Callable[[], T]) -> T:
    """``function()`` on a thread of its own, which may change its namespace and then ends."""
    values: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            values.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name=f"namespace {name}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return values[0]
