"""The native core under sanitizers: page tables, guest addresses, KVM's ring and the sinks, against hostile input."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "pyvmm" / "native"
SOURCES = [HERE / "core_harness.c", NATIVE / "coalesced_ring.c", NATIVE / "guest_memory.c", NATIVE / "dirty_bitmap.c"]


def build(folder: Path, sanitizers: str) -> Path:
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is needed (make packages)"
    program = folder / "harness"
    built = subprocess.run(
        [compiler, "-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-mcx16",
         f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{NATIVE}", *map(str, SOURCES),
         "-o", str(program), "-lpthread"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, what: str, seed: int, rounds: int) -> dict[str, int]:
    # setarch: the thread sanitizer of Debian 12's gcc does not cope with as much randomization as newer kernels do.
    done = subprocess.run(
        ["setarch", "-R", str(program), what, str(seed), str(rounds)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("core"), "address,undefined")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_table_leads_outside_memory(harness: Path, seed: int) -> None:
    figures = run(harness, "memory", seed, 20_000)
    assert min(figures.values()) > 50, figures  # every case was met, or this proves little


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_ring_leads_outside_itself(harness: Path, seed: int) -> None:
    figures = run(harness, "ring", seed, 2_000)
    assert min(figures.values()) > 50, figures


def test_sinks_keep_every_byte_in_order(harness: Path) -> None:
    assert run(harness, "sinks", 1, 500_000)["bytes"] == 4 * 500_000


def test_sinks_have_no_data_race(tmp_path: Path) -> None:
    assert run(build(tmp_path, "thread"), "sinks", 1, 100_000)["bytes"] == 4 * 100_000


def test_the_sanitizers_are_on(harness: Path) -> None:
    """A harness that was built without them would prove nothing."""
    names = subprocess.run(["nm", "-D", str(harness)], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "__asan_report_load" in names and "__ubsan_handle" in names
