"""The overlay against a model, on its own file; what is refused; what an interruption leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.block.image import SECTOR, open_image
from pyvmm.block.overlay import (
    BITMAP_AT,
    CLUSTER,
    COMMITTING,
    EMPTYING,
    SIZE_MAX,
    Header,
    Overlay,
    bitmap_size,
    open_overlay,
    read_header,
    temporary_overlay,
)  # fmt: skip
from pyvmm.errors import ConfigError, HostError, ImageError
from pyvmm.native import lib

SIZE = 9 * CLUSTER + 3 * SECTOR
SECTORS = SIZE // SECTOR


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def opened(base: Path, name: str = "over.img") -> Overlay:
    return open_overlay(str(base.parent / name), str(base))


def test_an_empty_overlay_is_its_base_and_small(base: Path) -> None:
    with opened(base) as overlay:
        assert overlay.read(0, SIZE) == base.read_bytes() and overlay.clusters_used == 0
        assert os.stat(overlay.path).st_blocks * 512 <= 64 << 10


def test_what_is_written_stays_and_the_base_does_not_change(base: Path) -> None:
    before = base.read_bytes()
    with opened(base) as overlay:
        overlay.write(CLUSTER - 10, b"x" * 20)
        overlay.write(SIZE - 5, b"y" * 5)
        assert overlay.clusters_used == 3
    expected = bytearray(before)
    expected[CLUSTER - 10 : CLUSTER + 10] = b"x" * 20
    expected[SIZE - 5 :] = b"y" * 5
    with opened(base) as overlay:
        assert overlay.read(0, SIZE) == expected and overlay.clusters_used == 3
    assert base.read_bytes() == before


_place = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 24))
_step = (
    st.tuples(st.just("write"), _place, st.integers(1, 255))
    | st.tuples(st.sampled_from(["zero", "unmap", "discard"]), _place, st.just(0))
    | st.tuples(st.sampled_from(["flush", "reopen", "commit", "throw away"]), st.just((0, 0)), st.just(0))
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(_step, max_size=25), kept=st.booleans())
def test_it_is_a_disk_like_any_other(
    tmp_path: Path, steps: list[tuple[str, tuple[int, int], int]], kept: bool
) -> None:
    base = tmp_path / "base.img"
    model = bytearray(os.urandom(SIZE))
    base.write_bytes(model)
    committed = bytes(model)
    (tmp_path / "over.img").unlink(missing_ok=True)
    overlay = opened(base) if kept else temporary_overlay(str(base))
    try:
        for what, (sector, count), byte in steps:
            offset, size = sector * SECTOR, min(count, SECTORS - sector) * SECTOR
            if what == "write":
                model[offset : offset + size] = bytes([byte]) * size
                overlay.write(offset, bytes([byte]) * size)
            elif what in ("zero", "unmap"):
                model[offset : offset + size] = bytes(size)
                assert lib.pv_image_zero(overlay.native, offset, size, what == "unmap") == 0
            elif what == "discard":
                assert lib.pv_image_discard(overlay.native, offset, size) == 0
                after = overlay.read(offset, size)  # anything, as long as nothing else changes
                assert all(new in (0, old) for new, old in zip(after, model[offset : offset + size], strict=True))
                model[offset : offset + size] = after
            elif what == "flush":
                overlay.flush()
            elif what == "reopen" and kept:
                overlay.close()
                overlay = opened(base)
            elif what == "commit":
                overlay.commit()
                committed = bytes(model)
                assert overlay.clusters_used == 0
            elif what == "throw away":
                overlay.discard()
                model[:] = committed
                assert overlay.clusters_used == 0
            assert overlay.read(0, SIZE) == model
            assert base.read_bytes() == committed
    finally:
        overlay.close()


@pytest.mark.parametrize("size", [SECTOR, CLUSTER, 8 * 4096 * CLUSTER, 8 * 4096 * CLUSTER + SECTOR])
def test_sizes_at_the_edges_of_the_bitmap(tmp_path: Path, size: int) -> None:
    base = tmp_path / "base.img"
    with base.open("wb") as file:
        file.truncate(size)
    with opened(base) as overlay:
        assert overlay._overlay.bitmap_size == bitmap_size(size) and overlay._overlay.clusters == -(-size // CLUSTER)
        overlay.write(size - SECTOR, b"e" * SECTOR)
    with opened(base) as overlay:
        assert overlay.read(size - SECTOR, SECTOR) == b"e" * SECTOR and overlay.clusters_used == 1


def broken(base: Path, at: int, data: bytes) -> None:
    opened(base).close()
    with open(base.parent / "over.img", "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "reason"),
    [
        (0, b"QFI\xfb", "header: is no overlay"),
        (8, b"\2", "version: 2; this pyvmm knows version 1"),
        (12, b"\0\1", "checksum"),
        (24, b"\xff", "checksum"),
        (100, b"\xff", "checksum"),
        (511, b"\0", "checksum"),
    ],
)
def test_a_damaged_header_is_refused_by_name(base: Path, at: int, data: bytes, reason: str) -> None:
    broken(base, at, data)
    with pytest.raises(ImageError, match=reason):
        opened(base)


@given(data=st.binary(max_size=600))
def test_any_bytes_are_a_header_or_an_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        Header.decode("x", data)


@given(size=st.integers(1, SIZE_MAX // SECTOR), time=st.integers(-(1 << 63), (1 << 63) - 1), name=st.text(max_size=600))
def test_a_header_comes_back(size: int, time: int, name: str) -> None:
    name = name.encode("utf-8", "replace").decode()
    back = Header.decode("x", Header(size * SECTOR, time, name, EMPTYING).encode())
    assert (back.size, back.base_time, back.state) == (size * SECTOR, time, EMPTYING)
    assert os.fsencode(name).endswith(os.fsencode(back.base_name))


def test_a_base_that_was_written_or_is_another_is_refused(base: Path) -> None:
    opened(base).close()
    content = base.read_bytes()
    base.write_bytes(content[:-1] + b"!")
    with pytest.raises(ImageError, match="written after the overlay was made"):
        opened(base)
    base.write_bytes(content + bytes(SECTOR))
    with pytest.raises(ImageError, match=f"has {SIZE} bytes"):
        opened(base)


def test_what_is_no_overlay_stays_as_it_is(base: Path) -> None:
    other = base.parent / "over.img"
    other.write_bytes(b"precious" * 1000)
    with pytest.raises(ImageError, match="is no overlay"):
        opened(base)
    assert other.read_bytes() == b"precious" * 1000
    with pytest.raises(ConfigError, match="own base"):
        opened(base, base.name)
    with pytest.raises(HostError, match="cannot be made"):
        opened(base, "nowhere/over.img")


def test_a_file_cut_short_is_damaged(base: Path) -> None:
    opened(base).close()
    os.truncate(base.parent / "over.img", BITMAP_AT + 4096)
    with pytest.raises(ImageError, match="too short"):
        opened(base)


def test_two_overlays_share_a_base_and_none_is_used_twice(base: Path) -> None:
    with opened(base) as one, opened(base, "two.img") as two:
        one.write(0, b"one")
        assert two.read(0, 3) == base.read_bytes()[:3]
        with pytest.raises(HostError, match="another process"):
            opened(base)
        with pytest.raises(HostError, match="in use"):
            one.commit()  # it would change what the other one reads
        with pytest.raises(HostError, match="another process"):
            open_image(str(base), read_only=False)
        assert one.read(0, 3) == b"one"


def test_an_interrupted_discard_is_finished_and_an_interrupted_commit_reads_as_before(base: Path) -> None:
    content = base.read_bytes()
    with opened(base) as overlay:
        overlay.write(0, b"n" * SIZE)
        overlay.flush()
        overlay._note(COMMITTING)
        base_fd = os.open(base, os.O_RDWR)
        assert lib.pv_overlay_commit(overlay.native, base_fd, 0, 3) == 3
        os.close(base_fd)
    assert base.read_bytes() == b"n" * 3 * CLUSTER + content[3 * CLUSTER :]
    with opened(base) as overlay:
        assert overlay.clusters_used == 7 and overlay.read(0, SIZE) == b"n" * SIZE
        overlay.commit()
    assert base.read_bytes() == b"n" * SIZE and read_header(str(base.parent / "over.img")).state == 0
    with opened(base) as overlay:
        overlay.write(0, b"m" * SIZE)
        overlay.flush()
        overlay._note(EMPTYING)
    with opened(base) as overlay:
        assert overlay.clusters_used == 0 and overlay.read(0, SIZE) == b"n" * SIZE
