"""A machine's process keeps of its network the tap, and nothing else: no sockets, loops or threads of netlink."""

from __future__ import annotations

import os
import threading

from pyvmm.net import nat
from pyvmm.net.leases import join
from pyvmm.net.networks import list_networks, set_up, take_down
from tests.framework.topology import namespace


def open_files() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    return found


def test_only_the_tap_stays_open() -> None:
    with namespace("host") as space:

        def inside() -> None:
            set_up("warm")
            nat.missing()
            before, threads = open_files(), threading.active_count()
            set_up("demo")
            lease = join("demo", "box")
            list_networks()
            nat.missing()
            kept = {target.split(":")[0] for name, target in open_files().items() if name not in before}
            assert kept == {"/dev/net/tun", "socket"}, "the tap and its socket for questions"
            lease.close()
            take_down("demo")
            assert (open_files(), threading.active_count()) == (before, threads)

        space.call(inside)
