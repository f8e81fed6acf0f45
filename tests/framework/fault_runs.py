"""One fault, two real processes, and what the guest's own record says about it afterwards.

The guest (guests/dirtier) keeps a number in each of its pages, checks it a round later, and prints the round.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.framework.call_faults import Fault
from tests.framework.migrating import Side
from tests.framework.pairs import check_contiguous, rounds_in

AT_ONCE = 4
HIT_DEADLINE = 30.0
END_DEADLINE = 30.0
FURTHER = 6
"""Rounds that show that a guest goes on."""
GAP = 100
"""Rounds at most that a guest says, between one checkpoint and the next, while a machine is busy."""
DAMAGED = b"does not hold"


@dataclass(frozen=True)
class Case:
    """``side`` is who suffers, ``form`` what kind of run."""

    form: str
    side: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.form}/{self.side}/{self.fault}"

    @staticmethod
    def parse(text: str) -> Case:
        form, side, fault = text.split("/")
        return Case(form, side, Fault.parse(fault))


def table(forms: Iterable[str], calls: Mapping[tuple[str, str], tuple[int, Sequence[str]]]) -> list[Case]:
    """All cases. ``calls``: for a side and a place how many calls there are, and what may happen at each."""
    return [
        Case(form, side, Fault(place, number, what))
        for form in forms
        for (side, place), (count, whats) in calls.items()
        for number in range(1, count + 1)
        for what in whats
    ]


def chosen(table: Sequence[Case], count: int, seed: int) -> list[Case]:
    """``count`` of them; all with PYVMM_LAB=long, one with PYVMM_FAULT=CASE; PYVMM_SEED instead of ``seed``."""
    if told := os.environ.get("PYVMM_FAULT"):
        return [Case.parse(told)]
    if os.environ.get("PYVMM_LAB") == "long":
        return list(table)
    return random.Random(int(os.environ.get("PYVMM_SEED", seed))).sample(table, min(count, len(table)))


def run_all(cases: Iterable[Case], run: Callable[[Case, Path], str], folder: Path) -> dict[Case, str]:
    """Outcome of each case; AssertionError with all that went wrong, and how to see it again."""
    numbered = list(enumerate(cases))

    def one(entry: tuple[int, Case]) -> tuple[Case, str, str]:
        place = folder / str(entry[0])
        place.mkdir()
        try:
            return entry[1], run(entry[1], place), ""
        except Exception as error:
            return entry[1], "", f"PYVMM_FAULT={entry[1]}: {type(error).__name__}: {error}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(one, numbered))
    problems = [problem for _, _, problem in done if problem]
    outcomes = {case: outcome for case, outcome, _ in done}
    for case, outcome in outcomes.items():
        print(f"{case}: {outcome}")
    assert not problems, "\n".join([f"{len(problems)} of {len(done)}", *problems])
    return outcomes


def listen(sides: Sequence[Side], until: Callable[[], bool], seconds: float) -> bool:
    """Take what they print until ``until()`` is true; whether it became so."""
    deadline = time.monotonic() + seconds
    open_ones = {side.process.stdout: side for side in sides if side.process.stdout is not None}
    while not until():
        if time.monotonic() >= deadline:
            return False
        for stream in select.select(list(open_ones), [], [], 0.02)[0]:
            piece = os.read(stream.fileno(), 65536)
            open_ones[stream].output += piece
            if not piece:
                del open_ones[stream]
        if not open_ones:
            time.sleep(0.02)
    return True


def was_hit(log: Path) -> bool:
    """Whether the fault has come."""
    with contextlib.suppress(FileNotFoundError):
        return "!" in log.read_text()
    return False


def ended_as_it_should(side: Side) -> str:
    """Of a process that has ended or is about to: killed, or one line and 125. What it said."""
    code, rest, problems = side.finish(END_DEADLINE)
    side.output += rest
    text = problems.decode()
    if code == -9:
        return "killed"
    if code == 126:  # its KVM failed while the guest ran: the machine crashed, and says so
        assert "the guest crashed" in text, text
        return "crashed"
    assert code == 125 and text.count("\n") == 1 and "Traceback" not in text, (side.name, code, text)
    return text.strip()


def check_records(first: Side, second: Side, *, overlap: bool) -> None:
    """Nothing lost inside a life and nothing damaged; ``second``'s begins where ``first``'s ended, unless both ran."""
    one, two = rounds_in(first.output), rounds_in(second.output)
    for side, rounds in ((first, one), (second, two)):
        assert DAMAGED not in side.output, side.output[-300:]
        if rounds:
            check_contiguous(rounds)
    assert not one or one[0] == 1, first.output[:300]
    if one and two and not overlap:
        assert one[-1] < two[0] <= one[-1] + GAP, (one[-3:], two[:3])
