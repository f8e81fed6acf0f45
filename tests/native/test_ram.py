"""dirty_log.c, ram_stream.c and ram_file.c under sanitizers: mad kernels, hostile sources, failing disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import NATIVE, attempt, build, run

SOURCES = ["dirty_log.c", "ram_stream.c", "ram_file.c", "dirty_bitmap.c"]
WRAPPED = {"dirty_log_harness.c": "ioctl", "ram_harness.c": "pwrite"}
ROUNDS = {"log": 20_000, "ring": 20_000, "stream": 500, "file": 300}


def harness_of(what: str) -> str:
    return "dirty_log_harness.c" if what in ("log", "ring") else "ram_harness.c"


def build_around(folder: Path, harness: str, changed: Path | None = None) -> Path:
    """With ``changed`` instead of the source of that name."""
    sources = [changed if changed and name == changed.name else NATIVE / name for name in SOURCES]
    return build(folder, harness, sources, f"-Wl,--wrap={WRAPPED[harness]}")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {harness: build_around(tmp_path_factory.mktemp("ram"), harness) for harness in WRAPPED}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("what", list(ROUNDS))
def test_nothing_leads_outside_memory_and_nothing_is_lost(programs: dict[str, Path], what: str, seed: int) -> None:
    figures = run(programs[harness_of(what)], what, seed, ROUNDS[what])
    assert min(figures.values()) > 5, figures  # every case was met, or this proves little


@pytest.mark.parametrize(
    ("what", "name", "step", "instead"),
    [
        ("log", "dirty_log.c", "scratch[words - 1] &=", "if (0) scratch[words - 1] &="),
        ("ring", "dirty_log.c", "entry->slot < slots && entry->offset < pages[entry->slot]", "entry->slot < slots"),
        ("ring", "dirty_log.c", "if (entry->slot < slots && ", "if ("),
        ("stream", "ram_stream.c", "head[0] >= pages || count > pages - head[0]", "head[0] >= pages"),
        ("stream", "ram_stream.c", "count > (size - at) / PV_PAGE", "0"),
        ("stream", "ram_stream.c", "if (size - at < RECORD)", "if (0)"),
        ("stream", "ram_stream.c", "const loose_word *words = (const loose_word *)",
         "const uint64_t *words = (const void *)"),
        ("file", "ram_file.c", "from += done;", ""),
        ("file", "ram_file.c", "if (look_again)", "if (look_again && 0)"),
    ],
)  # fmt: skip
def test_a_missing_check_is_found(tmp_path: Path, what: str, name: str, step: str, instead: str) -> None:
    """Or else the test above would prove nothing."""
    source = (NATIVE / name).read_text()
    assert step in source
    (tmp_path / name).write_text(source.replace(step, instead))
    done = attempt(build_around(tmp_path, harness_of(what), tmp_path / name), what, 1, ROUNDS[what])
    assert done.returncode != 0
    assert any(word in done.stderr for word in ("Sanitizer", "runtime error", "_harness.c:")), done
