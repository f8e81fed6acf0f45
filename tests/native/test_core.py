"""The native core under sanitizers: page tables, guest addresses, KVM's ring and the sinks, against hostile input."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.harness import MEMORY, NATIVE, RACES, build, run

SOURCES = [NATIVE / name for name in ("coalesced_ring.c", "guest_memory.c", "dirty_bitmap.c")]


def core(folder: Path, sanitizer: str) -> Path:
    return build(folder, "core_harness.c", SOURCES, "-mcx16", sanitizer=sanitizer)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return core(tmp_path_factory.mktemp("core"), MEMORY)


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
    assert run(core(tmp_path, RACES), "sinks", 1, 100_000)["bytes"] == 4 * 100_000
