"""block_*.c under sanitizers: lying requests, several threads, and overlays whose disk loses power."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import MEMORY, NATIVE, RACES, attempt, build, run

OVERLAY = ["block_image.c", "block_overlay.c"]
DEVICE = [
    *OVERLAY, "block_forward.c", "ram_stream.c", "block_request.c", "block_device.c", "virtqueue.c", "dirty_bitmap.c",
    "virtio_interrupt.c",
]  # fmt: skip
WRAPPED = ("preadv2", "pwritev2", "pwrite", "fallocate", "fdatasync")


@pytest.fixture(scope="module", params=[MEMORY, RACES])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [NATIVE / name for name in DEVICE]
    return build(tmp_path_factory.mktemp("block"), "block_harness.c", sources, sanitizer=request.param)


@pytest.mark.parametrize("overlay", ["0", "1"])
@pytest.mark.parametrize("seed", ["1", "2"])
def test_no_request_leads_outside_its_buffers_and_each_comes_back(device: Path, seed: str, overlay: str) -> None:
    figures = run(device, seed, "400", overlay)
    assert min(figures.values()) > 50 and figures["ok"] + figures["ioerr"] + figures["unsupp"] == 3200, figures


def crash_harness(folder: Path, overlay: Path) -> Path:
    wrap = [f"-Wl,--wrap={name}" for name in WRAPPED]
    return build(folder, "overlay_crash_harness.c", [NATIVE / "block_image.c", overlay], *wrap)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_what_was_flushed_survives_a_crash(tmp_path: Path, seed: str) -> None:
    figures = run(crash_harness(tmp_path, NATIVE / "block_overlay.c"), seed, "400")
    assert figures["crashes"] == 400 and figures["sectors_lost"] > 1000 and figures["syncs"] > 400, figures


@pytest.mark.parametrize(
    ("step", "instead"),
    [
        ("int result = pv_file_sync(image, image->fd);", "int result = 0;"),  # data before its bits
        ("result = pv_file_sync(image, o->base_fd);", "result = 0;"),  # the base before bits are taken back
        ("result = wait ? fetch(image, part[i]) : -EAGAIN;", "result = 0;"),  # all of a cluster before a part of it
    ],
)
def test_the_crashes_find_a_missing_step(tmp_path: Path, step: str, instead: str) -> None:
    """Or else the test above would prove nothing."""
    source = (NATIVE / "block_overlay.c").read_text()
    assert step in source
    (tmp_path / "block_overlay.c").write_text(source.replace(step, instead))
    program = crash_harness(tmp_path, tmp_path / "block_overlay.c")
    done = attempt(program, "1", "400")
    assert done.returncode != 0 and "sector" in done.stderr


def race_harness(folder: Path, overlay: Path, sanitizer: str) -> Path:
    wrap = ["-Wl,--wrap=pwritev2", "-Wl,--wrap=fallocate"]
    return build(folder, "overlay_race_harness.c", [NATIVE / "block_image.c", overlay], *wrap, sanitizer=sanitizer)


@pytest.mark.parametrize("sanitizer", [MEMORY, RACES])
def test_overlapping_writes_to_a_fresh_cluster_lose_nothing(tmp_path: Path, sanitizer: str) -> None:
    """A copy from the base must not go over what another request has written beside it."""
    figures = run(race_harness(tmp_path, NATIVE / "block_overlay.c", sanitizer), "1", "500")
    assert figures["overlaps"] > 1600 and figures["partial"] > 600, figures


def test_the_races_find_requests_that_do_not_keep_off_each_other(tmp_path: Path) -> None:
    """Or else the test above would prove nothing."""
    source, step = (NATIVE / "block_overlay.c").read_text(), "if (other->first < a->end && a->first < other->end)"
    assert step in source
    (tmp_path / "block_overlay.c").write_text(source.replace(step, "if (0)"))
    program = race_harness(tmp_path, tmp_path / "block_overlay.c", MEMORY)
    done = attempt(program, "1", "1500")
    assert done.returncode == 1 and "holds 0xba" in done.stderr, done
