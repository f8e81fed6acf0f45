"""Work that a host's disk may keep for ever: it has as long as it likes, if something comes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyvmm.errors import DeadlineError

LOOK_EVERY = 0.25
"""Seconds."""


def watched(work: Callable[[], None], progress: Callable[[], int], patience: float, name: str) -> None:
    """Do ``work`` on a thread called ``name``, and raise what it raises. ``progress`` gives a number that changes while
    it gets on; may be called at any time.

    DeadlineError when that stays the same for ``patience`` seconds: the thread goes on then, and all it uses is to
    stay.
    """
    problems: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    # daemon: a system call that does not return must not keep the process, too.
    thread = threading.Thread(target=do, name=name, daemon=True)
    thread.start()
    last, until = progress(), time.monotonic() + patience
    while True:
        thread.join(min(LOOK_EVERY, patience))
        if not thread.is_alive():
            break
        if (now := progress()) != last:
            last, until = now, time.monotonic() + patience
        elif time.monotonic() >= until:
            raise DeadlineError(f"nothing came of it for {patience:g} s")
    if problems:
        raise problems[0]
