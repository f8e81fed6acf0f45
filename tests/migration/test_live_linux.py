"""A Linux started from its snapshot that goes from process to process while it works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework.migrating import Side

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]
Start = Callable[..., Side]
HOPS = 2
# The file is not from /dev/urandom: a kernel that is emulated needs 40 s for a MiB of it.
# One line for each step: its number, the time since boot in hundredths, whether a file still has its checksum.
LOOP = (
    "dd if=/bin/busybox of=/tmp/f bs=64k count=16 2>/dev/null; sum=$(md5sum </tmp/f); i=0;"
    " while true; do i=$((i+1)); read up rest </proc/uptime;"
    " [ \"$(md5sum </tmp/f)\" = \"$sum\" ] && ok=same || ok=LOST;"
    " echo \"step $i $up $ok\"; done\n"
)
STEP = re.compile(rb"step ([0-9]+) ([0-9]+)\.([0-9]+) (same|LOST)")


def test_a_linux_from_a_snapshot_goes_on_counting_when_it_moves(start: Start, tmp_path: Path) -> None:
    """No step is lost or doubled, no byte of a file changes, time never goes back, and the kernel says nothing."""
    side = start("vm0", "--fast", command="linux")
    side.wait_for_text(b"# ", 200)
    assert side.process.stdin is not None
    side.process.stdin.write(LOOP.encode())
    side.process.stdin.flush()
    side.wait_for_text(b"step 2 ", 60)
    output = b""
    for hop in range(HOPS):
        uri = f"unix:{tmp_path}/m{hop}"
        to = start(f"vm{hop + 1}", "--incoming", uri, command="linux")
        to.wait_for("inmigrate")
        side.migrate(uri)
        info = side.migrated()
        assert info["status"] == "completed", info
        output += side.quit()
        side = to
        side.wait_for_text(b" same\r\n", 60)
    side.wait_for_text(b" same\r\n", 60)
    output += side.quit()
    steps = [(int(number), int(up) * 100 + int(part), kept) for number, up, part, kept in STEP.findall(output)]
    assert [step[0] for step in steps] == list(range(1, len(steps) + 1)), output[-3000:]
    assert {step[2] for step in steps} == {b"same"}
    times = [step[1] for step in steps]
    assert times == sorted(times)
    for complaint in (b"BUG", b"WARNING", b"rcu:", b"clocksource:", b"soft lockup", b"Oops", b"Call Trace"):
        assert complaint not in output, output[-3000:]
