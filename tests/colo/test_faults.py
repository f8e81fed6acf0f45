"""Killed, stopped, and failing system calls, anywhere in a checkpoint, on either side; judged by the guest's record."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.colo import faults
from tests.framework.migrating import dirtier, free_port
from tests.framework.pairs import pairs, wait_protected
from tests.lab.selection import long_form

FEW = 32
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
    """All of a sample; the first that goes wrong is told with the seed."""
    owners: dict[str, int] = {}
    number = MANY if long_form() else FEW
    for turn, fault in enumerate(faults.sample(counts, number, SEED)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        try:
            owner = faults.run(folder, fault)
        except AssertionError as error:
            raise AssertionError(f"{fault} (PYVMM_FAULT_SEED={SEED}, turn {turn}): {error}") from error
        owners[owner] = owners.get(owner, 0) + 1
        print(turn, fault, owner)
    print(f"seed {SEED}: {number} faults: {owners}")
