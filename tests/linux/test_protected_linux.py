"""An unmodified Linux that is protected, and whose primary is killed while it works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.framework.pairs import check_contiguous, check_goes_on, colo_stats, pairs, wait_alone, wait_protected

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]
# One line for each step: its number, the time since boot, and whether the shell still has what it had.
LOOP = (
    "i=0; kept=$(seq -s + 1 300); while true; do i=$((i+1)); read up rest </proc/uptime;"
    " [ $((kept)) = 45150 ] && ok=same || ok=LOST; echo \"step $i $up $ok\"; sleep 0.05; done\n"
)
STEP = re.compile(rb"step ([0-9]+) ([0-9]+)\.([0-9]+) (same|LOST)\r")
MODES = {"periodic": "100", "hybrid": "1000"}


@pytest.mark.parametrize("mode", MODES)
def test_linux_survives_the_death_of_its_primary(tmp_path: Path, mode: str) -> None:
    with pairs(tmp_path, ()) as pair:
        secondary = pair.secondary(command="linux")
        primary = pair.primary(
            secondary, "--fast", "--colo-mode", mode, "--checkpoint-delay", MODES[mode], command="linux"
        )
        primary.wait_for_text(b"# ", 200)
        wait_protected(primary)
        assert primary.process.stdin is not None
        primary.process.stdin.write(LOOP.encode())
        primary.process.stdin.flush()
        primary.wait_for_text(b"step 3 ", 60)
        wait_protected(primary, int(colo_stats(primary)["checkpoints"]) + 3)
        primary.kill()
        said = primary.end()[1]
        wait_alone(secondary)
        secondary.wait_for_text(b" same\r\n", 60)
        lived_on = secondary.quit()
        before, after = ([(int(n), int(up) * 100 + int(part), kept) for n, up, part, kept in STEP.findall(output)]
                         for output in (said, lived_on))  # fmt: skip
        for steps in (before, after):
            check_contiguous([number for number, _, _ in steps])
            assert {kept for _, _, kept in steps} == {b"same"}
            times = [up for _, up, _ in steps]
            assert times == sorted(times)
        if mode == "periodic":
            check_goes_on([number for number, _, _ in before], [number for number, _, _ in after])
            assert after[0][1] >= before[-1][1]
        for complaint in (b"BUG", b"WARNING", b"rcu:", b"clocksource:", b"soft lockup", b"Oops", b"Call Trace"):
            assert complaint not in said + lived_on
