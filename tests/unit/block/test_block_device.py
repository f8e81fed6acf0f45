"""Disks that are block devices of the host's, on loop devices: sizes, refusals, and space given back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.block.image import SECTOR, open_image
from pyvmm.block.overlay import CLUSTER, open_overlay
from pyvmm.errors import HostError
from tests.framework.loop_device import loop_device
from tests.unit.virtio.block_bench import DISCARD, FLUSH, IN, OK, OUT, ZEROES, block_bench, ranges

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "backing.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def room(file: Path) -> int:
    """Bytes that it takes."""
    return os.stat(file).st_blocks * 512


def test_a_device_has_its_size_and_its_blocks(file: Path) -> None:
    odd = 701 * SECTOR
    with loop_device(file, "--sizelimit", str(odd)) as path, open_image(path, read_only=False) as image:
        assert (image.size, bool(image.native.is_device), image.block_size) == (odd, True, SECTOR)
        assert image.read(0, odd) == file.read_bytes()[:odd]
    with loop_device(file, "--sector-size", "4096") as path, open_image(path, read_only=True) as image:
        assert (image.size, image.block_size) == (SIZE, 4096)


def test_what_a_driver_does_is_in_what_is_behind_the_device(file: Path) -> None:
    """Discards give room back; zeroes that shall keep it do so; both reach odd sectors."""
    before = bytearray(file.read_bytes())
    with loop_device(file) as path, block_bench(open_image(path, read_only=False)) as bench:
        assert bench.request(OUT, 3, b"w" * 1536) == (OK, b"")
        before[3 * SECTOR : 6 * SECTOR] = b"w" * 1536
        full = room(file)
        for kind, sector, sectors, unmap, given_back in (
            (DISCARD, 128, 256, 0, 256 * SECTOR),
            (ZEROES, 512, 256, 0, 0),
            (ZEROES, 1024, 256, 1, 256 * SECTOR),
            (ZEROES, 1537, 3, 0, 0),
            (ZEROES, 1545, 3, 1, 0),
        ):
            assert bench.request(kind, 0, ranges((sector, sectors, unmap))) == (OK, b"")
            before[sector * SECTOR : (sector + sectors) * SECTOR] = bytes(sectors * SECTOR)
            assert bench.request(FLUSH)[0] == OK
            # The file system may need a block more to say where the holes are.
            assert 0 <= room(file) - (full - given_back) <= 8192, (kind, sector)
            full = room(file)
            assert bench.request(IN, sector, room=512) == (OK, bytes(512))
        assert bench.lines == []
    assert file.read_bytes() == before


def test_sectors_smaller_than_the_devices_are_written_all_the_same(file: Path) -> None:
    before = bytearray(file.read_bytes())
    with loop_device(file, "--sector-size", "4096") as path, block_bench(open_image(path, read_only=False)) as bench:
        assert bench.request(OUT, 9, b"w" * 512) == (OK, b"")
        assert bench.request(ZEROES, 0, ranges((17, 1, 0), (25, 2, 1))) == (OK, b"")
        assert bench.request(DISCARD, 0, ranges((41, 1, 0))) == (OK, b"")  # a hint; nothing it could do
        assert bench.request(FLUSH)[0] == OK
    before[9 * SECTOR : 10 * SECTOR] = b"w" * 512
    before[17 * SECTOR : 18 * SECTOR] = bytes(512)
    before[25 * SECTOR : 27 * SECTOR] = bytes(1024)
    assert file.read_bytes() == before


def test_a_read_only_device_is_refused_before_a_guest_writes_to_it(file: Path) -> None:
    """The kernel opens it for writing, and fails each write then."""
    with loop_device(file, "--read-only") as path:
        with pytest.raises(HostError, match=r"cannot be written \(Read-only file system\); use it readonly, or with"):
            open_image(path, read_only=False)
        with open_image(path, read_only=True) as image:
            assert image.read(0, SIZE) == file.read_bytes()
        with open_overlay(str(file.parent / "over.img"), path) as overlay:
            overlay.write(100, b"o" * 100)
            with pytest.raises(HostError, match="cannot be written"):
                overlay.commit()


def test_a_device_that_is_mounted_is_refused(file: Path) -> None:
    """What mount(2) and swapon(2) do with it is this open."""
    with loop_device(file) as path:
        held = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        try:
            with pytest.raises(HostError, match=f"disk {path}: the host itself uses it .*; unmount it, or"):
                open_image(path, read_only=False)
            open_image(path, read_only=True).close()
        finally:
            os.close(held)
        with open_image(path, read_only=False), pytest.raises(HostError, match="in use by another process"):
            open_image(path, read_only=False)


def test_an_overlay_over_a_device_moves_into_it(file: Path) -> None:
    before = bytearray(file.read_bytes())
    with loop_device(file) as path, open_overlay(str(file.parent / "over.img"), path) as overlay:
        overlay.write(CLUSTER + 7, b"o" * 5000)
        assert overlay.clusters_used == 2
        overlay.commit()
        assert overlay.clusters_used == 0
    before[CLUSTER + 7 : CLUSTER + 5007] = b"o" * 5000
    assert file.read_bytes() == before
