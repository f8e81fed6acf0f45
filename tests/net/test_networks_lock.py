"""The lock that lets one pyvmm at a time change the networks of a namespace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.net.records import networks_lock
from tests.framework.topology import Namespace, namespace

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import time
from pyvmm.net.records import networks_lock
with networks_lock():
    print("locked", flush=True)
    time.sleep(1000)
"""


def take(seconds: float) -> None:
    with networks_lock(seconds):
        pass


def test_it_holds_against_other_processes_and_goes_with_its_owner() -> None:
    with namespace("lock") as space:
        child = space.start(sys.executable, "-c", HOLDER, cwd=REPOSITORY)
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(HostError, match=r"another pyvmm has been changing networks here for 0\.1 s"):
            space.call(lambda: take(0.1))
        child.kill()
        child.wait(10)
        space.call(lambda: take(5))


def test_each_namespace_has_its_own() -> None:
    with namespace("one") as one, namespace("other") as other:

        def holding(space: Namespace) -> None:
            with networks_lock(5):
                space.call(lambda: take(0))

        one.call(lambda: holding(other))
        with pytest.raises(HostError):
            one.call(lambda: holding(one))
