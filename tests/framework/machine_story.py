"""A machine that runs in the main thread while a test drives it from another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from pyvmm.machine.ending import Ending
from pyvmm.machine.machine import Machine

Result = TypeVar("Result")


def call(machine: Machine, function: Callable[[], Result]) -> Result:
    """Run ``function`` in the loop's thread, from another one; what it returned or raised."""
    done = threading.Event()
    results: list[Result] = []
    errors: list[BaseException] = []

    def carry_out() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        done.set()

    machine.loop.post(carry_out)
    assert done.wait(15), "the loop did not serve the call"
    if errors:
        raise errors[0]
    return results[0]


def run_with(machine: Machine, story: Callable[[], None]) -> Ending:
    """``machine.run()`` while ``story`` goes on in a thread of its own; its end quits the machine."""
    failed: list[BaseException] = []

    def tell() -> None:
        try:
            story()
        except BaseException as error:
            failed.append(error)
        machine.request_end(Ending(kind="quit", reason="the story is over"))

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        ending = machine.run()
    finally:
        thread.join(20)
    if failed:
        raise failed[0]
    return ending
