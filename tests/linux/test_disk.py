"""Linux writes patterns to a disk, syncs, and the host finds them byte for byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.framework import syscall_faults
from tests.framework.processes import PYVMM, REPOSITORY
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.timeout(BOOT_DEADLINE * 2 + 30)]

SIZE = 1 << 20
COMMANDS = [
    "cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdb/size;"
    " cat /sys/block/vdb/queue/write_cache",
    # Several block sizes, each to a place of its own, aligned and not.
    "exec 2>/dev/null; dd if=/dev/vda of=/dev/vdb bs=64k count=1; dd if=/dev/vda of=/dev/vdb bs=4k skip=16 seek=32"
    " count=12; dd if=/dev/vda of=/dev/vdb bs=512 skip=7 seek=1601 count=33; dd if=/dev/vda of=/dev/vdc bs=3k seek=5"
    " count=21; sync; dd if=/dev/vdb bs=64k count=1 | sha256sum",
    # vdd's file cannot be synced from its second time on.
    "for i in 1 2 3; do dd if=/dev/zero of=/dev/vdd bs=4k count=1 conv=fsync; echo status $?; done;"
    " dd if=/dev/vdd of=/dev/null bs=64k count=1 iflag=direct; echo status $?",
]


@dataclass
class Session:
    """One boot: the folder with its images, what the first disk holds, what was said."""

    folder: Path
    content: bytes
    done: subprocess.CompletedProcess[bytes]

    @property
    def said(self) -> list[str]:
        return self.done.stdout.decode().splitlines()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("disks")
    content = os.urandom(256 << 10)
    (folder / "pattern.img").write_bytes(content)
    for name in ("disk.img", "base.img", "broken.img"):
        (folder / name).write_bytes(bytes(SIZE))
    arguments = [word for command in COMMANDS for word in ("--exec", command)]
    done = subprocess.run(
        syscall_faults.command(
            folder / "faults", ["fdatasync:broken.img:EIO:1:1"], str(PYVMM), "linux", "--timeout", str(BOOT_DEADLINE),
            "--disk", f"{folder / 'pattern.img'},readonly,serial=PATTERN-1", "--disk", str(folder / "disk.img"),
            "--disk", f"{folder / 'base.img'},overlay={folder / 'over.img'}", "--disk", str(folder / "broken.img"),
            *arguments,
        ),
        capture_output=True, timeout=BOOT_DEADLINE + 30, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    return Session(folder, content, done)


def test_patterns_written_in_the_guest_are_in_the_image(session: Session) -> None:
    content, said = session.content, session.said
    assert session.done.returncode == 0, session.done.stderr.decode()
    assert said[:4] == ["PATTERN-1", "1", "0", str(SIZE // 512)] and said[4] == "write back", said
    assert said[5].split()[0] == hashlib.sha256(content[: 64 << 10]).hexdigest()
    expected = bytearray(SIZE)
    expected[: 64 << 10] = content[: 64 << 10]
    expected[128 << 10 : 176 << 10] = content[64 << 10 : 112 << 10]
    expected[1601 * 512 : 1634 * 512] = content[7 * 512 : 40 * 512]
    assert (session.folder / "disk.img").read_bytes() == expected
    assert (session.folder / "base.img").read_bytes() == bytes(SIZE)
    assert (session.folder / "pattern.img").read_bytes() == content

    from pyvmm.block.overlay import open_overlay

    with open_overlay(str(session.folder / "over.img"), str(session.folder / "base.img")) as overlay:
        expected = bytearray(SIZE)
        expected[15360 : 15360 + 21 * 3072] = content[: 21 * 3072]
        assert overlay.read(0, SIZE) == expected


def test_a_flush_that_failed_on_the_host_fails_fsync_in_the_guest_and_so_does_the_next_one(session: Session) -> None:
    said, errors = session.said, session.done.stderr.decode()
    assert [line for line in said if line.startswith("status")] == ["status 0", "status 1", "status 1", "status 0"]
    assert sum("I/O error, dev vdd" in line for line in said) == 2, said
    assert (session.folder / "faults").read_text() == "fdatasync EIO\n"
    broken = session.folder / "broken.img"
    assert f"pyvmm: disk {broken}: flushes fail: Input/output error; the guest sees I/O errors" in errors
