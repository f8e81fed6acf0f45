"""virtqueue.c under ASan and UBSan, against hostile rings and a guest that changes them meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "pyvmm" / "native"
REACHED = {
    0: "the end of the ring", -4: "BAD_INDEX", -5: "BAD_HEAD", -6: "BAD_NEXT", -7: "LOOP", -8: "BAD_ADDRESS",
    -9: "BAD_ORDER", -10: "BAD_TABLE", -11: "TOO_LONG",
}  # fmt: skip
"""What the rounds must come upon, or they prove little."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is needed (make packages)"
    program = tmp_path_factory.mktemp("virtqueue") / "harness"
    sources = [HERE / "virtqueue_harness.c", NATIVE / "virtqueue.c", NATIVE / "dirty_bitmap.c"]
    built = subprocess.run(
        [compiler, "-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}", *map(str, sources),
         "-o", str(program), "-lpthread"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_ring_leads_outside_memory(harness: Path, seed: int) -> None:
    done = subprocess.run(
        [str(harness), str(seed), "2000", "10"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["taken"] > 200
    missed = [name for result, name in REACHED.items() if not figures["results"][str(result)]]
    assert missed == [], figures


def test_the_sanitizers_are_on(harness: Path) -> None:
    """A harness that reports nothing because it was built without them would prove nothing."""
    names = subprocess.run(["nm", "-D", str(harness)], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "__asan_report_load" in names and "__ubsan_handle" in names
