"""Opening disks: what is refused, in which words, and who may share one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.block.image import open_image
from pyvmm.errors import ConfigError, HostError


def made(folder: Path, content: bytes = bytes(4096)) -> str:
    path = folder / "disk.img"
    path.write_bytes(content)
    return str(path)


def test_reads_and_writes_go_where_they_should(tmp_path: Path) -> None:
    path = made(tmp_path, os.urandom(4096))
    with open_image(path, read_only=False) as image:
        assert (image.size, image.read(100, 50)) == (4096, Path(path).read_bytes()[100:150])
        image.write(1000, b"here")
        image.flush()
        assert Path(path).read_bytes()[1000:1004] == b"here"
        for offset, size in ((4096, 1), (-1, 1), (0, 4097)):
            with pytest.raises(ValueError, match="bytes at"):
                image.read(offset, size)


@pytest.mark.parametrize("size", [0, 511])
def test_less_than_a_sector_is_no_disk(tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match="at least one sector"):
        open_image(made(tmp_path, bytes(size)), read_only=True)


def test_a_part_of_a_sector_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = made(tmp_path, bytes(1000))
    with pytest.raises(ConfigError, match=rf"truncate -s 1024 {path}"):
        open_image(path, read_only=False)


def test_what_is_no_disk_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        ("missing", "no such file"), (".", "is a folder"), ("fifo", "neither a file nor"), ("/dev/null", "neither"),
    ):  # fmt: skip
        for read_only in (True, False):
            with pytest.raises(ConfigError, match=reason):
                open_image(str(tmp_path / path), read_only=read_only)


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    path = made(tmp_path)
    two_readers = open_image(path, read_only=True), open_image(path, read_only=True)
    with two_readers[0], two_readers[1], pytest.raises(HostError, match="in use by another process"):
        open_image(path, read_only=False)
    with open_image(path, read_only=False):
        for read_only in (True, False):
            with pytest.raises(HostError, match="another process"):
                open_image(path, read_only=read_only)
    open_image(path, read_only=False).close()


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    path = made(tmp_path)
    code = (
        f"from pyvmm.block.image import open_image; image = open_image({path!r}, read_only=False)\n"
        "print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        with pytest.raises(HostError, match="another process"):
            open_image(path, read_only=False)
        child.kill()
    open_image(path, read_only=False).close()


def test_no_permission_names_the_remedy(tmp_path: Path) -> None:
    """As root nothing is forbidden, so another user asks."""
    path = made(tmp_path)
    os.chmod(path, 0o444)
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o111)
    code = (
        "import os, sys\n"
        "from pyvmm.block import image\n"
        "from pyvmm.errors import HostError\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        f"image.open_image({path!r}, read_only=True).close()\n"
        f"try: image.open_image({path!r}, read_only=False)\n"
        "except HostError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"disk {path}: cannot be written (Permission denied); use it readonly, or with overlay=FILE\n"
