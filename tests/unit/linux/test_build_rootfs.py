"""What goes into the initramfs, and what its builder refuses."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from .scripts import load_script

rootfs = load_script("guests/linux/build-rootfs")


def elf(*segments: int, bits: int = 2, machine: int = 0x3E) -> bytes:
    """An ELF header with program headers of these types, sixty-four bytes after the start."""
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", bits, 1, 1, 0, 2, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    return header + b"".join(struct.pack("<I52x", kind) for kind in segments)


def use_busybox(monkeypatch: pytest.MonkeyPatch, path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(rootfs, "BUSYBOX", path)


def test_a_static_64_bit_program_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = elf(1, 1, 0x6474E551) + b"/lib64/ld-linux-x86-64.so.2"  # only PT_INTERP counts, not a string
    use_busybox(monkeypatch, tmp_path / "busybox", image)
    assert rootfs.read_busybox() == image


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is missing"),
        (b"", "not a 64-bit x86 program"),
        (b"#!/bin/sh\n" * 10, "not a 64-bit x86 program"),
        (elf(1, bits=1), "not a 64-bit x86 program"),
        (elf(1, machine=0xB7), "not a 64-bit x86 program"),
        (elf(6, 3, 1), "dynamically linked"),
    ],
)
def test_another_busybox_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    use_busybox(monkeypatch, tmp_path / "busybox", content)
    with pytest.raises(rootfs.BuildError, match=complaint) as caught:
        rootfs.read_busybox()
    assert "busybox-static" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "most"), [("init.c", 8192), ("store.c", 12288)])
def test_a_program_is_small_and_static(source: str, most: int) -> None:
    init = rootfs.compile_program(source)
    assert init[:6] == b"\x7fELF\x02\x01"
    start, size, count = *struct.unpack_from("<32xQ", init), *struct.unpack_from("<54xHH", init)
    kinds = [struct.unpack_from("<I", init, start + i * size)[0] for i in range(count)]
    assert 3 not in kinds and 2 not in kinds, "PT_INTERP or PT_DYNAMIC: it would need a linker in the guest"
    assert len(init) < most, "every page of it is copied by the guest at boot"
    assert rootfs.compile_program(source) == init


def test_a_compiler_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(rootfs.BuildError, match="no-such-compiler is missing: install"):
        rootfs.compile_program("init.c")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(rootfs, "CFLAGS", [*rootfs.CFLAGS, "-DP=("])
    with pytest.raises(rootfs.BuildError, match=r"(?s)could not build init\.c:.*error"):
        rootfs.compile_program("init.c")


def test_members() -> None:
    members: dict[str, Any] = {m.name: m for m in rootfs.members(b"busybox", b"init", b"store")}
    assert members["init"].content == b"init" and members["init"].mode & 0o111
    assert members["bin/store"].content == b"store" and members["bin/store"].mode & 0o111
    assert members["bin/busybox"].content == b"busybox" and members["bin/busybox"].mode & 0o111
    assert members["bin/sh"].content == b"busybox"
    # The kernel opens /dev/console for init, and init mounts onto these.
    assert members["dev/console"].device == (5, 1)
    assert {"proc", "sys", "dev", "tmp", "root"} <= members.keys()
    rootfs.cpio.write_archive(list(members.values()))  # nothing that the writer refuses


def test_the_disk_holds_the_same_tree(tmp_path: Path) -> None:
    tree = rootfs.members(b"busybox" * 1000, b"init", b"store")
    image = rootfs.make_erofs(tree)
    # Linux's fs/erofs/erofs_fs.h: the superblock is at 1024 and begins with this magic.
    assert image[1024:1028] == (0xE0F5E1E2).to_bytes(4, "little") and b"busybox" * 100 in image
    assert rootfs.make_erofs(tree) == image


def test_a_missing_mkfs_is_named_by_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(rootfs.BuildError, match="install Debian's package erofs-utils"):
        rootfs.make_erofs([])


def test_written_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "initramfs.cpio"
    assert rootfs.write_if_changed(path, b"one") == "written"
    os.utime(path, (1, 1))
    assert rootfs.write_if_changed(path, b"one") == "is up to date"
    assert path.stat().st_mtime == 1
    assert rootfs.write_if_changed(path, b"two") == "written"
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
