"""Live migration of the same bare-metal dirtier under pyvmm and under QEMU's microvm, taking turns.

Both sides of each are on this machine, over a unix socket. Three figures:

- ``total``: from the command to the migration's end, as the source says by query-migrate.
- ``downtime``: for how long no vCPU ran, the same for both: from the time stamp of the source's STOP event, sent when
  its vCPUs have stopped, to that of the destination's RESUME event, sent when they are let run. The target is for this.
- ``reported``: what the source says by query-migrate. Not alike: QEMU's ends when the source has sent everything, and
  is in whole milliseconds; pyvmm's ends when the destination has said that its guest runs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import document, figure, main, paired_ratio, verdict
from vmms import DEADLINE, command, end_on_signals, running, wait_for

from pyvmm.errors import HostError

ROUNDS = 5
PAGES = (0, 1000, 4000)
MEMORY = 64
TARGETS = {"downtime": 0.5, "total": 1.5}


def one(vmm: str, pages: int) -> tuple[float, float, float]:
    """Milliseconds: (total, downtime, reported) of one migration of a guest that is at its work."""
    words = f"pages={max(pages, 1)} period={100 if pages else 10000} rounds=0"
    with (
        tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder,
        running(f"{vmm}'s destination", command(vmm, folder, "to", words, MEMORY), folder, "to") as to,
        running(f"{vmm}'s source", command(vmm, folder, "from", words, MEMORY), folder, "from") as source,
    ):
        wait_for(source.vmm, Path(folder, "from.log"), b"round 3:" if pages else b"round 1:")
        source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 300})
        source.execute("migrate", uri=f"unix:{folder}/m")
        deadline = time.monotonic() + DEADLINE
        while (info := source.execute("query-migrate")).get("status") != "completed":
            if info.get("status") == "failed" or time.monotonic() > deadline:
                raise HostError(f"not measured: {vmm}: {info}")
            time.sleep(0.005)
        while not to.execute("query-status")["running"]:
            time.sleep(0.005)
        return info["total-time"], to.event("RESUME") - source.event("STOP"), info["downtime"]


def measure() -> dict[str, Any]:
    """All rates."""
    if shutil.which("qemu-system-x86_64") is None:
        raise HostError("not measured: qemu-system-x86_64 is not installed (make packages)")
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for pages in PAGES:
        turns = [(one("pyvmm", pages), one("qemu", pages)) for _ in range(ROUNDS)]
        for index, name in enumerate(("total", "downtime", "reported")):
            ours = [float(turn[0][index]) for turn in turns]
            theirs = [float(max(turn[1][index], 0.5)) for turn in turns]  # 0 is less than 1
            key = f"{name}_{pages}"
            ratio = paired_ratio(ours, theirs)
            figures[key] = {"pyvmm": figure(ours, "ms"), "qemu": figure(theirs, "ms"), "ratio": ratio}
            if name in TARGETS:
                ratios[key] = ratio.median
    return document(
        what=f"live migration of guests/dirtier with {MEMORY} MiB, so many pages each 100 ms, over a unix socket",
        against="qemu-system-x86_64 -accel kvm -M microvm, the same guest and limits",
        figures=figures,
        ratio=ratios,
        target={key: verdict(ratios[key], TARGETS[key.partition("_")[0]]) for key in ratios},
    )


if __name__ == "__main__":
    end_on_signals()
    main(measure)
