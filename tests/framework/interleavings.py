"""Every order in which threads can take their atomic steps, tried one after the other.

A stateless search: the program is run from its start for each order. A step begins when a thread enters a lock made by
``Explorer.lock()``, and goes on until it enters one again or ends; only one thread runs at a time, so what is seen
depends on the order alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

DEADLINE = 10.0
"""Seconds a thread may take for one step."""


class _Actor:
    def __init__(self, program: Callable[[], None]) -> None:
        self.turn, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        self.thread.start()

    def _run(self, program: Callable[[], None]) -> None:
        try:
            self.wait_for_turn()
            program()
        except BaseException as error:
            self.error = error
        self.ended = True
        self.stopped.release()

    def wait_for_turn(self) -> None:
        if not self.turn.acquire(timeout=DEADLINE):
            raise TimeoutError("this thread's turn never came")

    def step(self) -> None:
        self.turn.release()
        assert self.stopped.acquire(timeout=DEADLINE), "a step did not end"


class _Lock:
    """Stands for a threading.Lock in the code under test: entering it is where threads may change places."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer = explorer

    def __enter__(self) -> None:
        actor = self._explorer.current()
        if actor is not None:
            actor.stopped.release()
            actor.wait_for_turn()

    def __exit__(self, *_: object) -> None:
        pass


class Explorer:
    """Gives locks to the code under test and runs programs in every order."""

    def __init__(self) -> None:
        self._actors: list[_Actor] = []

    def lock(self) -> _Lock:
        """To put in the place of the lock whose holders are the atomic steps."""
        return _Lock(self)

    def current(self) -> _Actor | None:
        mine = threading.current_thread()
        return next((actor for actor in self._actors if actor.thread is mine), None)

    def every_order(
        self, start: Callable[[], Sequence[Callable[[], None]]], check: Callable[[list[int]], None], at_most: int
    ) -> int:
        """``start`` makes the programs anew; ``check`` is called after each order with the order. Returns how many.

        AssertionError: there are more than ``at_most``, or one of the programs failed.
        """
        choices: list[list[int]] = []
        tried = 0
        while True:
            tried += 1
            assert tried <= at_most, f"more than {at_most} orders"
            order = self._run(start(), choices)
            check(order)
            while choices and len(choices[-1]) == 1:
                choices.pop()
            if not choices:
                return tried
            choices[-1].pop(0)

    def _run(self, programs: Sequence[Callable[[], None]], choices: list[list[int]]) -> list[int]:
        """Follow ``choices`` (of each step the numbers still to be tried) and add to it where it ends."""
        self._actors = [_Actor(program) for program in programs]
        for actor in self._actors:
            actor.step()  # to the first lock: what is before it concerns nobody else
        order: list[int] = []
        while ready := [number for number, actor in enumerate(self._actors) if not actor.ended]:
            if len(order) == len(choices):
                choices.append(ready)
            order.append(choices[len(order)][0])
            self._actors[order[-1]].step()
        for actor in self._actors:
            actor.thread.join(DEADLINE)
            if actor.error is not None:
                raise AssertionError(f"in the order {order}") from actor.error
        self._actors = []
        return order
