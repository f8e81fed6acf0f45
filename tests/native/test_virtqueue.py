"""virtqueue.c under ASan and UBSan, against hostile rings and a guest that changes them meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import NATIVE, build, run

REACHED = {
    0: "the end of the ring", -4: "BAD_INDEX", -5: "BAD_HEAD", -6: "BAD_NEXT", -7: "LOOP", -8: "BAD_ADDRESS",
    -9: "BAD_ORDER", -10: "BAD_TABLE", -11: "TOO_LONG",
}  # fmt: skip
"""What the rounds must come upon, or they prove little."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = [NATIVE / "virtqueue.c", NATIVE / "dirty_bitmap.c"]
    return build(tmp_path_factory.mktemp("virtqueue"), "virtqueue_harness.c", sources)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_ring_leads_outside_memory(harness: Path, seed: int) -> None:
    figures = run(harness, seed, "2000", "10")
    assert figures["taken"] > 200
    missed = [name for result, name in REACHED.items() if not figures["results"][str(result)]]
    assert missed == [], figures
