"""block_forward.c under sanitizers: the records of what several threads wrote make the same disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import MEMORY, NATIVE, RACES, attempt, build, run

SOURCES = ["block_forward.c", "block_image.c", "block_overlay.c", "ram_stream.c", "dirty_bitmap.c"]
LOCKED = "		pthread_mutex_lock(&f->lock);\n		wait_for_room(f, r->size);\n"
WRITES = "		result = pv_image_write(image, &piece, true);\n"


def harness(folder: Path, changed: Path | None = None, sanitizer: str = MEMORY) -> Path:
    sources = [changed if changed and name == changed.name else NATIVE / name for name in SOURCES]
    return build(folder, "forward_harness.c", sources, sanitizer=sanitizer)


@pytest.mark.parametrize("sanitizer", [MEMORY, RACES])
def test_the_records_make_the_same_disk(tmp_path: Path, sanitizer: str) -> None:
    program = harness(tmp_path, sanitizer=sanitizer)
    for seed in ("1", "2"):
        figures = run(program, seed, "800")
        assert min(figures.values()) > 300, figures


@pytest.mark.parametrize(
    ("step", "instead"),
    [
        # Two writes of one place, in one order there and another here.
        (LOCKED + WRITES, WRITES + "		extern int usleep(unsigned);\n		usleep(20);\n" + LOCKED),
        ("	if (!result)\n		result = pv_image_read(image, &t, true);\n", "	(void)t;\n"),
        ("		append(f, r, PV_FORWARD_WRITE, offset, n);\n			r = NULL;\n", "r = NULL;\n"),
    ],
)
def test_a_missing_step_is_found(tmp_path: Path, step: str, instead: str) -> None:
    """Or else the test above would prove nothing."""
    source = (NATIVE / "block_forward.c").read_text()
    assert step in source
    (tmp_path / "block_forward.c").write_text(source.replace(step, instead))
    program = harness(tmp_path, tmp_path / "block_forward.c")
    # Short ones: what is written later covers what went wrong.
    assert any(attempt(program, str(seed), "5").returncode for seed in range(1, 200))
