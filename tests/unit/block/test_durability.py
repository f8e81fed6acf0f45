"""What a flush is worth, seen at the system calls of the device's threads: ptrace by strace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STRACE = shutil.which("strace")
SCRIPT = """
import sys
from pathlib import Path
from tests.unit.virtio.block_bench import block_bench, disk, ALL, FLUSH, OUT, OK
from pyvmm.virtio import blk, mmio
with block_bench(disk(Path(sys.argv[1]), content=bytes(65536)), start=False) as bench:
    bench.start(eval(sys.argv[2]))
    for sector in range(3):
        assert bench.request(OUT, sector, b"w" * 512)[0] == OK
    if sys.argv[3] == "flush":
        assert bench.request(FLUSH)[0] == OK
"""


def calls(folder: Path, features: str, then: str) -> list[str]:
    """Writes to the disk ("w") and fdatasyncs of it ("s"), in order."""
    assert STRACE is not None
    log = folder / "strace"
    subprocess.run(
        [STRACE, "-f", "-y", "-e", "trace=pwritev2,fdatasync,fsync", "-o", str(log), sys.executable, "-c", SCRIPT,
         str(folder), features, then],
        check=True, timeout=90, cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    found = []
    unfinished: dict[str, str] = {}
    for each in log.read_text().splitlines():
        line, thread = each, each.split()[0]
        if line.endswith("<unfinished ...>"):
            unfinished[thread] = line.removesuffix("<unfinished ...>")
            continue
        if " resumed>" in line:
            line = unfinished.pop(thread) + line.partition(" resumed>")[2]
        match = re.search(r" (pwritev2|fdatasync)\(\d+<[^>]*disk\.img>.*= (512|0)$", line)
        if match:
            found.append("w" if match[1] == "pwritev2" else "s")
    return found


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.parametrize(
    ("features", "then", "wanted"),
    [
        ("ALL", "end", "www"),
        ("ALL", "flush", "wwws"),
        ("ALL & ~(blk.F_FLUSH | blk.F_CONFIG_WCE)", "end", "wswsws"),  # no way to ask: each write is durable
    ],
)
def test_a_flush_is_an_fdatasync_behind_the_writes(tmp_path: Path, features: str, then: str, wanted: str) -> None:
    assert "".join(calls(tmp_path, features, then)) == wanted
