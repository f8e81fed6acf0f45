"""Two hosts that do not hear each other any more, and no connection that says so: one guest goes on, and only one.

Each side is in a network namespace of its own. A cable is pulled out, or one direction of it swallows everything: the
neighbour's address is made a wrong one, so that its kernel never gets a frame. The arbiter is still there for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.colo.test_pair import MODES, more_rounds
from tests.framework.migrating import Side
from tests.framework.pairs import check_contiguous, check_goes_on, pairs, rounds_in, wait_alone, wait_protected
from tests.framework.topology import Namespace, Topology
from tests.lab.selection import long_form

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
ONE, TWO = "192.0.2.1", "192.0.2.2"
PORT = 7001
BEATS = ("--heartbeat", "50", "--heartbeat-loss", "8")
NUD_PERMANENT = 0x80  # <linux/neighbour.h>


@pytest.fixture
def hosts() -> Iterator[tuple[Namespace, Namespace]]:
    with Topology() as topology:
        one, two = topology.namespace("one"), topology.namespace("two")
        topology.veth((one, "up0", f"{ONE}/24"), (two, "up0", f"{TWO}/24"))
        yield one, two


def pull_out(space: Namespace) -> None:
    """The cable, at this end; the other end has no carrier then."""

    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("set", index=route.link_lookup(ifname="up0")[0], state="down")

    space.call(inside)


def swallow(space: Namespace, neighbour: str) -> None:
    """What ``space`` sends to ``neighbour`` arrives nowhere; the other way all is well."""

    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            index = route.link_lookup(ifname="up0")[0]
            route.neigh("replace", dst=neighbour, lladdr="02:00:00:00:00:63", ifindex=index, state=NUD_PERMANENT)

    space.call(inside)


FAILURES: dict[str, Callable[[Namespace, Namespace], None]] = {
    "the secondary's cable": lambda one, two: pull_out(two),
    "the primary's cable": lambda one, two: pull_out(one),
    "only what the primary sends": lambda one, two: swallow(one, TWO),
    "only what the secondary sends": lambda one, two: swallow(two, ONE),
}


def over(primary: Side, secondary: Side) -> tuple[Side, Side]:
    """(who goes on, who has ended), once one of them has."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for winner, loser in ((primary, secondary), (secondary, primary)):
            if loser.process.poll() is not None:
                return winner, loser
        time.sleep(0.02)
    raise AssertionError("both are still there")


CASES = [(failure, mode) for failure in FAILURES for mode in MODES]


@pytest.mark.parametrize(("failure", "mode"), CASES if long_form() else CASES[0:4:3] + CASES[4:8:3])
def test_one_guest_goes_on(tmp_path: Path, hosts: tuple[Namespace, Namespace], failure: str, mode: str) -> None:
    one, two = hosts
    with pairs(tmp_path) as pair:
        words = ("--insecure", *BEATS)
        secondary = pair.secondary(*words, uri=f"tcp:{TWO}:{PORT}", inside=two)
        primary = pair.primary(f"tcp:{TWO}:{PORT}", *words, *MODES[mode], inside=one)
        wait_protected(primary, epoch=3)
        FAILURES[failure](one, two)
        winner, loser = over(primary, secondary)
        code, said, problems = loser.end()
        assert code == 125
        assert "the other side owns the guest since term 2" in problems and problems.count("\n") == 1
        assert wait_alone(winner)["x-term"] == 2
        more_rounds(winner)
        lived_on = rounds_in(winner.quit())
        check_contiguous(lived_on)
        if winner is secondary:
            check_contiguous(rounds_in(said))
            if mode == "periodic":
                check_goes_on(rounds_in(said), lived_on)
        else:
            assert said == b"" and lived_on[0] == 1
