"""Whatever happens to one side of a pair with a disk, at whatever call on the disks' connection or on a disk: exactly
one guest goes on, and what it was told to be written is on its disk.

The guest (guests/disk-reader, ``journal``) writes numbers, one after another and each in its place, says each when its
disk has it, and reads what it finds when it goes on in the secondary.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from pyvmm.errors import PyvmmError
from tests.colo.test_replicated_disk import GUEST, check_disk, image, numbers_in
from tests.framework.call_faults import Under
from tests.framework.fault_runs import (
    END_DEADLINE,
    HIT_DEADLINE,
    Case,
    chosen,
    ended_as_it_should,
    listen,
    run_all,
    table,
    was_hit,
)
from tests.framework.migrating import Side
from tests.framework.pairs import Pair, check_contiguous, pairs

DELAY = {"hybrid": "100", "periodic": "50"}
ON_THIRD = ("kill", "after", "short", "EINTR", "ECONNRESET", "EPIPE", "freeze=0.1", "freeze=1.5")
CALLS = {
    ("primary", "pair.third"): (15, ON_THIRD), ("primary", "pair.disk"): (20, ("kill", "after", "freeze=1.5")),
    ("secondary", "pair.third"): (25, ON_THIRD),
    ("secondary", "pair.disk"): (50, ("kill", "after", "EIO", "ENOSPC", "freeze=0.1")),
}  # fmt: skip
"""How many of each there are, at least, until three checkpoints are done, and what may happen at one."""
IN_MAKE_TEST, BATCH = 16, 16
HEARTBEAT_DEATH = 0.5
"""Seconds: 10 heartbeats of 50 ms."""
FURTHER = 60
"""Numbers that show that a guest goes on."""


def run(case: Case, folder: Path) -> str:
    log = folder / "calls"
    with pairs(folder, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        names = {word: f"{word}-{os.getpid()}-{folder.name}" for word in ("primary", "secondary")}
        under = Under(log, folder / f"{names['secondary']}.s", case.fault)
        options = ("--colo-mode", case.form, "--checkpoint-delay", DELAY[case.form],
                   "--heartbeat", "50", "--heartbeat-loss", "10")  # fmt: skip

        def disk(word: str) -> tuple[str, ...]:
            return "--disk", str(image(folder, word))

        secondary = pair.secondary(
            *disk("secondary"), name=names["secondary"], inside=under if case.side == "secondary" else None
        )
        primary = pair.primary(
            None, *disk("primary"), *options, name=names["primary"], inside=under if case.side == "primary" else None
        )
        primary.wait_for_text(b"wrote 10")
        with contextlib.suppress(PyvmmError):  # it may die of that at once
            primary.qmp.execute("x-colo-protect", {"uri": pair.uri_of(names["secondary"])})
        if not listen((primary, secondary), lambda: was_hit(log), HIT_DEADLINE):
            return "not reached"
        return judge(case, pair, primary, secondary)


def judge(case: Case, pair: Pair, primary: Side, secondary: Side) -> str:
    enough = len(numbers_in(primary.output)) + FURTHER
    freeze = float(case.fault.what.partition("=")[2] or 0)
    thawed = time.monotonic() + (freeze + HEARTBEAT_DEATH if freeze else 0)
    both = (primary, secondary)

    def settled() -> bool:
        return (
            len(numbers_in(secondary.output)) >= FURTHER
            or (len(numbers_in(primary.output)) >= enough and time.monotonic() > thawed)
            or all(side.process.poll() is not None for side in both)
        )

    assert listen(both, settled, END_DEADLINE), [(numbers_in(s.output)[-3:], s.process.poll()) for s in both]
    said, goes_on = numbers_in(primary.output), numbers_in(secondary.output)
    if goes_on:
        outcome = f"the secondary goes on; the primary: {ended_as_it_should(primary)}"
        said, survivor, path = numbers_in(primary.output), secondary, pair.folder / "secondary.img"
        check_contiguous(goes_on)
        if case.form == "periodic" and said:
            assert said[-1] < goes_on[0], (said[-3:], goes_on[:3])
    elif primary.process.poll() is None:
        other = secondary.process.poll() is not None
        outcome = f"the primary goes on; the secondary: {ended_as_it_should(secondary) if other else 'is there'}"
        survivor, path = primary, pair.folder / "primary.img"
    else:
        # Only before there ever was a checkpoint may both be gone, and only if the primary was killed.
        outcome = f"gone before it was protected; the secondary: {ended_as_it_should(secondary)}"
        assert case.side == "primary" and case.fault.what in ("kill", "after"), outcome
        assert "before there was a " in outcome, outcome
        check_disk(pair.folder / "primary.img", said[-1])
        return outcome
    check_contiguous(said)
    last = numbers_in(survivor.quit())
    check_contiguous(last)
    check_disk(path, last[-1])
    return outcome


CASES = chosen(table(DELAY, CALLS), IN_MAKE_TEST, seed=3)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(0, len(CASES), BATCH))
def test_a_fault_at_a_call(tmp_path: Path, first: int) -> None:
    outcomes = run_all(CASES[first : first + BATCH], run, tmp_path)
    assert "not reached" not in outcomes.values(), outcomes  # there are checkpoints without end
