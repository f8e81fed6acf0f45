"""The network pump under ASan and UBSan, against hostile rings and peers, and a guest that changes them meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "pyvmm" / "native"
SOURCES = (
    "net_pump.c", "net_filtered.c", "net_frames.c", "net_backend.c", "virtqueue.c", "virtio_interrupt.c",
    "dirty_bitmap.c",
)  # fmt: skip


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is needed (make packages)"
    program = tmp_path_factory.mktemp("net") / "harness"
    built = subprocess.run(
        [compiler, "-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}", str(HERE / "net_harness.c"),
         *(str(NATIVE / name) for name in SOURCES), "-o", str(program), "-lpthread"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_ring_and_no_peer_leads_outside_memory(harness: Path, seed: int) -> None:
    done = subprocess.run(
        [str(harness), str(seed), "800", "40"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert min(figures.values()) > 1, figures  # each case was met, or this proves little


def test_the_sanitizers_are_on(harness: Path) -> None:
    names = subprocess.run(["nm", "-D", str(harness)], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "__asan_report_load" in names and "__ubsan_handle" in names
