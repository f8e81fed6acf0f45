"""Whatever happens to one side of a pair at whatever system call: exactly one guest goes on, and it is whole.

A table of all of them, the calls on the arbiter's file and on the way into the pair included.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from pyvmm.errors import PyvmmError
from tests.framework.call_faults import Under
from tests.framework.fault_runs import (
    END_DEADLINE,
    FURTHER,
    HIT_DEADLINE,
    Case,
    check_records,
    chosen,
    ended_as_it_should,
    listen,
    run_all,
    table,
    was_hit,
)
from tests.framework.migrating import Side
from tests.framework.pairs import pairs, rounds_in

DELAY = {"hybrid": "100", "periodic": "50"}
ON_LINE = ("kill", "after", "short", "EINTR", "ECONNRESET", "EPIPE", "EIO", "freeze=0.1", "freeze=1.5")
ON_BEAT = ("kill", "short", "EINTR", "ECONNRESET", "EPIPE", "freeze=1.5")
ON_KVM = ("kill", "after", "EINTR", "EIO", "ENOMEM", "freeze=0.1")
ON_FILES = ("kill", "after", "EIO", "ENOSPC")
CALLS = {
    ("primary", "move.line"): (9, ON_LINE), ("primary", "pair.line"): (32, ON_LINE),
    ("primary", "pair.beat"): (6, ON_BEAT), ("primary", "pair.kvm"): (70, ON_KVM),
    ("primary", "move.arbiter"): (4, ON_FILES),
    ("secondary", "move.line"): (10, ON_LINE), ("secondary", "pair.line"): (34, ON_LINE),
    ("secondary", "pair.beat"): (6, ON_BEAT), ("secondary", "pair.kvm"): (150, ON_KVM),
}  # fmt: skip
"""How many of each there are, at least, until three checkpoints are done, and what may happen at one."""
IN_MAKE_TEST, BATCH = 48, 16


def run(case: Case, folder: Path) -> str:
    log = folder / "calls"
    with pairs(folder) as pair:
        names = [f"{word}-{os.getpid()}-{folder.name}" for word in ("primary", "secondary")]  # unique among machines
        under = Under(log, folder / f"{names[1]}.s", case.fault)
        beats = ("--heartbeat", "50", "--heartbeat-loss", "10")
        options = ("--colo-mode", case.form, "--checkpoint-delay", DELAY[case.form], *beats)
        secondary = pair.secondary(name=names[1], inside=under if case.side == "secondary" else None)
        primary = pair.primary(None, *options, name=names[0], inside=under if case.side == "primary" else None)
        primary.wait_for_text(b"round 2:")  # it measures its timer first, which must not fall into a standstill
        with contextlib.suppress(PyvmmError):  # it may die of that at once
            primary.qmp.execute("x-colo-protect", {"uri": pair.uri_of(names[1])})
        both = (primary, secondary)
        if not listen(both, lambda: was_hit(log), HIT_DEADLINE):
            return "not reached"
        return judge(case, primary, secondary)


def judge(case: Case, primary: Side, secondary: Side) -> str:
    at = len(rounds_in(primary.output))
    both = (primary, secondary)

    def settled() -> bool:
        return (
            len(rounds_in(secondary.output)) >= FURTHER
            or (len(rounds_in(primary.output)) >= at + FURTHER + 10 * ("freeze" in case.fault.what))
            or all(side.process.poll() is not None for side in both)
        )

    assert listen(both, settled, END_DEADLINE), [(rounds_in(side.output)[-3:], side.process.poll()) for side in both]
    if rounds_in(secondary.output):
        said = ended_as_it_should(primary)
        outcome = f"the secondary goes on; the primary: {said}"
    elif primary.process.poll() is None:
        if secondary.process.poll() is not None:
            outcome = f"the primary goes on; the secondary: {ended_as_it_should(secondary)}"
        else:
            outcome = "the primary goes on"
    else:
        # Only before there ever was a pair may both be gone, and only if the primary was killed or its KVM failed it.
        outcome = f"gone before it was protected; the secondary: {ended_as_it_should(secondary)}"
        assert case.side == "primary", outcome
        assert case.fault.what in ("kill", "after") or ended_as_it_should(primary) == "crashed", outcome
        assert "before there was a " in outcome or case.fault.place.startswith("move"), outcome
    check_records(primary, secondary, overlap=case.form == "hybrid")
    return outcome


CASES = chosen(table(DELAY, CALLS), IN_MAKE_TEST, seed=1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, len(CASES), BATCH))
def test_a_fault_at_a_call(tmp_path: Path, first: int) -> None:
    cases = CASES[first : first + BATCH]
    outcomes = run_all(cases, run, tmp_path)
    missed = [case for case, outcome in outcomes.items() if outcome == "not reached"]
    assert all(case.fault.place.startswith("move") for case in missed), missed  # there are checkpoints without end
