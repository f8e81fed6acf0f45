"""Linux writes patterns to a disk, syncs, and the host finds them byte for byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.framework import syscall_faults
from tests.framework.processes import PYVMM, REPOSITORY, pyvmm
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.timeout(BOOT_DEADLINE * 2 + 30)]

SIZE = 1 << 20


def test_patterns_written_in_the_guest_are_in_the_image(tmp_path: Path) -> None:
    pattern, image, base = (tmp_path / name for name in ("pattern.img", "disk.img", "base.img"))
    content = os.urandom(256 << 10)
    pattern.write_bytes(content)
    with image.open("wb") as file:
        file.truncate(SIZE)
    base.write_bytes(bytes(SIZE))
    commands = [
        "cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdb/size",
        # Several block sizes, each to a place of its own, aligned and not.
        "dd if=/dev/vda of=/dev/vdb bs=64k count=1 2>/dev/null",
        "dd if=/dev/vda of=/dev/vdb bs=4k skip=16 seek=32 count=12 2>/dev/null",
        "dd if=/dev/vda of=/dev/vdb bs=512 skip=7 seek=1601 count=33 2>/dev/null",
        "dd if=/dev/vda of=/dev/vdc bs=3k seek=5 count=21 2>/dev/null",
        "sync; dd if=/dev/vdb bs=64k count=1 2>/dev/null | sha256sum",
        "cat /sys/block/vdb/queue/write_cache",
    ]
    arguments = [word for command in commands for word in ("--exec", command)]
    done = pyvmm(
        "linux", "--timeout", str(BOOT_DEADLINE), "--disk", f"{pattern},readonly,serial=PATTERN-1",
        "--disk", str(image), "--disk", f"{base},overlay={tmp_path / 'over.img'}", *arguments,
        timeout=BOOT_DEADLINE + 30,
    )  # fmt: skip
    said = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr.decode()
    assert said[:4] == ["PATTERN-1", "1", "0", str(SIZE // 512)] and said[-1] == "write back", said
    assert said[4].split()[0] == hashlib.sha256(content[: 64 << 10]).hexdigest()
    expected = bytearray(SIZE)
    expected[: 64 << 10] = content[: 64 << 10]
    expected[128 << 10 : 176 << 10] = content[64 << 10 : 112 << 10]
    expected[1601 * 512 : 1634 * 512] = content[7 * 512 : 40 * 512]
    assert image.read_bytes() == expected
    assert base.read_bytes() == bytes(SIZE) and pattern.read_bytes() == content

    from pyvmm.block.overlay import open_overlay

    with open_overlay(str(tmp_path / "over.img"), str(base)) as overlay:
        expected = bytearray(SIZE)
        expected[15360 : 15360 + 21 * 3072] = content[: 21 * 3072]
        assert overlay.read(0, SIZE) == expected


def test_a_flush_that_failed_on_the_host_fails_fsync_in_the_guest_and_so_does_the_next_one(tmp_path: Path) -> None:
    image, log = tmp_path / "disk.img", tmp_path / "faults"
    image.write_bytes(bytes(SIZE))
    dd = "dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null; echo $?"
    commands = [dd, dd, dd, "dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null; echo $?"]
    done = subprocess.run(
        syscall_faults.command(
            log, ["fdatasync:disk.img:EIO:1:1"], str(PYVMM), "linux", "--timeout", str(BOOT_DEADLINE),
            "--disk", str(image), *(word for command in commands for word in ("--exec", command)),
        ),
        capture_output=True, timeout=BOOT_DEADLINE + 30, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    said = done.stdout.decode().splitlines()
    assert [line for line in said if "[" not in line] == ["0", "1", "1", "0"], (said, done.stderr.decode())
    assert sum("I/O error, dev vda" in line for line in said) == 2, said
    assert log.read_text() == "fdatasync EIO\n"
    assert f"pyvmm: disk {image}: flushes fail: Input/output error; the guest sees I/O errors" in done.stderr.decode()
