"""Having a machine's loop do something, from another thread, and waiting for its result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pyvmm.errors import DeadlineError

R = TypeVar("R")

LOOP_DEADLINE = 10.0
"""Seconds within which the loop must have done what it was asked to: pausing waits for disks, too."""


def call_on_loop(post: Callable[[Callable[[], None]], None], call: Callable[[], R]) -> R:
    """Have the loop behind ``post`` call it; what it returns or raises. DeadlineError if it does not come to it."""
    return begin_on_loop(post, call)()


def begin_on_loop(post: Callable[[Callable[[], None]], None], call: Callable[[], R]) -> Callable[[], R]:
    """The same, without waiting: what waits for it is returned."""
    done = threading.Event()
    box: list[tuple[Any, Exception | None]] = []

    def carry_out() -> None:
        try:
            box.append((call(), None))
        except Exception as error:
            box.append((None, error))
        done.set()

    def wait() -> R:
        if not done.wait(LOOP_DEADLINE):
            raise DeadlineError(f"the machine's loop did not answer within {LOOP_DEADLINE:g} s")
        result, error = box[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    post(carry_out)
    return wait
