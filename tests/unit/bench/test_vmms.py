"""A process under measurement: its death is told, and it outlives nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vmms import Monitor, Vmm, wait_for

from pyvmm.errors import HostError

BENCH = Path(__file__).parents[3] / "bench"


def test_a_dead_one_is_quoted_by_whoever_waits_for_it(tmp_path: Path) -> None:
    vmm = Vmm("the primary", ["sh", "-c", "echo out of memory >&2; exit 3"], tmp_path / "errors")
    try:
        for wait in (
            lambda: Monitor(vmm, str(tmp_path / "qmp")),
            lambda: wait_for(vmm, tmp_path / "log", b"round 3:"),
        ):
            with pytest.raises(HostError, match="the primary ended with status 3: 'out of memory'"):
                wait()
    finally:
        vmm.end()


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from vmms import Vmm, end_on_signals
end_on_signals()
vmm = Vmm("a", ["sleep", "60"], Path(sys.argv[2]))
try:
    print(vmm.pid, flush=True)
    time.sleep(60)
finally:
    vmm.end()
    print("ended", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "said", "status"), [(signal.SIGTERM, "ended\n", 143), (signal.SIGINT, "ended\n", 130),
                                   (signal.SIGKILL, "", -9)],
)  # fmt: skip
def test_none_outlives_the_benchmark(tmp_path: Path, number: int, said: str, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(BENCH), str(tmp_path / "errors")], stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        child = int(script.stdout.readline())
        while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
            time.sleep(0.01)  # until setpriv has said with whom it dies, there is a moment that nothing can close
        script.send_signal(number)
        assert (script.stdout.read(), script.wait(20)) == (said, status)
    until = time.monotonic() + 10
    while _lives(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    """Not as a zombie: an orphan's belongs to init, which may take its time."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
