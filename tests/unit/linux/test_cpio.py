"""The archive that becomes the guest's root file system, read back by GNU cpio and by a reader of our own."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .scripts import load_script

cpio = load_script("guests/linux/cpio.py")


class Entry(NamedTuple):
    inode: int
    mode: int
    owner: tuple[int, int]
    links: int
    modified: int
    device: tuple[int, int]
    name: str
    content: bytes


def read_archive(data: bytes) -> list[Entry]:
    """A reader written from buffer-format.rst alone: c_magic and thirteen fields of eight hexadecimal digits."""
    entries, at = [], 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[i : i + 8], 16) for i in range(at + 6, at + 110, 8)]
        inode, mode, uid, gid, links, mtime, size, _, _, major, minor, name_size, check = fields
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0") and check == 0
        start = (at + 110 + name_size + 3) & ~3
        at = (start + size + 3) & ~3
        assert at <= len(data) and not any(data[start + size : at])
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return entries
        content = data[start : start + size]
        entries.append(Entry(inode, mode, (uid, gid), links, mtime, (major, minor), name[:-1].decode(), content))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30).filter(
    lambda name: name not in (".", "..", cpio.TRAILER)
)
KINDS = st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR])


@st.composite
def trees(draw: st.DrawFn) -> list[Any]:
    """Members in an order in which every folder comes before what is in it."""
    folders, members = [""], []
    for name in draw(st.lists(NAMES, unique=True, max_size=12)):
        parent = draw(st.sampled_from(folders))
        path = f"{parent}/{name}" if parent else name
        kind = draw(KINDS)
        if kind == stat.S_IFDIR:
            folders.append(path)
        content = draw(st.binary(max_size=40)) if kind in (stat.S_IFREG, stat.S_IFLNK) else b""
        device = draw(st.tuples(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))) if kind == stat.S_IFCHR else (0, 0)
        members.append(cpio.Member(path, kind | draw(st.integers(0, 0o7777)), content, device))
    return members


@given(trees())
def test_what_was_written_is_read_back(members: list[Any]) -> None:
    entries = read_archive(cpio.write_archive(members))
    assert [(e.name, e.mode, e.content, e.device) for e in entries] == [
        (m.name, m.mode, m.content, m.device) for m in members
    ]
    # Two files with one inode number and two links would become one in the guest.
    assert len({e.inode for e in entries}) == len(entries)
    assert all(e.links == (2 if stat.S_ISDIR(e.mode) else 1) for e in entries)
    assert all(e.owner == (0, 0) and e.modified == 0 for e in entries)


def test_gnu_cpio_unpacks_it(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("needs Debian's package cpio")
    members = [
        cpio.folder("bin"),
        cpio.file("bin/tool", b"\x7fELF...", 0o755),
        cpio.symlink("bin/sh", "tool"),
        cpio.folder("empty", 0o700),
        cpio.file("nothing", b""),
    ]
    archive = cpio.write_archive(members)
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "bin/tool").read_bytes() == b"\x7fELF..."
    assert stat.S_IMODE((tmp_path / "bin/tool").stat().st_mode) == 0o755
    assert (tmp_path / "bin/sh").readlink() == Path("tool")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    assert (tmp_path / "nothing").read_bytes() == b""
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=archive, capture_output=True, check=True).stdout
    assert len(listed.splitlines()) == len(members)


def test_gnu_cpio_sees_the_device() -> None:
    if shutil.which("cpio") is None:
        pytest.skip("needs Debian's package cpio")
    archive = cpio.write_archive([cpio.folder("dev"), cpio.character_device("dev/console", 5, 1)])
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=archive, capture_output=True, check=True)
    line = listed.stdout.decode().splitlines()[1].split()
    assert line[0] == "crw-------" and line[4:6] == ["5,", "1"] and line[-1] == "dev/console"


@pytest.mark.parametrize("name", ["", "/", "/etc", "etc/", "a//b", ".", "..", "a/../b", "a\0b", "x" * 4096])
def test_names_that_the_kernel_would_misread_are_refused(name: str) -> None:
    with pytest.raises(cpio.CpioError, match="relative path"):
        cpio.write_archive([cpio.folder("a"), cpio.file(name, b"")])


def test_other_mistakes_are_refused() -> None:
    for members, what in (
        ([cpio.file("a", b""), cpio.file("a", b"")], "twice"),
        ([cpio.file("bin/sh", b"")], "its folder does not come before it"),
        ([cpio.file("bin", b""), cpio.file("bin/sh", b"")], "its folder does not come before it"),
        ([cpio.file(cpio.TRAILER, b"")], "ends an archive"),
        ([cpio.Member("a", 0o644)], "no file type"),
        ([cpio.Member("a", stat.S_IFDIR | 0o755, b"x")], "have content"),
    ):
        with pytest.raises(cpio.CpioError, match=what):
            cpio.write_archive(members)
