"""An arbiter that one host of a pair reaches and the other does not: who does not hear its word holds still until then.

Each side is on a host of its own (a network namespace) with a cable between them, and etcd runs on one of the two; the
pair itself talks over sockets that no cable is needed for, so that only the way to the arbiter is cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.colo.test_links_gone import ONE, TWO, pull_out
from tests.colo.test_pair import MODES, kill, more_rounds
from tests.framework.etcd import etcd_server
from tests.framework.fault_runs import listen
from tests.framework.migrating import Side
from tests.framework.pairs import (
    Pair,
    check_contiguous,
    check_goes_on,
    colo_status,
    pairs,
    rounds_in,
    wait_alone,
    wait_protected,
)
from tests.framework.topology import Namespace, Topology

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
HELD = 1.5
"""Seconds that are long for a survivor that hears its arbiter: it goes on within some 20 ms."""


@contextlib.contextmanager
def hosts(folder: Path, arbiter_at: str) -> Iterator[tuple[Namespace, Namespace, Pair]]:
    with Topology() as topology:
        one, two = topology.namespace("one"), topology.namespace("two")
        topology.veth((one, "up0", f"{ONE}/24"), (two, "up0", f"{TWO}/24"))
        with (
            etcd_server(folder, arbiter_at, one if arbiter_at == ONE else two) as etcd,
            pairs(folder, arbiter=f"etcd:{etcd.address}") as pair,
        ):
            yield one, two, pair


def protected(pair: Pair, one: Namespace, two: Namespace) -> tuple[Side, Side]:
    secondary = pair.secondary(inside=two)
    primary = pair.primary(secondary, *MODES["periodic"], inside=one)
    wait_protected(primary, epoch=3)
    return primary, secondary


def plug_in(space: Namespace) -> None:
    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("set", index=route.link_lookup(ifname="up0")[0], state="up")

    space.call(inside)


def test_a_secondary_that_does_not_reach_it_waits(tmp_path: Path) -> None:
    with hosts(tmp_path, ONE) as (one, two, pair):
        primary, secondary = protected(pair, one, two)
        pull_out(two)
        said = rounds_in(kill(primary))
        listen([secondary], lambda: False, HELD)
        now = colo_status(secondary)
        assert (now["mode"], now["x-failover"], secondary.output) == ("secondary", "active", b"")
        plug_in(two)
        wait_alone(secondary)
        more_rounds(secondary)
        lived_on = rounds_in(secondary.quit())
        check_contiguous(lived_on)
        check_goes_on(said, lived_on)


def test_a_primary_that_does_not_reach_it_says_nothing_more(tmp_path: Path) -> None:
    with hosts(tmp_path, TWO) as (one, two, pair):
        primary, secondary = protected(pair, one, two)
        pull_out(one)
        kill(secondary)
        listen([primary], lambda: False, HELD / 3)  # what had been let out before
        before = primary.output
        listen([primary], lambda: False, HELD)
        assert (colo_status(primary)["mode"], primary.output) == ("primary", before)
        assert rounds_in(before)
        plug_in(one)
        wait_alone(primary)
        more_rounds(primary)
        rounds = rounds_in(primary.quit())
        assert rounds[0] == 1
        check_contiguous(rounds)


def test_who_reaches_it_goes_on(tmp_path: Path) -> None:
    with hosts(tmp_path, ONE) as (one, two, pair):
        primary, secondary = protected(pair, one, two)
        pull_out(two)
        kill(secondary)
        assert wait_alone(primary)["x-term"] == 2
        more_rounds(primary)
        check_contiguous(rounds_in(primary.quit()))
