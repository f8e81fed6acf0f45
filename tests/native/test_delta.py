"""page_delta.c, page_lz4.c and replica.c under sanitizers: both sides of a pair, and hostile primaries."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import NATIVE, attempt, build, run

SOURCES = ["page_delta.c", "page_lz4.c", "replica.c", "ram_stream.c", "dirty_bitmap.c"]
ROUNDS = {"pair": 40, "hostile": 2000, "lz4": 5000}


def build_with(folder: Path, changed: Path | None = None) -> Path:
    """With ``changed`` instead of the source of that name."""
    sources = [changed if changed and name == changed.name else NATIVE / name for name in SOURCES]
    return build(folder, "delta_harness.c", sources)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_with(tmp_path_factory.mktemp("delta"))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("what", list(ROUNDS))
def test_nothing_is_lost_and_nothing_leads_outside(program: Path, what: str, seed: int) -> None:
    figures = run(program, what, seed, ROUNDS[what])
    assert min(figures.values()) > 5, figures  # every case was met, or this proves little


@pytest.mark.parametrize(
    ("what", "name", "step", "instead"),
    [
        ("pair", "page_delta.c", "			forget(delta, delta->known[region] + head[0] + i);", "			;"),
        ("pair", "page_delta.c", "		forget(delta, known);\n		return 0;", "		return 0;"),
        ("pair", "page_delta.c", "delta->known[place->region][place->page].place = 0;", ""),
        ("pair", "page_delta.c", "	memcpy(delta->pages + (uint64_t)(known->place - 1) * PV_PAGE, page, PV_PAGE);", ""),
        ("hostile", "page_delta.c", "head[0] >= pages || count > pages - head[0]", "head[0] >= pages"),
        ("hostile", "page_delta.c", "bytes > size - at ||", ""),
        ("hostile", "page_delta.c", "size == heads + words * 8", "true"),
        ("hostile", "page_delta.c", "	if (size < heads)\n		return false;", ""),
        ("lz4", "page_lz4.c", "match > PV_PAGE - done", "0"),
        ("lz4", "page_lz4.c", "offset > done", "0"),
        ("lz4", "page_lz4.c", "count > size - at", "0"),
        ("lz4", "page_lz4.c", "count > PV_PAGE - done", "0"),
        ("lz4", "page_lz4.c", "*at >= size ||", ""),
    ],
)  # fmt: skip
def test_a_missing_step_is_found(tmp_path: Path, what: str, name: str, step: str, instead: str) -> None:
    """Or else the test above would prove nothing."""
    source = (NATIVE / name).read_text()
    assert step in source
    (tmp_path / name).write_text(source.replace(step, instead))
    done = attempt(build_with(tmp_path, tmp_path / name), what, 1, ROUNDS[what])
    assert done.returncode != 0
    assert any(word in done.stderr for word in ("Sanitizer", "runtime error", "_harness.c:")), done
