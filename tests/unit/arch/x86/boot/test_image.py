"""Opening files and telling what they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.arch.x86.boot.image import ImageFile, ImageKind, classify, find_multiboot_header
from pyvmm.errors import ImageError

from . import images

Save = Callable[..., str]


def test_missing_directory_empty_fifo_and_device(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    empty = tmp_path / "empty"
    empty.touch()
    cases = {
        str(tmp_path / "nothing"): "no such file",
        str(tmp_path): "is a directory",
        str(fifo): "is not a regular file",
        "/dev/zero": "is not a regular file",
        str(empty): "is empty",
        "nul\0byte": "cannot be opened",
        "x" * 5000: "cannot be opened",
        str(empty / "below"): "cannot be opened",
    }
    for path, problem in cases.items():
        with pytest.raises(ImageError) as caught:
            ImageFile(path)
        assert problem in str(caught.value)
        assert caught.value.path == path and "\n" not in str(caught.value)


def test_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read everything, so the refusal is made
    with pytest.raises(ImageError, match="permission denied; make it readable"):
        ImageFile("kernel")


def test_no_descriptor_leaks_from_refused_files(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        with pytest.raises(ImageError):
            ImageFile(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_reads_stay_inside_the_file(save: Save) -> None:
    with ImageFile(save(b"0123456789")) as image:
        assert image.read(2, 3, "field") == b"234"
        assert image.head(100) == b"0123456789"
        for offset, size in ((8, 3), (-1, 2), (0, -1), (1 << 70, 1), (0, 1 << 70)):
            with pytest.raises(ImageError, match="my field"):
                image.read(offset, size, "my field")
            with pytest.raises(ImageError, match="my field"):
                list(image.chunks(offset, size, "my field"))


def test_a_file_that_shrinks_is_an_error(save: Save) -> None:
    path = save(bytes(1 << 16))
    with ImageFile(path) as image:
        os.truncate(path, 100)
        with pytest.raises(ImageError, match="became shorter"):
            image.read(0, 4096, "header")
        with pytest.raises(ImageError, match="became shorter"):
            list(image.chunks(0, 4096, "segment"))


def test_chunks_are_the_file(save: Save) -> None:
    data = os.urandom((2 << 20) + 17)
    with ImageFile(save(data)) as image:
        assert b"".join(bytes(c) for c in image.chunks(5, len(data) - 5, "all")) == data[5:]


@pytest.mark.parametrize(
    ("data", "name", "kind"),
    [
        (images.bzimage(images.compress(b"x" * 99, "gzip")), "image", ImageKind.BZIMAGE),
        (images.elf([images.Seg(0x100000, b"\xf4")], 0x100000), "image", ImageKind.ELF),
        (images.kludge(), "image", ImageKind.MULTIBOOT),
        (bytes(510) + b"\x55\xaa", "image", ImageKind.FLAT),
        (b"\xf4", "halt.bin", ImageKind.FLAT),
    ],
)
def test_kinds(save: Save, data: bytes, name: str, kind: ImageKind) -> None:
    with ImageFile(save(data, name)) as image:
        assert classify(image) is kind


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"#!/bin/sh\n", "is not a kernel"),
        (b"\xff\xd8\xff\xe0 JFIF", "is not a kernel"),
        (images.compress(b"x" * 99, "gzip"), "is a gzip-compressed file"),
        (images.compress(b"x" * 99, "zstd"), "is a zstd-compressed file"),
        (b"MZ" + bytes(508) + b"\x55\xaa", "truncated bzImage"),
        (b"\x7fEL", "is not a kernel"),
    ],
)
def test_not_kernels(save: Save, data: bytes, problem: str) -> None:
    with ImageFile(save(data)) as image, pytest.raises(ImageError, match=problem):
        classify(image)


def test_multiboot_header_rules() -> None:
    header = images.multiboot_header(3)
    assert find_multiboot_header(bytes(8) + header) == 8
    assert find_multiboot_header(bytes(6) + header) is None, "not 4-byte aligned"
    assert find_multiboot_header(bytes(8180) + header) == 8180
    assert find_multiboot_header(bytes(8184) + header) is None, "not within 8192 bytes"
    assert find_multiboot_header(header[:8] + b"\0\0\0\0") is None, "checksum"
    assert find_multiboot_header(header[:8] + b"\0\0\0\0" + header) == 12, "a false start does not hide it"
