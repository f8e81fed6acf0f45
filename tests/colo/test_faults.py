"""Killed, stopped, and failing system calls, anywhere in a checkpoint, on either side; judged by the guest's record."""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.colo import faults
from tests.framework.migrating import dirtier, free_port
from tests.framework.pairs import pairs, wait_protected
from tests.lab.selection import long_form

AT_ONCE = 3
"""Each mostly waits."""
FEW = 90
MANY = 1000
SEED = int(os.environ.get("PYVMM_FAULT_SEED", "0")) or int(time.time()) & 0xFFFFFF
"""$PYVMM_FAULT_SEED replays a run."""
EPOCHS = 4


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> faults.Counts:
    """How many calls there are of each kind, up to EPOCHS checkpoints."""
    found: faults.Counts = {}
    for side in ("primary", "secondary"):
        folder, port = tmp_path_factory.mktemp("count"), free_port()
        files = {at: call.format(port=port) for at, call in faults.FILES.items()}
        under = faults.Under(folder / "faults", tuple(f"{file}:count" for file in files.values()))
        uri = f"tcp:127.0.0.1:{port}"
        with pairs(folder, dirtier(20, 5, 0)) as pair:
            pair.secondary("--insecure", uri=uri, inside=under if side == "secondary" else None)
            primary = pair.primary(
                None, "--insecure", "--checkpoint-delay", "30", inside=under if side == "primary" else None
            )
            primary.wait_for("running")
            before = under.calls()
            primary.qmp.execute("x-colo-protect", {"uri": uri})
            wait_protected(primary, EPOCHS)
        calls = [line.replace(" ", ":", 1) for line in under.calls()]
        for at, file in files.items():
            first = [line.replace(" ", ":", 1) for line in before].count(file)
            found[side, at] = first, calls.count(file) - first
    return found


def test_faults(counts: faults.Counts, tmp_path: Path) -> None:
    """All of a sample, some at a time; those that go wrong are told with the seed."""
    number = MANY if long_form() else FEW
    owners, wrong = Counter[str](), []

    def one(turn: int, fault: faults.Fault) -> str:
        folder = tmp_path / str(turn)
        folder.mkdir()
        return faults.run(folder, fault)

    with ThreadPoolExecutor(AT_ONCE, "fault") as pool:
        running = [
            (turn, fault, pool.submit(one, turn, fault))
            for turn, fault in enumerate(faults.sample(counts, number, SEED))
        ]
        for turn, fault, future in running:
            try:
                owners[future.result()] += 1
            except Exception as error:
                wrong.append(f"{fault} (turn {turn}): {error!r:.1000}")
    print(f"PYVMM_FAULT_SEED={SEED}: {number} faults: {dict(owners)}")
    assert not wrong, f"PYVMM_FAULT_SEED={SEED}:\n" + "\n".join(wrong)
