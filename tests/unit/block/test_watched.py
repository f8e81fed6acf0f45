"""Work that may be kept for ever: it ends, it fails, it gets on, or it is given up."""

from __future__ import annotations

import threading
import time

import pytest

from pyvmm.block.watched import watched
from pyvmm.errors import DeadlineError, HostError
from tests.framework.topology import wait_until


def test_what_gets_on_has_all_the_time_it_takes() -> None:
    done: list[int] = []

    def work() -> None:
        for number in range(8):
            time.sleep(0.1)
            done.append(number)

    watched(work, lambda: len(done), 0.6, "slow")
    assert len(done) == 8


def test_what_fails_says_so() -> None:
    def work() -> None:
        raise HostError("the disk is gone")

    with pytest.raises(HostError, match="the disk is gone"):
        watched(work, lambda: 0, 5.0, "fails")


def test_what_does_not_get_on_is_given_up() -> None:
    go_on = threading.Event()
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"for 0.2 s"):
        watched(go_on.wait, lambda: 0, 0.2, "stands still")  # type: ignore[arg-type]
    assert time.monotonic() - began < 5
    go_on.set()
    wait_until(lambda: "stands still" not in {thread.name for thread in threading.enumerate()}, "it never ended")
