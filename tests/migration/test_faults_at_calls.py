"""Whatever happens to one side of a migration at whatever system call: the guest runs in one place, whole.

Until ``go`` that place is the source. A source that dies takes the guest with it until then; from then on only the
destination may run it (migration/protocol.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.errors import HostError
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
from tests.framework.migrating import Side, dirtier, sides
from tests.framework.pairs import rounds_in

ON_LINE = ("kill", "after", "short", "EINTR", "ECONNRESET", "EPIPE", "EIO", "freeze=0.1", "freeze=2")
ON_KVM = ("kill", "after", "EINTR", "EIO", "ENOMEM", "freeze=0.1")
CALLS = {
    ("source", "move.line"): (14, ON_LINE), ("source", "move.kvm"): (23, ON_KVM),
    ("destination", "move.line"): (18, ON_LINE), ("destination", "move.kvm"): (150, ON_KVM),
}  # fmt: skip
"""How many of each there are, at least, and what may happen at one."""
STALL = 1000
"""Milliseconds that either side waits for the other: less than the longer freeze."""
IN_MAKE_TEST, BATCH = 32, 16


def run(case: Case, folder: Path) -> str:
    log, line = folder / "calls", folder / "line"
    under = Under(log, line, case.fault)
    names = [f"{word}-{os.getpid()}-{folder.name}" for word in ("source", "destination")]  # unique among machines
    guest = dirtier(50, 20, 0)
    with sides(folder) as start:
        source = start(names[0], *guest, inside=under if case.side == "source" else None)
        destination = start(
            names[1], *guest, "--incoming", "defer", inside=under if case.side == "destination" else None
        )
        destination.wait_for("inmigrate")
        destination.qmp.execute("migrate-set-parameters", {"x-stall-timeout": STALL})
        destination.qmp.execute("migrate-incoming", {"uri": f"unix:{line}"})
        source.wait_for_text(b"round 3:")
        source.migrate(f"unix:{line}", x_stall_timeout=STALL)
        if not listen((source, destination), lambda: was_hit(log), HIT_DEADLINE):
            return "not reached"
        return judge(case, source, destination)


def judge(case: Case, source: Side, destination: Side) -> str:
    at = len(rounds_in(source.output))
    both = (source, destination)
    nowhere = False

    def settled() -> bool:
        nonlocal nowhere
        gone = [side.process.poll() is not None for side in both]
        if len(rounds_in(destination.output)) >= FURTHER or all(gone):
            return True
        if not gone[0] and gone[1]:
            try:
                info = source.migration()
            except HostError:  # it is dying, too
                return False
            told = "look whether the destination runs it" in info.get("error-desc", "")
            nowhere = told or info["status"] == "completed"
            return nowhere or len(rounds_in(source.output)) >= at + FURTHER
        return False

    assert listen(both, settled, END_DEADLINE), [(rounds_in(side.output)[-3:], side.process.poll()) for side in both]
    if rounds_in(destination.output):
        if source.process.poll() is None:
            # It was handed over; the source knows, or has been told to look.
            before = source.output
            assert not listen(both, lambda: source.output != before, 0.3), "both run"
            assert source.status() in ("postmigrate", "paused"), source.status()
            outcome = f"the destination goes on; the source: {source.migration()['status']}"
        else:
            outcome = f"the destination goes on; the source: {ended_as_it_should(source)}"
    elif nowhere:
        assert source.status() in ("paused", "postmigrate")
        assert case.side == "destination", "a guest is lost without a death"
        outcome = f"handed over to one that died; the destination: {ended_as_it_should(destination)}"
        assert "KVM_GET" not in outcome, f"state is read back before it is handed over: {outcome}"
    elif source.process.poll() is None:
        outcome = f"the source goes on; the destination: {ended_as_it_should(destination)}"
    else:
        assert case.side == "source" and case.fault.what in ("kill", "after"), "both are gone"
        outcome = f"gone with the source; the destination: {ended_as_it_should(destination)}"
    check_records(source, destination, overlap=False)
    return outcome


CASES = chosen(table(("live",), CALLS), IN_MAKE_TEST, seed=1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, len(CASES), BATCH))
def test_a_fault_at_a_call(tmp_path: Path, first: int) -> None:
    cases = CASES[first : first + BATCH]
    outcomes = run_all(cases, run, tmp_path)
    missed = [case for case, outcome in outcomes.items() if outcome == "not reached"]
    assert len(missed) <= len(cases) // 2 or len(CASES) != IN_MAKE_TEST, missed  # the last ones are not always made
